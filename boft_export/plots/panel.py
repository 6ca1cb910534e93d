"""What all plots have in common: their colours and style, and how numbers stand on them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

INK, MUTED, LINE, PAPER = "#1d232b", "#5c6673", "#dfe3e8", "#ffffff"
GOOD, DOUBTFUL, BAD = "#1a7f4b", "#8a6100", "#c4283a"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlepad": 18,
    "axes.unicode_minus": True,
    "figure.facecolor": PAPER,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "boft-export",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class Panel:
    """A plot.

    Attributes:
        name: What it is called among the panels; letters and numbers only.
        title: What it shows.
        caption: How to read it, in a line.
        draw: Draws it.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Axes], None]


@contextmanager
def own_style() -> Iterator[None]:
    """Draw the same whatever the user's own settings of matplotlib are."""
    with mpl.rc_context(), warnings.catch_warnings():
        # In a name that the font can't write, a box is as good as it gets.
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        defaults: Any = {k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"}
        mpl.rcParams.update(defaults)
        mpl.rcParams.update(_STYLE)
        yield


def power(value: float) -> str:
    """Return a power of ten as it is printed: 10⁻⁴."""
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)


def number(value: float) -> str:
    """Return a figure of any size, to four digits."""
    return f"{value:.4g}".replace("-", "−")


def say(axes: Axes, text: str) -> None:
    """Write what is to be said instead of a plot."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED)


def powers(first: int, most: float, count: int) -> list[float]:
    """Return powers of ten from a first one up to ``most``, at most ``count`` of them, evenly spread."""
    last = math.floor(math.log10(most))
    step = max(2, math.ceil((last - first + 1) / count))
    return [10.0**i for i in range(first, last + 1, step)]
