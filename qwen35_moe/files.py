"""Files that are written whole or not at all, and directories that one process writes to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from .errors import Qwen35Error

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept out
    fcntl = None  # type: ignore[assignment]


class Claim:
    """A directory, made if it is not there, that no other process can claim until this is released, or its process has
    ended in whichever way. Nothing is written to it; if it was made and stays empty, it is removed. wait: until it is
    free. Error: claimed by another, or nobody may write there.

    Where a file system knows no locks, nobody is kept out.
    """

    def __init__(self, path: Path, wait: bool = False):
        self._descriptor, self._path, self._made = -1, path, not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write there")
            if fcntl is None:
                return
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Qwen35Error("cannot write here", where=path, found=error.strerror or error) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(self._descriptor)
            do = "wait until it is done, or write to another directory"
            raise Qwen35Error("another process is writing here", where=path, do=do) from None
        except OSError:
            pass

    def release(self) -> None:
        if self._made:
            with suppress(OSError):  # not empty
                self._path.rmdir()
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another name to write to, which becomes `path` once all of it is there. After an error nothing is left of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file. Who may read other new files may read it, too: safetensors alone leaves it to its owner."""
    with whole(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
        temporary.chmod(mode)
