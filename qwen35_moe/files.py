"""Files that are written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_whole(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, under its name once all of it is there. Whoever may read other new files may read it, too:
    safetensors alone leaves it to its owner."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)
    temporary.chmod(mode)
    temporary.replace(path)
