"""A measured path as one HTML page: its figures, its plots and its layers, without scripts or other files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from boft_export.plots.page_parts import count, decimals, html_page, kind_items, module_head, plots, row, table
from boft_export.plots.path_data import (
    CHANGE,
    ENERGY,
    LARGEST_ANGLE,
    RESIDUAL,
    RMS_ANGLE,
    Layer,
    Quantity,
    Sweep,
)
from boft_export.plots.path_figure import evaluation_panels, layer_panels

# The layers' table shows as many outputs at most; the plots show all.
_MOST_COLUMNS = 25
# As many alphas are told one by one.
_MOST_ALPHAS = 11
_NONE = "–"


def page(document: Mapping[str, Any]) -> str:
    """Return a document as an HTML page; the same document gives the same page.

    Args:
        document: From ``path_document``.
    """
    sweep = Sweep.of(document)
    title = f"{sweep.base} with {' and '.join(sweep.adapters)}"
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_summary(sweep))}</p>"]
    if sweep.labels:
        parts += ["<h2>By alpha</h2>", _key_figures(sweep)]
    if shown := evaluation_panels(sweep):
        parts += ["<h2>Evaluation</h2>", plots(shown)]
        if more := len(sweep.metrics) - len(shown):
            parts.append(f'<p class="note">The table above has {more} more.</p>')
    if shown := layer_panels(sweep):
        parts += ["<h2>Along the path</h2>", _legend(sweep), plots(shown), "<h2>Layers</h2>", _layers(sweep)]
    else:
        parts.append('<p class="note">No adapted layer was measured.</p>')
    return html_page(title, parts)


def _summary(sweep: Sweep) -> str:
    return (
        f"The {sweep.path} path from {sweep.base} (alpha 0) to the model tuned with "
        f"{', then '.join(sweep.adapters)} (alpha 1){_range(sweep)}: {count(len(sweep.labels), 'output')} and "
        f"{count(len(sweep.layers), 'adapted layer')}, measured by {sweep.program}."
    )


def _range(sweep: Sweep) -> str:
    if len(sweep.labels) > _MOST_ALPHAS:
        return f", from alpha {sweep.labels[0]} to {sweep.labels[-1]}"
    return f", at alpha {', '.join(sweep.labels)}" if sweep.labels else ""


def _key_figures(sweep: Sweep) -> str:
    columns = {name: _plain([e.get(name) for e in sweep.evaluations]) for name in sweep.metrics}
    if sweep.layers:
        columns |= {
            "rms angle, median": _fixed(_medians(sweep, RMS_ANGLE), "°"),
            "largest angle": _fixed(_extremes(sweep, LARGEST_ANGLE), "°"),
            "change of weights, median": _fixed(_medians(sweep, CHANGE), " %"),
            "energy ratio\u00a0−\u00a01, largest": _small(_extremes(sweep, ENERGY), "+.1e"),
            "residual, largest": _small(_extremes(sweep, RESIDUAL), ".1e"),
        }
    rows = [
        row(f'<th scope="row">{escape(label)}</th>', [texts[i] for texts in columns.values()])
        for i, label in enumerate(sweep.labels)
    ]
    return table("Figures by alpha", ["alpha", *columns], rows, "wrap")


def _medians(sweep: Sweep, quantity: Quantity) -> list[float | None]:
    columns = [sweep.column(quantity, i) for i in range(len(sweep.labels))]
    return [median(column) if column else None for column in columns]


def _extremes(sweep: Sweep, quantity: Quantity) -> list[float | None]:
    return [max(sweep.column(quantity, i), key=abs, default=None) for i in range(len(sweep.labels))]


def _legend(sweep: Sweep) -> str:
    items = kind_items({kind: len(layers) for kind, layers in sweep.groups().items()}, sweep.colours)
    if len(sweep.layers) > 1:
        items.append('<li><b style="background:var(--ink)"></b>median of all</li>')
        if len(sweep.labels) > 1:
            items.append('<li class="note">thin: a layer; thick: a median</li>')
    return f'<ul class="kinds">{"".join(items)}</ul>'


def _layers(sweep: Sweep) -> str:
    outputs = _spread(len(sweep.labels), _MOST_COLUMNS)
    several = len(sweep.adapters) > 1
    heads = ["module", *(["adapter"] if several else []), "features", *(sweep.labels[i] for i in outputs)]
    digits = decimals(v for i in outputs for v in sweep.column(RMS_ANGLE, i))
    rows = [
        row(
            module_head(layer.module),
            [
                *([sweep.adapters[layer.adapter]] if several else []),
                str(layer.num_features),
            ],
            "".join(f"<td>{_angle(sweep, layer, i, digits)}</td>" for i in outputs),
        )
        for layer in sweep.layers
    ]
    note = "The rms rotation angle in degrees, by alpha."
    if len(outputs) < len(sweep.labels):
        note += f" {len(outputs)} of {len(sweep.labels)} outputs are shown."
    return f'<p class="note">{note}</p>' + table("Layers", heads, rows, "")


def _angle(sweep: Sweep, layer: Layer, output: int, digits: int) -> str:
    point = layer.points[output]
    angle = RMS_ANGLE(point)
    text = _NONE if angle is None else f"{angle:.{digits}f}"
    # A map can give a layer its own alpha.
    if (own := point["alpha"]) != sweep.alphas[output][layer.adapter]:
        text += f" <small>at {own:.6g}</small>"
    return text


def _spread(count: int, most: int) -> list[int]:
    """Return ``most`` numbers below ``count``, evenly spread with both ends; all where there are no more."""
    if count <= most:
        return list(range(count))
    return [i * (count - 1) // (most - 1) for i in range(most)]


# Figures of a column, with their decimal points below each other


def _plain(values: Sequence[float | None]) -> list[str]:
    """Return figures of any size, to six digits."""
    texts = [_NONE if v is None else f"{v:.6g}" for v in values]
    if any("e" in text for text in texts):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [_NONE if v is None else f"{v:.{decimals}f}" for v in values]


def _fixed(values: Sequence[float | None], unit: str) -> list[str]:
    digits = decimals(v for v in values if v is not None)
    return [_NONE if v is None else f"{v:.{digits}f}{unit}" for v in values]


def _small(values: Sequence[float | None], form: str) -> list[str]:
    return [_NONE if v is None else format(v, form) if v else "0" for v in values]
