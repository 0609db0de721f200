"""What all commands parse alike: layers, numbers, names in any case, and "did you mean"."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from ..errors import Qwen35Error, printable

MOST_CHOICES = 20  # more are not listed in an error that names the nearest one


class Parser(argparse.ArgumentParser):
    """No abbreviations; choices in any case. An error names the nearest known option or choice, and shows no usage."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **kwargs})

    def _print_message(self, message: str, file: Any = None) -> None:
        """Messages quote the arguments, which must not command the terminal."""
        super()._print_message(printable(message), file)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            value = super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            if isinstance(error.__context__, Qwen35Error):  # which says more
                raise error.__context__ from None
            raise
        known = [choice for choice in action.choices or () if isinstance(choice, str)]
        return next((choice for choice in known if choice.lower() == str(value).lower()), value)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = get_close_matches(str(value).lower(), [str(choice) for choice in action.choices], 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            few = len(tuple(action.choices)) <= MOST_CHOICES
            known = f"choose from {', '.join(map(str, action.choices))}" if few or not near else ""
            message = f"invalid choice: {value!r} ({(hint + known).strip()})"
            raise argparse.ArgumentError(action, message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """A command refuses what it does not know by itself, so that the error names its own help."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = get_close_matches(unknown[0].partition("=")[0], [*self._option_string_actions], 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n  do: see the options in `{self.prog} -h`\n")


class Formatter(argparse.HelpFormatter):
    """Wraps each paragraph of a text by itself."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(super(Formatter, self)._fill_text(line, width, indent) for line in text.splitlines())


def layers(text: str, where: str = "--layer") -> list[int]:
    """ "3" -> [3]; "1,2" -> [1, 2]; "1-3" -> [1, 2, 3]; and these joined by commas."""
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        if (match := re.fullmatch(r"(-?\d{1,6})(?:-(\d{1,6}))?", part)) is None:
            raise Qwen35Error("not a list of layers", where=where, expected="3, or 1,2, or 1-3", found=text)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise Qwen35Error("a range of layers that ends before it begins", where=where, found=part)
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def within(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], Any]:
    """The type of an argument: a number from `least` to `most`."""

    def read(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = kind(most) + 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
        return number

    return read


def check_order(first: str, second: str, command: str) -> None:
    """Error: the two arguments are swapped, or a truth stands where a checkpoint belongs, or the other way round."""
    kinds = {"compare": "trace.json", "diagnose": "config.json"}  # the file that shows what a command's first one is
    (other,) = kinds.keys() - {command}
    a, b = Path(first), Path(second)
    if (a / kinds[command]).exists() or a.suffix == ".safetensors":
        return
    if (b / kinds[command]).is_file():
        do = shlex.join(["qwen35-moe", command, second, first])
        raise Qwen35Error("the two arguments are swapped", where=f"{first} {second}", do=do)
    if (a / kinds[other]).is_file():
        found, expected = ("a checkpoint", "a truth") if command == "compare" else ("a truth", "a checkpoint")
        do = shlex.join(["qwen35-moe", other, first, second])
        raise Qwen35Error(f"not what {command} starts from", where=first, expected=expected, found=found, do=do)
