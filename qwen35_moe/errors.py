"""The error type of the package, the form of its messages, and the text that a terminal may show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Far more layers than any model has: a wrong number must not take memory before it is found to be wrong.
MOST_LAYERS = 10_000


class Qwen35Error(ValueError):
    """Bad input, stated so that the reader can act: what is wrong, where, expected, found, and what to do.

    >>> raise Qwen35Error("tensor has the wrong shape", where="model-00001.safetensors: norm.weight",
    ...                   expected="[2048]", found="[1024]", do="check that the shard belongs to this config.json")
    """

    def __init__(self, what: str, *, where: object = "", expected: object = "", found: object = "", do: str = ""):
        self.what, self.where, self.expected, self.found, self.do = what, where, expected, found, do
        parts = [what]
        for label, value in (("where", where), ("expected", expected), ("found", found), ("do", do)):
            if str(value):
                parts.append(f"  {label}: {value}")
        super().__init__("\n".join(parts))

    def but(self, **said: object) -> Qwen35Error:
        """The same error with another `where`, `do`, ..."""
        return Qwen35Error(**{**vars(self), **said})


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A context for imports of optional packages: `hf` transformers, `placement` accelerate, `vision` both and Pillow.
    If one is missing, the error names it, and the command that installs it."""
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        do = f"pip install 'qwen35-moe[{name}]'"
        raise Qwen35Error(f"{missing} is not installed", expected=f"the extra [{name}]", do=do) from error


def printable(text: str) -> str:
    """The text without control characters but for new lines and tabs: they are shown as escapes, so that a path, a key
    or a tensor's name from a stranger's file cannot command the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)
