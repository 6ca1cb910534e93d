"""A measured path as one HTML page: its figures, its plots and its layers, without scripts or other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from boft_export.plots.inline_svg import panel_svg
from boft_export.plots.path_data import (
    CHANGE,
    ENERGY,
    KIND_COLOURS,
    LARGEST_ANGLE,
    RESIDUAL,
    RMS_ANGLE,
    Layer,
    Quantity,
    Sweep,
)
from boft_export.plots.path_figure import INK, LINE, MUTED, PAPER, Panel, evaluation_panels, layer_panels

# Longer tables are folded away at first.
_MOST_ROWS = 40
# The layers' table shows as many outputs at most; the plots show all.
_MOST_COLUMNS = 25
# As many alphas are told one by one.
_MOST_ALPHAS = 11
_NONE = "–"
_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    **{colour: f"var(--k{i})" for i, colour in enumerate(KIND_COLOURS)},
}
_DARK_KINDS = ("#6fb1ff", "#f79a45", "#56cc8d", "#f7808c", "#b59cff", "#4cc6dd", "#d8b44c", "#ec8ad6", "#98a1ad")


def _variables(colours: Iterable[str]) -> str:
    return "".join(f"--k{i}:{colour};" for i, colour in enumerate(colours))


_CSS = f"""
:root{{color-scheme:light dark;--back:#f5f6f8;--card:{PAPER};--ink:{INK};--muted:{MUTED};--line:{LINE};
{_variables(KIND_COLOURS)}}}
@media(prefers-color-scheme:dark){{:root{{--back:#101317;--card:#181c22;--ink:#e7eaee;--muted:#a3acb8;--line:#313843;
{_variables(_DARK_KINDS)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}}
main{{max-width:1040px;margin:auto;padding:28px 20px 56px}}
h1{{font-size:1.6rem;line-height:1.25;margin:0 0 8px}}
h2{{font-size:1.15rem;margin:36px 0 12px}}
h1,p,h3,li{{overflow-wrap:anywhere}}
p{{margin:0 0 12px;max-width:70ch}}
.note{{color:var(--muted);font-size:.875rem}}
.card,figure{{background:var(--card);border:1px solid var(--line);border-radius:10px}}
.card{{overflow:hidden}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:16px}}
figure{{margin:0;padding:14px 16px 12px;min-width:0}}
h3{{font-size:1rem;margin:0 0 6px}}
@media(min-width:740px){{figure:last-child:nth-child(odd){{grid-column:1/-1;display:grid;align-items:center;
grid-template:auto auto/1fr 1fr;column-gap:32px}}figure:last-child:nth-child(odd) h3{{grid-column:1/-1}}}}
figcaption{{color:var(--muted);font-size:.875rem;margin-top:6px}}
svg{{display:block;width:100%;max-width:500px;height:auto;margin:auto;overflow:visible}}
svg *{{stroke-linejoin:round;stroke-linecap:butt}}
svg text{{font-family:inherit!important}}
.kinds{{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 14px;padding:0;list-style:none;font-size:.875rem}}
.kinds b{{display:inline-block;width:18px;height:4px;border-radius:2px;margin-right:7px;vertical-align:middle}}
.scroll{{overflow:auto}}
.tall{{max-height:85vh}}
table{{border-collapse:separate;border-spacing:0;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}}
th,td{{padding:6px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}}
tbody tr:last-child>*{{border-bottom:0}}
thead th{{position:sticky;top:0;z-index:1;background:var(--card);color:var(--muted);font-weight:500;
vertical-align:bottom;line-height:1.3}}
thead.wrap th:not(:first-child){{white-space:normal;min-width:6em}}
tr>:first-child{{position:sticky;left:0;background:var(--card);text-align:left}}
thead tr>:first-child{{z-index:2}}
tbody th{{font-weight:600}}
th.module{{font-weight:400;white-space:normal;min-width:17rem;line-height:1.3;overflow-wrap:anywhere}}
td small{{color:var(--muted)}}
summary{{padding:10px 14px;cursor:pointer}}
details[open]>summary{{border-bottom:1px solid var(--line)}}
@media(max-width:560px){{main{{padding:18px 12px 40px}}h1{{font-size:1.3rem}}figure{{padding:12px 10px 10px}}
th,td{{padding:6px 9px}}th.module{{min-width:9.5rem}}}}
"""


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
        parts += ["<h2>Evaluation</h2>", _plots(shown)]
        if more := len(sweep.metrics) - len(shown):
            parts.append(f'<p class="note">The table above has {more} more.</p>')
    if shown := layer_panels(sweep):
        parts += ["<h2>Along the path</h2>", _legend(sweep), _plots(shown), "<h2>Layers</h2>", _layers(sweep)]
    else:
        parts.append('<p class="note">No adapted layer was measured.</p>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # A name that got past the escaping could still load and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _summary(sweep: Sweep) -> str:
    return (
        f"The {sweep.path} path from {sweep.base} (alpha 0) to the model tuned with "
        f"{', then '.join(sweep.adapters)} (alpha 1){_range(sweep)}: {_count(len(sweep.labels), 'output')} and "
        f"{_count(len(sweep.layers), 'adapted layer')}, measured by {sweep.program}."
    )


def _range(sweep: Sweep) -> str:
    if len(sweep.labels) > _MOST_ALPHAS:
        return f", from alpha {sweep.labels[0]} to {sweep.labels[-1]}"
    return f", at alpha {', '.join(sweep.labels)}" if sweep.labels else ""


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")


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
        _row(f'<th scope="row">{escape(label)}</th>', [texts[i] for texts in columns.values()])
        for i, label in enumerate(sweep.labels)
    ]
    return _table("Figures by alpha", ["alpha", *columns], rows, "wrap")


def _medians(sweep: Sweep, quantity: Quantity) -> list[float | None]:
    columns = [sweep.column(quantity, i) for i in range(len(sweep.labels))]
    return [median(column) if column else None for column in columns]


def _extremes(sweep: Sweep, quantity: Quantity) -> list[float | None]:
    return [max(sweep.column(quantity, i), key=abs, default=None) for i in range(len(sweep.labels))]


def _legend(sweep: Sweep) -> str:
    groups = sweep.groups()
    items = [
        f'<li><b style="background:{_COLOURS[colour]}"></b>{escape(kind)} ({len(groups[kind])})</li>'
        for kind, colour in sweep.colours.items()
    ]
    if len(sweep.layers) > 1:
        items.append('<li><b style="background:var(--ink)"></b>median of all</li>')
        if len(sweep.labels) > 1:
            items.append('<li class="note">thin: a layer; thick: a median</li>')
    return f'<ul class="kinds">{"".join(items)}</ul>'


def _plots(panels: Sequence[Panel]) -> str:
    figures = "\n".join(
        f"<figure><h3>{escape(p.title)}</h3>{panel_svg(p, _COLOURS)}"
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in panels
    )
    return f'<div class="plots">\n{figures}\n</div>'


def _layers(sweep: Sweep) -> str:
    outputs = _spread(len(sweep.labels), _MOST_COLUMNS)
    several = len(sweep.adapters) > 1
    heads = ["module", *(["adapter"] if several else []), "features", *(sweep.labels[i] for i in outputs)]
    digits = _digits(v for i in outputs for v in sweep.column(RMS_ANGLE, i))
    rows = [
        _row(
            # A long name breaks at its dots.
            f'<th scope="row" class="module">{escape(layer.module).replace(".", ".<wbr>")}</th>',
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
    return f'<p class="note">{note}</p>' + _table("Layers", heads, rows, "")


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


def _row(head: str, cells: Iterable[str], more: str = "") -> str:
    return f"<tr>{head}{''.join(f'<td>{escape(c)}</td>' for c in cells)}{more}</tr>"


def _table(name: str, heads: Iterable[str], rows: Sequence[str], kind: str) -> str:
    """Return a table that scrolls within its own frame, folded away where it is long."""
    folded = len(rows) > _MOST_ROWS
    body = "\n".join(rows)
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    table = (
        # With a place in the tab order, the arrow keys can scroll it.
        f'<div class="scroll{" tall" if folded else ""}" role="region" aria-label="{name}" tabindex="0"><table>\n'
        f'<thead class="{kind}"><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )
    if folded:
        return f'<details class="card"><summary>{name}: {len(rows)} rows</summary>{table}</details>'
    return f'<div class="card">{table}</div>'


# Figures of a column, with their decimal points below each other


def _plain(values: Sequence[float | None]) -> list[str]:
    """Return figures of any size, to six digits."""
    texts = [_NONE if v is None else f"{v:.6g}" for v in values]
    if any("e" in text for text in texts):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [_NONE if v is None else f"{v:.{decimals}f}" for v in values]


def _fixed(values: Sequence[float | None], unit: str) -> list[str]:
    digits = _digits(v for v in values if v is not None)
    return [_NONE if v is None else f"{v:.{digits}f}{unit}" for v in values]


def _digits(values: Iterable[float]) -> int:
    """Return with how many decimals the largest has three digits or more."""
    most = max(map(abs, values), default=0.0)
    return next((d for d in range(1, 6) if most * 10**d >= 100), 6) if most else 1


def _small(values: Sequence[float | None], form: str) -> list[str]:
    return [_NONE if v is None else format(v, form) if v else "0" for v in values]
