"""Files that are written whole or not at all, and directories with a single writer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import Qwen35Error
from ..untrusted import tensor_file

try:
    import fcntl
except ImportError:  # not on Windows, where nobody is kept out
    fcntl = None  # type: ignore[assignment]


_claimed: dict[Path, int] = {}  # directories, and their descriptors


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Inside of the block no other process can claim this directory. It is made if it is not there; one that was made
    and stays empty is removed again, with its parents. On a file system without locks nobody is kept out.
    Error: another process has claimed it, or it cannot be written to.
    """
    path = path.resolve()
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError("no permission to write there")
        descriptor = None if fcntl is None else os.open(path, os.O_RDONLY)
    except OSError as error:
        raise Qwen35Error("cannot write here", where=path, found=error.strerror or error) from error
    with ExitStack() as after:
        if descriptor is not None:
            after.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                do = "wait until it is done, or write to another folder"
                raise Qwen35Error("another process is writing here", where=path, do=do) from None
            except OSError:
                pass
            _claimed[path] = descriptor
            after.callback(_claimed.pop, path)
        try:
            yield
        finally:
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()


def check_claim(directory: Path) -> None:
    """Error if a claimed directory was deleted: a new one of that name may belong to another process."""
    descriptor = _claimed.get(directory.resolve())
    if descriptor is None or (directory.exists() and os.path.samestat(os.fstat(descriptor), directory.stat())):
        return
    raise Qwen35Error("deleted while this was writing to it", where=directory, do="run again")


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to `path` when all is written. After an error nothing is left of it.

    A device (/dev/stdout) is written to directly. For a link, the file that it points to is replaced.
    """
    if path.exists() and (not path.is_file() or path.is_relative_to("/dev")):
        yield path
        return
    path = path.resolve()
    check_claim(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def file_sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, known: str, do: str) -> None:
    """Error if the bytes of a file are no longer those that were written."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise Qwen35Error("cannot read the file", where=path, found=error.strerror or error, do=do) from error
    if found != known:
        what = "the file is damaged: its checksum is another"
        raise Qwen35Error(what, where=path, expected=f"sha256 {known}", found=found, do=do)


def save_checked(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all, whose metadata holds the checksum of all else that is in it."""
    with whole(path) as temporary:
        save(tensors, temporary, checked(tensors, metadata or {}))


def checked(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata, with the checksum of all else."""
    return {**metadata, "sha256": tensors_sha256(tensors, metadata)}


def read_checked(path: Path, do: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of such a file. Error: it cannot be read, or its checksum is another."""
    with tensor_file(path, do) as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    known = metadata.pop("sha256", "none")
    if (found := tensors_sha256(tensors, metadata)) != known:
        what = "the file is damaged: its checksum is another"
        raise Qwen35Error(what, where=path, expected=f"sha256 {known}", found=found, do=do)
    return metadata, tensors


def tensors_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """The checksum of tensors by name: of their names, dtypes, shapes and bytes, and of metadata."""
    digest = hashlib.sha256("".join(f"{key}={value}\n" for key, value in sorted((metadata or {}).items())).encode())
    for name in sorted(tensors):
        x = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, with the permissions of other new files (safetensors alone makes it private to its owner)."""
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    path.chmod(mode)
