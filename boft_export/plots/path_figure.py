"""A measured path as plots: for each output, how far the layers have turned, and what it did to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from boft_export.plots.module_names import KIND_COLOURS, shortened
from boft_export.plots.panel import INK, MUTED, PAPER, Panel, number, own_style, power, powers, say
from boft_export.plots.path_data import (
    CHANGE,
    ENERGY,
    RESIDUAL,
    RMS_ANGLE,
    Layer,
    Quantity,
    Sweep,
)

# A deviation of the energy that storing weights in 16 bits can bring about by itself.
ENERGY_ROUNDING = 1e-4
# A residual that float64 can bring about by itself in a product of factors.
RESIDUAL_ROUNDING = 1e-13

_LEAST_RESIDUAL = 1e-17
_MOST_METRICS = 12
_MOST_TICKS = 11
# More marked points than this would run into each other.
_MOST_MARKS = 30
# Among more lines than this, no single one can be followed, so each kind gets a median too.
_MOST_LINES = 60
# With fewer layers, the lines say all that a heat map would.
_HEAT_MAP_LAYERS = 8
_PANEL_INCHES = (4.8, 3.0)


def draw(document: Mapping[str, Any], columns: int = 2) -> Figure:
    """Return all plots of a document as one figure.

    Args:
        document: From ``path_document``.
        columns: How many plots stand side by side.
    """
    sweep = Sweep.of(document)
    shown = evaluation_panels(sweep) + layer_panels(sweep)
    columns = max(1, min(columns, len(shown)))
    rows = max(1, math.ceil(len(shown) / columns))
    with own_style():
        size = (_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * rows + 0.9)
        figure = Figure(size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        title = f"{sweep.base} with {', '.join(sweep.adapters)}: {sweep.path} path"
        figure.suptitle(shortened(title, 44 * columns), parse_math=False, x=0.02, ha="left", fontsize=12)
        grid = figure.add_gridspec(rows, columns)
        for i, panel in enumerate(shown):
            row, column = divmod(i, columns)
            # The last one takes what is left of its row.
            axes = figure.add_subplot(grid[row, column:] if i + 1 == len(shown) else grid[row, column])
            panel.draw(axes)
            axes.set_title(shortened(panel.title, 42), parse_math=False)
        if sweep.layers and shown:
            _legend(figure, sweep, columns)
        if not shown:
            figure.text(0.5, 0.4, "Nothing was measured.", ha="center", color=MUTED)
    return figure


def png_bytes(document: Mapping[str, Any]) -> bytes:
    """Return all plots of a document as a PNG image."""
    figure, file = draw(document), BytesIO()
    with own_style():
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    return file.getvalue()


def evaluation_panels(sweep: Sweep) -> list[Panel]:
    """Return a plot for each figure of the outputs' evaluations, up to a dozen."""
    return [
        Panel(
            f"metric{i}",
            name,
            "Each point is an output's own figure; the vertical axis shows no more than their range."
            if len(sweep.labels) > 1
            else "The output's own figure.",
            partial(_draw_metric, sweep=sweep, name=name),
        )
        for i, name in enumerate(sweep.metrics[:_MOST_METRICS])
    ]


def layer_panels(sweep: Sweep) -> list[Panel]:
    """Return the plots of what was measured of the layers; none without layers."""
    if not sweep.layers or not sweep.labels:
        return []
    found = [
        Panel(
            "angle",
            "Rotation angle, rms (degrees)",
            "By how much a layer's rotation turns, root mean square over all directions; "
            "a straight line is an even pace.",
            partial(_draw_layers, sweep=sweep, quantity=RMS_ANGLE),
        ),
        Panel(
            "change",
            "Change of the weights (%)",
            "How far a weight has moved from the base's, |W(α) − W| / |W|, scales included.",
            partial(_draw_layers, sweep=sweep, quantity=CHANGE),
        ),
        Panel(
            "energy",
            "Hyperspherical energy ratio − 1",
            f"Rotations stay in the band, ±{power(ENERGY_ROUNDING)}, which rounding to 16 bits explains; "
            "beyond it, the angles between neurons have changed.",
            partial(_draw_layers, sweep=sweep, quantity=ENERGY, frame=_frame_energy),
        ),
        Panel(
            "residual",
            "Distance from orthogonal, max |RᵀR − I|",
            f"Rotations stay in the band, up to {power(RESIDUAL_ROUNDING)}, which float64's rounding explains; "
            "what lies above it also stretches.",
            partial(_draw_layers, sweep=sweep, quantity=RESIDUAL, frame=_frame_residual),
        ),
    ]
    if len(sweep.layers) >= _HEAT_MAP_LAYERS and len(sweep.labels) > 1:
        found.append(
            Panel(
                "map",
                "Rotation angle by layer, rms (degrees)",
                "A row for each layer, by kind of module, each kind from the first layer down to the last; "
                "a column for each output.",
                partial(_draw_map, sweep=sweep),
            )
        )
    return found


# What all plots have in common


def _frame_outputs(axes: Axes, sweep: Sweep) -> None:
    """Set up the horizontal axis: alpha, with base and tuned model marked, or a place for each output."""
    where = sweep.positions
    low, high = min(where), max(where)
    pad = 0.05 * (high - low) or 0.5
    axes.set_xlim(low - pad, high + pad)
    if not sweep.is_scale:
        axes.set_xlabel("alpha of each adapter")
        _name_places(axes, where, sweep.labels)
        return
    axes.set_xlabel("alpha")
    if len(where) <= _MOST_TICKS and all(b - a >= 0.07 * (high - low) for a, b in pairwise(where)):
        _name_places(axes, where, [number(a) for a in where])
    for alpha, name in ((0, "base"), (1, "tuned")):
        if low <= alpha <= high:
            axes.axvline(alpha, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0.5)
            axes.text(alpha, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", color=MUTED, fontsize=9)


def _name_places(axes: Axes, where: Sequence[float], labels: Sequence[str], most: int = _MOST_TICKS) -> None:
    """Write labels below their places, evenly thinned to about ``most``, with both ends where that works out."""
    least = math.ceil(len(where) / most)
    step = next((s for s in range(least, 2 * least) if (len(where) - 1) % s == 0), least)
    shown = [shortened(label, 13) for label in labels[::step]]
    slanted = sum(map(len, shown)) > 40
    axes.xaxis.set_major_locator(FixedLocator(where[::step]))
    for text in axes.set_xticklabels(shown):
        text.set(parse_math=False)
        if slanted:
            text.set(rotation=40, ha="right", rotation_mode="anchor")


def _legend(figure: Figure, sweep: Sweep, columns: int) -> None:
    handles = [Line2D([], [], color=colour, linewidth=3) for colour in sweep.colours.values()]
    names = [shortened(kind, 30) for kind in sweep.colours]
    if len(sweep.layers) > 1:
        handles.append(Line2D([], [], color=INK, linewidth=2.4, marker="o", markersize=4.5))
        names.append("median of layers")
    legend = figure.legend(
        handles,
        # A name that begins with "_" would be left out, so names come later.
        [str(i) for i in range(len(names))],
        loc="outside lower left",
        ncols=max(1, 56 * columns // (max(map(len, names)) + 7)),
        handlelength=1.4,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)


# The plots


def _draw_metric(axes: Axes, sweep: Sweep, name: str) -> None:
    found = [(x, v) for x, e in zip(sweep.positions, sweep.evaluations, strict=True) if (v := e.get(name)) is not None]
    _frame_outputs(axes, sweep)
    if not found:
        say(axes, "no figure")
        return
    where, values = [x for x, _ in found], [v for _, v in found]
    if len(sweep.labels) == 1:
        bars = axes.bar(where, values, width=0.2, color=KIND_COLOURS[0])
        axes.bar_label(bars, [number(values[0])], padding=3, fontsize=9)
        axes.margins(y=0.18)
        return
    axes.plot(where, values, color=INK, linewidth=2, marker="o", markersize=5 if len(values) <= _MOST_MARKS else 0)
    middle, spread = (min(values) + max(values)) / 2, max(values) - min(values)
    # Figures that are equal but for rounding are drawn as equal.
    half = 0.8 * spread if spread > 1e-6 * abs(middle) else 0.1 * abs(middle) or 1
    axes.set_ylim(middle - half, middle + half)
    _write_values(axes, where, values)


def _write_values(axes: Axes, where: Sequence[float], values: Sequence[float]) -> None:
    """Write values at their points: the extreme ones, the ends, then as many others as there is room for."""
    left, right = map(float, axes.get_xlim())
    room = 0.17 * (right - left)
    written: list[float] = []
    last = len(values) - 1
    others = range(len(values)) if len(values) <= _MOST_MARKS else ()
    for i in (values.index(max(values)), values.index(min(values)), 0, last, *others):
        if any(abs(where[i] - x) < room for x in written):
            continue
        written.append(where[i])
        # Where the line leads up or down on either side, the text is on the other; at the edges, it stays inside.
        before = values[max(i - 1, 0)] - values[i]
        after = values[min(i + 1, last)] - values[i]
        below = max(before, after) > 0 and min(before, after) >= 0
        edge = (where[i] < left + room) - (where[i] > right - room)
        aside = edge or (i == 0) - (i == last) or (before > 0 > after) - (before < 0 < after)
        axes.annotate(
            number(values[i]),
            (where[i], values[i]),
            xytext=(4 * aside, -6 if below else 6),
            textcoords="offset points",
            ha=("center", "left", "right")[aside],
            va="top" if below else "bottom",
            fontsize=9,
        )


def _draw_layers(
    axes: Axes,
    sweep: Sweep,
    quantity: Quantity,
    frame: Callable[[Axes, Sequence[float]], Callable[[float], float]] | None = None,
) -> None:
    """Draw a quantity of all layers: a line for each along alpha, or a point for each where there is one output."""
    seen = [v for i in range(len(sweep.labels)) for v in sweep.column(quantity, i)]
    if not seen:
        say(axes, "no figure")
        return
    shown = (frame or _frame_from_zero)(axes, seen)
    if len(sweep.labels) == 1:
        _draw_points(axes, sweep, quantity, shown)
        return
    _frame_outputs(axes, sweep)
    many = len(sweep.layers) > _MOST_LINES
    for kind, layers in sweep.groups().items():
        # One line with gaps for all layers of a kind: far less to write than a line for each.
        xs: list[float] = []
        ys: list[float] = []
        for layer in layers:
            points = zip(sweep.positions, layer.points, strict=True)
            line = [(x, v) for x, p in points if (v := quantity(p)) is not None]
            xs += [*(x for x, _ in line), math.nan]
            ys += [*(shown(v) for _, v in line), math.nan]
        colour = sweep.colours[kind]
        mark = "o" if len(sweep.layers) == 1 else ""
        axes.plot(xs, ys, color=colour, linewidth=0.7 if many else 1.2, alpha=0.3 if many else 0.75, marker=mark)
        if many:
            axes.plot(*_medians(sweep, layers, quantity, shown), color=colour, linewidth=1.8, zorder=2.5)
    if len(sweep.layers) > 1:
        middle = _medians(sweep, sweep.layers, quantity, shown)
        size = 4.5 if len(sweep.labels) <= _MOST_MARKS else 0
        axes.plot(*middle, color=INK, linewidth=2.4, marker="o", markersize=size, zorder=3)


def _medians(
    sweep: Sweep, layers: Sequence[Layer], quantity: Quantity, shown: Callable[[float], float]
) -> tuple[list[float], list[float]]:
    """Return where outputs are, and the median of layers there, for the outputs that have one."""
    columns = [
        [v for layer in layers if (v := quantity(layer.points[i])) is not None] for i in range(len(sweep.labels))
    ]
    found = [(x, shown(median(values))) for x, values in zip(sweep.positions, columns, strict=True) if values]
    return [x for x, _ in found], [y for _, y in found]


def _draw_points(axes: Axes, sweep: Sweep, quantity: Quantity, shown: Callable[[float], float]) -> None:
    """Draw one output: layers side by side in their order, by kind."""
    start = 0
    for kind, layers in sweep.groups().items():
        found = [(start + i, v) for i, x in enumerate(layers) if (v := quantity(x.points[0])) is not None]
        size = 5 if len(sweep.layers) <= 100 else 3
        axes.plot(
            [x for x, _ in found],
            [shown(v) for _, v in found],
            color=sweep.colours[kind],
            marker="o",
            markersize=size,
            linestyle="none",
        )
        start += len(layers) + max(1, len(sweep.layers) // 30)
    values = sweep.column(quantity, 0)
    if len(values) > 1:
        axes.axhline(shown(median(values)), color=INK, linewidth=1.6)
    axes.set_xlim(min(-1, -start / 20), max(start, 1))
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xlabel(f"layers at alpha {sweep.labels[0]}, by kind", parse_math=False)


def _draw_map(axes: Axes, sweep: Sweep) -> None:
    """Draw a heat map with a strip of the kinds' colours beside it."""
    groups = sweep.groups()
    gap = max(1, len(sweep.layers) // 50)
    rows: list[list[float]] = []
    bands: list[tuple[str, float, float]] = []
    for kind, layers in groups.items():
        if rows:
            rows += [[math.nan] * len(sweep.labels)] * gap
        bands.append((kind, len(rows), len(rows) + len(layers)))
        rows += [[v if (v := RMS_ANGLE(p)) is not None else math.nan for p in layer.points] for layer in layers]
    values = np.ma.masked_invalid(rows)
    count = len(sweep.labels)
    most = float(values.max()) if values.count() else 0.0
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="none",
        cmap="viridis",
        vmin=0,
        vmax=most or 1,
        extent=(-0.5, count - 0.5, len(rows), 0),
    )
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xlim(-0.5 - 0.045 * count, count - 0.5)
    for kind, top, bottom in bands:
        axes.fill_betweenx([top, bottom], -0.5 - 0.04 * count, -0.5 - 0.012 * count, color=sweep.colours[kind], lw=0)
    _name_places(axes, range(count), [number(a[0]) for a in sweep.alphas] if sweep.is_scale else sweep.labels, most=7)
    axes.set_xlabel("alpha" if sweep.is_scale else "alpha of each adapter")
    _name_bands(axes, bands, len(rows))
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=30)
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)


def _name_bands(axes: Axes, bands: Sequence[tuple[str, float, float]], height: int) -> None:
    """Write the kinds beside their rows, those of few rows only where there is room."""
    places: list[tuple[float, str]] = []
    for kind, top, bottom in sorted(bands, key=lambda b: b[1] - b[2]):
        middle = (top + bottom) / 2
        if all(abs(middle - other) >= 0.11 * height for other, _ in places):
            places.append((middle, shortened(kind, 18)))
    axes.yaxis.set_major_locator(FixedLocator([place for place, _ in places]))
    for text in axes.set_yticklabels([name for _, name in places], fontsize=9):
        text.set(parse_math=False)


# How values stand on the vertical axis. Each sets up the axis for all values, and returns how one is shown.


def _frame_from_zero(axes: Axes, values: Sequence[float]) -> Callable[[float], float]:
    axes.set_ylim(0, 1.06 * max(values) or 1)
    return float


def _frame_energy(axes: Axes, values: Sequence[float]) -> Callable[[float], float]:
    """Put 0 in the middle, small deviations near it, and powers of ten around it."""
    most = max(10 * ENERGY_ROUNDING, 2 * max(map(abs, values)))
    least = ENERGY_ROUNDING / 100
    axes.set_yscale("symlog", linthresh=least, linscale=max(0.5, 0.15 * math.log10(most / least)))
    axes.set_ylim(-most, most)
    axes.axhspan(-ENERGY_ROUNDING, ENERGY_ROUNDING, color=MUTED, alpha=0.12, linewidth=0)
    marked = powers(-4, most, 3)
    axes.yaxis.set_major_locator(FixedLocator([*(-p for p in reversed(marked)), 0, *marked]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{'+' if v > 0 else '−'}{power(abs(v))}" if v else "0"))
    if max(map(abs, values)) <= ENERGY_ROUNDING:
        _note_in_band(axes, ENERGY_ROUNDING)
    return float


def _frame_residual(axes: Axes, values: Sequence[float]) -> Callable[[float], float]:
    """Put values on a log scale with a lowest one, where all less than it stand."""
    most = max(3e-11, 5 * max(values))
    axes.set_yscale("log")
    axes.set_ylim(_LEAST_RESIDUAL / 2, most)
    axes.axhspan(_LEAST_RESIDUAL / 2, RESIDUAL_ROUNDING, color=MUTED, alpha=0.12, linewidth=0)
    axes.yaxis.set_major_locator(FixedLocator(powers(-17, most, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: ("≤" if v < 2 * _LEAST_RESIDUAL else "") + power(v)),
    )
    if max(values) <= RESIDUAL_ROUNDING:
        _note_in_band(axes, RESIDUAL_ROUNDING)
    return lambda v: max(v, _LEAST_RESIDUAL)


def _note_in_band(axes: Axes, top: float) -> None:
    axes.annotate(
        "all within rounding",
        (0.98, top),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=9,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )
