"""A validation as plots: how orthogonal each layer is, how far it turns, what it changed, and what rounding took."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from boft_export.plots.panel import BAD, INK, MUTED, Panel, power
from boft_export.plots.validation_data import Part, Shown

_LEAST_DISTANCE = 1e-17
# More marks than this are drawn as an image: a page should stay small.
_MOST_MARKS = 2000
# Among more lines than this, no single one can be followed.
_MOST_LINES = 60

Figure = Callable[[Part], float | None]


@dataclass(frozen=True)
class Lines:
    """What stands beside each part's own figure, as a short line.

    Attributes:
        value: Where it stands; None where there is none.
        colour: Its colour.
        style: matplotlib's name of its style.
    """

    value: Figure
    colour: str = INK
    style: str = "--"


def validation_panels(shown: Shown) -> list[Panel]:
    """Return the plots for which there is something to show."""
    found = [
        _side_by_side(
            shown,
            "distance",
            "Distance from orthogonal, |RᵀR − I|",
            "The 2-norm, for each adapter layer. Dashed: the most that its check allows; thick and grey: what its "
            "parametrisation has by design, where that is not 0.",
            shown.layers,
            _distance,
            (Lines(lambda p: p.facts["expected_residual"] or None, MUTED, "-"), Lines(lambda p: p.limit)),
            least=_LEAST_DISTANCE,
        ),
        _spectrum(shown),
        _side_by_side(
            shown,
            "change",
            "Change of the weights, |W′ − W| / |W| (%)",
            "For each tensor: of the exact merge; without an adapter, of the one that is there.",
            shown.tensors,
            lambda p: _times(p.facts["relative_change"], 100),
        ),
        _side_by_side(
            shown,
            "rounding",
            "Rounding loss, |error| / |W′ − W|",
            "How much of a tensor's change its dtype cannot hold. At 1, rounding is as large as what was learned.",
            shown.tensors,
            lambda p: p.facts["rounding_loss"],
            least=0.0,
        ),
        _side_by_side(
            shown,
            "gram",
            "Distance from a rotated and scaled base",
            "How far the Gram matrix of a tensor's rows is from that of a rotated base, relative. Dashed: what "
            "rounding alone makes of it.",
            shown.tensors,
            lambda p: p.facts["residual"],
            (Lines(lambda p: p.facts["noise"] or None),),
            least=_LEAST_DISTANCE,
        ),
    ]
    return [panel for panel in found if panel is not None]


def _distance(layer: Part) -> float | None:
    values = layer.facts["smallest_singular_value"], layer.facts["largest_singular_value"]
    return None if None in values else max(abs(v * v - 1) for v in values)


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


# Figures of parts side by side


def _side_by_side(
    shown: Shown,
    name: str,
    title: str,
    caption: str,
    parts: Sequence[Part],
    value: Figure,
    lines: Sequence[Lines] = (),
    least: float | None = None,
) -> Panel | None:
    """Return a plot with a point for each part, by kind; None without figures.

    Args:
        shown: The document.
        name: The panel's name.
        title: Its title.
        caption: Its caption.
        parts: The layers or tensors.
        value: The figure of a part.
        lines: What stands beside it.
        least: For a log scale: what is less stands on its edge. None for a scale from 0.
    """
    if all(value(part) is None for part in parts):
        return None
    draw = partial(_draw_side_by_side, shown=shown, parts=parts, value=value, lines=lines, least=least)
    return Panel(name, title, caption, draw)


def _draw_side_by_side(
    axes: Axes, shown: Shown, parts: Sequence[Part], value: Figure, lines: Sequence[Lines], least: float | None
) -> None:
    beside = [v for line in lines for p in parts if (v := line.value(p)) is not None]
    place = _frame(axes, [v for p in parts if (v := value(p)) is not None], beside, least)
    many = len(parts) > _MOST_MARKS
    gap = max(1, len(parts) // 30)
    start = 0
    for kind, members in shown.by_kind(parts).items():
        if not members:
            continue
        found = [(start + i, place(v), p.failed) for i, p in enumerate(members) if (v := value(p)) is not None]
        axes.plot(
            [x for x, _, _ in found],
            [y for _, y, _ in found],
            color=shown.colours[kind],
            marker="o",
            markersize=5 if len(parts) <= 100 else 3,
            linewidth=0.6,
            rasterized=many,
        )
        failed = [(x, y) for x, y, bad in found if bad]
        axes.plot(
            [x for x, _ in failed],
            [y for _, y in failed],
            color=BAD,
            marker="x",
            markersize=8,
            markeredgewidth=2,
            linestyle="none",
            zorder=4,
            rasterized=many,
        )
        for line in lines:
            _draw_lines(axes, line, start, members, place)
        start += len(members) + gap
    axes.set_xlim(-gap, max(start, 1))
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xlabel("by kind of module, each from the first layer to the last")


def _draw_lines(axes: Axes, line: Lines, start: int, members: Sequence[Part], place: Callable[[float], float]) -> None:
    """Draw a line through each part's place, level where values are the same."""
    xs: list[float] = []
    ys: list[float] = []
    for i, part in enumerate(members):
        value = line.value(part)
        level = math.nan if value is None else place(value)
        if ys and ys[-1] == level:
            xs[-1] = start + i + 0.5
        else:
            xs += [start + i - 0.5, start + i + 0.5]
            ys += [level, level]
    axes.plot(xs, ys, color=line.colour, linestyle=line.style, linewidth=1.2 if line.colour == INK else 3, zorder=1.5)


def _frame(
    axes: Axes, values: Sequence[float], beside: Sequence[float], least: float | None
) -> Callable[[float], float]:
    """Set up the vertical axis for all values, and return where one stands on it."""
    if least is None:
        axes.set_ylim(0, 1.06 * max([*values, *beside]) or 1)
        return float
    positive = [v for v in [*values, *beside] if v > 0]
    bottom = max(least, min(positive, default=1e-3))
    most = max([*positive, 100 * bottom])
    # At least two powers of ten are marked.
    low = 10.0 ** math.floor(math.log10(bottom))
    high = max(3 * most, 150 * low)
    axes.set_yscale("log")
    axes.set_ylim(low / 2, high)
    first, last = round(math.log10(low)), math.floor(math.log10(high))
    marked = [10.0**i for i in range(first, last + 1, math.ceil((last - first + 1) / 7))]
    below = any(v < low for v in values)
    axes.yaxis.set_major_locator(FixedLocator(marked))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: ("≤" if below and v < 2 * low else "") + power(v)))
    return lambda v: max(v, low)


# The spectrum


def _spectrum(shown: Shown) -> Panel | None:
    if not any(a is not None for p in shown.layers for a in p.facts["angles"]):
        return None
    several = " Thin: a layer; thick: the median of a kind." if len(shown.layers) > len(shown.colours) else ""
    return Panel(
        "spectrum",
        "Rotation angles, as a spectrum (degrees)",
        "By which angle each layer's rotation turns its planes, sorted: at 50 %, half of the planes turn by less."
        + several,
        partial(_draw_spectrum, shown=shown),
    )


def _draw_spectrum(axes: Axes, shown: Shown) -> None:
    many = len(shown.layers) > _MOST_LINES
    most = 0.0
    for kind, layers in shown.by_kind(shown.layers).items():
        curves = [_curve(layer.facts["angles"]) for layer in layers if layer.facts["angles"]]
        if not curves:
            continue
        colour = shown.colours[kind]
        # One line with gaps: far less to write than a line for each.
        points = [point for curve in curves for point in (*curve, (math.nan, math.nan))]
        alone = len(curves) == 1
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour,
            linewidth=1.6 if alone else 0.7,
            alpha=1 if alone else 0.25 if many else 0.5,
            rasterized=len(shown.layers) > _MOST_MARKS // 4,
        )
        if not alone and len({len(c) for c in curves}) == 1:
            middle = [(column[0][0], _median([y for _, y in column])) for column in zip(*curves, strict=True)]
            axes.plot([x for x, _ in middle], [y for _, y in middle], color=colour, linewidth=2.2, zorder=3)
        most = max([most, *(y for _, y in points if not math.isnan(y))])
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1.06 * most or 1)
    axes.set_xlabel("share of planes (%)")


def _median(values: Sequence[float]) -> float:
    return median([v for v in values if not math.isnan(v)] or [math.nan])


def _curve(angles: Sequence[float | None]) -> list[tuple[float, float]]:
    """Return a layer's quantiles as points: share of planes in percent, angle in degrees."""
    last = max(len(angles) - 1, 1)
    return [(100 * i / last, math.nan if a is None else math.degrees(a)) for i, a in enumerate(angles)]
