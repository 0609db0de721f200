"""Execute the notebooks and write each beside its source:  python -m notebooks.build [01 05 ...]"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).resolve().parent
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}


def sources() -> list[Path]:
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def read(source: Path) -> NotebookNode:
    """The source as a notebook, with nothing in it that changes from run to run."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", nbformat.from_dict({})
        cell.source = cell.source.strip("\n")  # of a cell that begins with `def`, of which a module has two more lines
    return notebook


def execute(source: Path) -> Path:
    notebook = read(source)
    # The folder of the notebook is where Jupyter would start it, too. No timing: it would be new every time.
    NotebookClient(notebook, timeout=300, record_timing=False, resources={"metadata": {"path": str(HERE)}}).execute()
    notebook.metadata = nbformat.from_dict(METADATA)  # the kernel has added its version
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data = {"image/png": small(output.data["image/png"])}  # not "<Figure size ... with 2 Axes>"
    target = source.with_suffix(".ipynb")
    nbformat.write(notebook, target)
    return target


def small(png: str) -> str:
    """The same picture without transparency and metadata, packed as small as PNG goes."""
    picture, out = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    picture.convert("RGB").save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


if __name__ == "__main__":
    for source in sources():
        if not sys.argv[1:] or source.name[:2] in sys.argv[1:]:
            target = execute(source)
            print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")
