"""`qwen35-moe trace` of a small checkpoint, for tests of what it leaves on disk, and of what a kill leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import contents

from qwen35_moe.cli.main import main
from qwen35_moe.trace.file import Trace

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], [5, 5, 5, 6]]
GROUPS = ("--batch", "1")
FEW = ("--taps", "layer_output_sum", "--no-envelope")


class Traces:
    """traces(name of --out, ids, options) runs the command, which must work, and returns what it prints."""

    def __init__(self, weights: Path, root: Path, capsys: pytest.CaptureFixture[str]):
        self.weights, self.root, self.capsys = weights, root, capsys

    def command(self, out: str, ids: Any, *more: str) -> list[str]:
        (self.root / "ids.json").write_text(json.dumps(ids))
        given = ["--ids", str(self.root / "ids.json"), "--out", str(self.root / out)]
        return ["trace", str(self.weights), *given, "--quiet", *more]

    def __call__(self, out: str, ids: Any, *more: str) -> str:
        code, said = main(self.command(out, ids, *more)), "".join(self.capsys.readouterr())
        assert code == 0, said
        return said

    def refuses(self, words: str, out: str, ids: Any, *more: str) -> None:
        """The command must not work, and say these words."""
        code, said = main(self.command(out, ids, *more)), self.capsys.readouterr().err
        assert code == 2 and words in said and "a bug" not in said, said

    def files(self, out: str) -> dict[str, bytes]:
        return contents(self.root / out)

    def open(self, out: str) -> Trace:
        return Trace.open(self.root / out)


class Stop(BaseException):
    """A kill at a chosen moment: nothing is cleaned up."""


@contextmanager
def stopping(owner: Any, name: str, calls: int, error: BaseException | None = None, after: bool = False) -> Iterator:
    """A kill of the block where `owner.name` is called once more after so many calls; after: when the last of these is
    done. error: is raised there instead, and the block must deal with it."""
    real, left = getattr(owner, name), [calls]

    def dying(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error or Stop
        found = real(*args, **options)
        if after and not left[0]:
            raise Stop
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, dying)
        if error is None:
            with pytest.raises(Stop):
                yield
        else:
            yield
