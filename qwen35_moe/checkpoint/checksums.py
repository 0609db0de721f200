"""Checksums of files and tensors on disk, compared with the expected ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import Qwen35Error
from ..untrusted import read_bytes
from .folder import Folder
from .reader import Reader

SHA256 = re.compile(r"[0-9a-f]{64}")
HASHED_AT_ONCE = 8 << 20


@dataclass(frozen=True)
class Checksum:
    """sha256 of a tensor or a file: as found ("" if there is no such thing), as expected ("" if nothing is known)."""

    name: str
    found: str
    expected: str
    source: str

    @property
    def ok(self) -> bool:
        return not self.expected or self.found == self.expected


def verify_files(folder: Folder) -> Iterator[Checksum]:
    """Each file against the sha256 that the hub's own download left: its cache names a file by its sha256 and links to
    it; `hf download --local-dir` writes it down beside the file."""
    for file in (header.file for header in folder.headers):
        expected, source = file.resolve().name, "name in the hub's cache"
        if not SHA256.fullmatch(expected):
            note = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
            lines = read_bytes(note).decode("utf-8", "replace").split() if note.is_file() else []
            expected = next((line for line in lines if SHA256.fullmatch(line)), "")
            source = str(note) if expected else "nothing known"
        with open(file, "rb") as handle:
            yield Checksum(file.name, hashlib.file_digest(handle, "sha256").hexdigest(), expected, source)


def verify_manifest(folder: Folder, reader: Reader, manifest: Path) -> Iterator[Checksum]:
    """Against lines `sha256 ... name`, where a name is a tensor's (as its file has it) or a file's. As sha256sum writes
    them, with two characters after the sum, a name may hold spaces. Lines that begin with # say nothing."""
    try:
        lines = [line.strip() for line in read_bytes(manifest).decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise Qwen35Error("cannot read the manifest", where=manifest, found=error) from error
    said = [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
    if not said:
        raise Qwen35Error("an empty manifest verifies nothing", where=manifest, expected="lines `sha256 ... name`")
    tensors = {stored.raw_name: stored for stored in folder.tensors.values()}
    root = folder.path if folder.path.is_dir() else folder.path.parent

    def is_file(name: str) -> bool:
        return Path(name).name == name and (root / name).is_file()

    for number, line in said:
        expected, rest = line[:64].lower(), line[64:]
        if not SHA256.fullmatch(expected) or not rest[:1].isspace() or not rest.strip():
            where = f"{manifest}:{number}"
            raise Qwen35Error("bad line in the manifest", where=where, expected="sha256 ... name", found=line[:200])
        last = rest.split()[-1].removeprefix("*")
        name = rest[2:] if rest[1] in " *" and (rest[2:] in tensors or is_file(rest[2:])) else last
        found = ""
        if (stored := tensors.get(name)) is not None:
            digest, buffer = hashlib.sha256(), memoryview(bytearray(min(HASHED_AT_ONCE, stored.nbytes)))
            for begin in range(0, stored.nbytes, HASHED_AT_ONCE):
                piece = buffer[: min(HASHED_AT_ONCE, stored.nbytes - begin)]
                reader.read(stored, begin, piece)
                digest.update(piece)
            found = digest.hexdigest()
        elif is_file(name):
            with open(root / name, "rb") as handle:
                found = hashlib.file_digest(handle, "sha256").hexdigest()
        yield Checksum(name, found, expected, str(manifest))
