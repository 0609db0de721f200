"""The recipes and the builder, by the package's own name: `qwen35_moe.weights.build`.

A wheel holds the repository's folder `weights/` as a subpackage in the place of this file. A checkout has that folder
beside the package, and this file leads there.
"""

from __future__ import annotations

from pathlib import Path

__path__ = [str(Path(__file__).parent.parent / "weights")]
