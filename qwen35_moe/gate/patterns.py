"""Regular expressions from files: refused where they could take exponential time, and bounded in length.

Python's `re` backtracks. On a name of n characters `(a|a)+b` tries 2^n ways, and `.*.*.*.*x` about n^4. A pattern is
safe from the first kind if nothing that repeats holds a second way to match the same text. The second kind is bounded
by the number of open repeats in a row. Names of modules have a few hundred characters.
"""

from __future__ import annotations

import re
import re._compiler as compiler  # type: ignore[import-not-found, unused-ignore]
import re._constants as codes  # type: ignore[import-not-found, unused-ignore]
import re._parser as parser  # type: ignore[import-not-found, unused-ignore]
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ..errors import Qwen35Error

MAX_PATTERN, MAX_OPEN_REPEATS, MAX_NAME = 2000, 6, 1000
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)


@lru_cache(maxsize=4096)
def bounded_pattern(pattern: str, what: str = "not a valid regular expression", where: str = "") -> re.Pattern[str]:
    """The compiled pattern. Error (`what`): no regular expression, too long, or one that may take exponential time."""
    expected = "a regular expression, not a shell pattern"
    if len(pattern) > MAX_PATTERN:
        raise Qwen35Error(what, where=where, expected=f"at most {MAX_PATTERN} characters", found=len(pattern))
    try:
        compiled, tree = re.compile(pattern), parser.parse(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise Qwen35Error(what, where=where, expected=expected, found=f"{pattern[:200]}: {error}") from error
    if (reason := _slow(tree)) or _open_repeats(tree) > MAX_OPEN_REPEATS:
        reason = reason or f"more than {MAX_OPEN_REPEATS} open repeats"
        expected = "one that takes no exponential time: no repeat of what repeats, or has alternatives, itself"
        raise Qwen35Error("a regular expression may take for ever", where=where, expected=expected,
                          found=f"{pattern[:200]}: {reason}", do="write it without nested repeats")  # fmt: skip
    return compiled


def _children(argument: Any) -> Iterable[Any]:
    """The sub-patterns in the argument of a parsed item."""
    if isinstance(argument, parser.SubPattern):
        yield argument
    elif isinstance(argument, tuple | list):
        for part in argument:
            yield from _children(part)


def _slow(tree: Any) -> str:
    """Why a pattern may take exponential time; "" if it may not."""
    for code, argument in tree:
        if code in _REPEATS and argument[1] > 1 and (reason := _ambiguous(argument[2])):
            return reason
        if code is codes.GROUPREF:
            return "a reference to a group"
        for child in _children(argument):
            if reason := _slow(child):
                return reason
    return ""


def _ambiguous(body: Any) -> str:
    """Why the body of a repeat may match one text in several ways."""
    items = _flat(body)
    for i, (code, argument) in enumerate(items):
        if code is codes.BRANCH:
            firsts = [_flat(way)[:1] for way in argument[1]]
            letters = [first[0][1] for first in firsts if first and first[0][0] is codes.LITERAL]
            if len(letters) < len(firsts) or len(set(letters)) < len(letters):
                return "alternatives that overlap, repeated"
        if code in _REPEATS and argument[0] != argument[1]:
            inner, (after, letter) = argument[2], items[i + 1] if i + 1 < len(items) else (None, 0)
            ends = after is codes.LITERAL and inner.getwidth() == (1, 1)
            if not ends or compiler.compile(inner).fullmatch(chr(letter)):
                return "a repeat of a repeat"
    return ""


def _flat(tree: Any) -> list[tuple[Any, Any]]:
    """The items of a pattern, groups opened."""
    found: list[tuple[Any, Any]] = []
    for code, argument in tree:
        if code is codes.SUBPATTERN:
            found += _flat(argument[-1])
        else:
            found.append((code, argument))
    return found


def _open_repeats(tree: Any) -> int:
    """How many repeats without a fixed count there are, those of alternatives counted by the largest."""
    count = 0
    for code, argument in tree:
        if code in _REPEATS and argument[1] - argument[0] > 20:
            count += 1
        if code is codes.BRANCH:
            count += max(map(_open_repeats, argument[1]))
        else:
            count += sum(map(_open_repeats, _children(argument)))
    return count
