"""What the notebooks share: one look for all figures, a scratch folder, and the check of a reader's answer."""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from cycler import cycler

# The notebooks run from a checkout, whose `weights` folder is not part of the installed package.
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

# Okabe and Ito's colours, told apart by all kinds of colour vision, each with a line style and a marker for print.
BLACK, BLUE, ORANGE, GREEN, RED, SKY = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
PURPLE, GREY = "#CC79A7", "#8C8C8C"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, BLACK, SKY)
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # monotone in grey; two hues that no colour vision confuses

INLINE = "inline" in matplotlib.get_backend()
if not INLINE:
    matplotlib.use("agg")
plt.rcParams.update(
    {
        "figure.figsize": (7.2, 3.2),
        "figure.dpi": 88,
        "figure.constrained_layout.use": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#E3E3E3",
        "legend.frameon": False,
        "image.cmap": SEQUENTIAL,
        "image.interpolation": "nearest",
        "lines.markersize": 4,
        "axes.prop_cycle": cycler(color=COLOURS)
        + cycler(linestyle=["-", "--", "-.", ":", "-", "--", "-."])
        + cycler(marker=list("osD^vPX")),
    }
)


def show() -> None:
    """Show the figures in a notebook; in a script draw them and let them go."""
    for figure in map(plt.figure, plt.get_fignums()):
        if INLINE:
            from IPython.display import display

            display(figure, metadata={"image/png": {"alt": in_words(figure)}})
        else:
            figure.canvas.draw()
    plt.close("all")


def in_words(figure: plt.Figure) -> str:
    """The alternative text of a figure: its titles, what its axes are, the names in its legends and on its drawing."""
    parts = []
    for ax in figure.axes:
        x, y, legend = ax.get_xlabel(), ax.get_ylabel(), ax.get_legend()
        if ax.get_label() == "<colorbar>":
            parts.append(f"colour: {y or x}")
            continue
        names = [text.get_text() for text in (legend.get_texts() if legend else ax.texts)]
        axes = " over ".join(label for label in (y, x) if label)
        said = [ax.get_title(loc="left") or ax.get_title(), axes, ", ".join(name for name in names if name.strip())]
        parts.append(": ".join(text for text in said if text))
    return " ".join("; ".join([figure.get_suptitle(), *parts] if figure.get_suptitle() else parts).split())


def page(text: str, folder: Path) -> None:
    """Show a long text below a cell, without the name of a scratch folder."""
    if INLINE:
        from IPython.display import display

        display({"text/plain": text.replace(f"{folder}/", "")}, raw=True)


def scratch() -> Path:
    """A temporary folder, removed when Python ends."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def picture(
    ax: plt.Axes, values: Any, title: str = "", x: str = "", y: str = "", bar: str = "", **options: Any
) -> None:
    """A matrix as an image, with names on both axes and a named colour bar."""
    image = ax.imshow(torch.as_tensor(values).numpy(), aspect=options.pop("aspect", "auto"), **options)
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(False)
    if bar:
        ax.figure.colorbar(image, ax=ax, label=bar)


def attempt(answer: Any, right: Callable[[Any], bool], hint: str) -> None:
    """Tells the reader whether `answer` is right. None is "not tried yet", which passes, so that a notebook runs."""
    if answer is None:
        print("Not tried yet: replace None.")
        return
    assert right(answer), f"not yet. {hint}"
    print("Right.")
