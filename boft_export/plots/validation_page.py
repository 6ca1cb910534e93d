"""A validation as one HTML page: outcome, findings, plots and tables, without scripts or other files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import degrees
from typing import Any

from boft_export.plots.page_parts import count, html_page, kind_items, module_head, plots, row, table
from boft_export.plots.page_style import CSS, OUTCOME_CSS
from boft_export.plots.validation_data import Finding, Part, Shown, bound, figure, figures, words
from boft_export.plots.validation_figure import validation_panels

# As many checks of a finding are shown at first; the others are folded away.
_MOST_CHECKS = 8
_NONE = "–"
# Of each outcome: its colour's class and its sign.
_LOOK = {"pass": ("good", "✓"), "fail": ("bad", "✕"), "warning": ("doubtful", "!"), "inconclusive": ("doubtful", "?")}
_COUNTED = {"pass": "passed", "fail": "failed", "warning": "warnings", "inconclusive": "inconclusive"}
_SECTIONS = {
    "fails": ("Failures", "bad"),
    "warning": ("Warnings", "doubtful"),
    "inconclusive": ("Not to be told", "doubtful"),
}


def page(document: Mapping[str, Any]) -> str:
    """Return a document as an HTML page; the same document gives the same page.

    Args:
        document: From ``validation_document``.
    """
    shown = Shown.of(document)
    parts = [f"<h1>{escape(shown.title)}</h1>", _outcome(shown), _tiles(shown), f"<p>{escape(_about(shown))}</p>"]
    for ending, (head, tone) in _SECTIONS.items():
        if found := shown.findings(ending):
            number = sum(len(f.checks) for f in found)
            parts += [f"<h2>{head} ({number})</h2>", *(_finding(f, tone) for f in found)]
    if shown.document["summary"]:
        parts += ["<h2>Checks</h2>", _checks(shown)]
    if panels := validation_panels(shown):
        parts += ["<h2>Measured</h2>", _legend(shown), plots(panels)]
    if functional := shown.document["functional"]:
        parts += ["<h2>Outputs compared</h2>", _functional(functional)]
    if shown.layers:
        parts += ["<h2>Layers</h2>", _layers(shown)]
    if shown.document["tensors"]:
        parts += ["<h2>Tensors</h2>", _tensors(shown)]
    return html_page(f"{shown.document['headline']} – {shown.title}", parts, CSS + OUTCOME_CSS)


# The top


def _outcome(shown: Shown) -> str:
    tone, sign = _LOOK[shown.document["outcome"]]
    headline = shown.document["headline"]
    return (
        f'<p class="card outcome {tone}"><span class="mark" aria-hidden="true">{sign}</span>'
        f"<span>{escape(headline[:1].upper() + headline[1:])}</span></p>"
    )


def _tiles(shown: Shown) -> str:
    tiles = "".join(
        f'<li class="card {_LOOK[key][0] if number else "none"}"><b>{number:,}</b>{_COUNTED[key]}</li>'
        for key, number in shown.document["counts"].items()
    )
    return f'<ul class="tiles">{tiles}</ul>'


def _about(shown: Shown) -> str:
    document = shown.document
    what = [
        count(len(document[key]), name)
        for key, name in (("layers", "adapter layer"), ("tensors", "tensor"))
        if document[key]
    ]
    tool = document["tool"]
    fails = " and ".join(_fail_on(document["fail_on"]))
    return (
        f"{' and '.join(what) or 'Nothing'} measured by {tool['name']} {tool['version']} "
        f"in {document['seconds']:.1f} s. {fails[:1].upper() + fails[1:]} fail the whole."
    )


def _fail_on(levels: Iterable[str]) -> list[str]:
    names = {"error": "errors", "warning": "warnings", "inconclusive": "checks that could not be told"}
    return [name for level, name in names.items() if level in set(levels)]


# Findings


def _finding(finding: Finding, tone: str) -> str:
    checks = finding.checks
    first, rest = checks[:_MOST_CHECKS], checks[_MOST_CHECKS:]
    # One or two more are shown rather than folded away.
    if len(rest) <= 2:
        first, rest = checks, []
    where = f"{escape(checks[0]['check'])}, {count(len(checks), 'check')}"
    hint = f'<p class="hint">{escape(finding.hint)}</p>' if finding.hint else ""
    more = f"<details><summary>{len(rest)} more</summary>{_items(rest)}</details>" if rest else ""
    return (
        f'<section class="card finding {tone}"><h3>{escape(finding.name)} <small>{where}</small></h3>'
        f"{hint}{_items(first)}{more}</section>"
    )


def _items(checks: Sequence[Mapping[str, Any]]) -> str:
    items = []
    for check in checks:
        subject = f"<b>{_breaking(check['subject'])}</b>" if check["subject"] else ""
        told = figures(check)
        measured = f"<small>{escape(' · '.join(told))}</small>" if told else ""
        items.append(f"<li>{subject}<span>{escape(check['message'])}</span>{measured}</li>")
    return f"<ul>{''.join(items)}</ul>"


def _breaking(name: str) -> str:
    """Return a name as HTML that breaks at its dots."""
    return escape(name).replace(".", ".<wbr>")


# Tables


def _checks(shown: Shown) -> str:
    rows = []
    total = shown.document["counts"]
    columns = {key: name for key, name in _COUNTED.items() if total[key] or key in {"pass", "fail"}}
    for entry in shown.document["summary"]:
        counts = "".join(_count_cell(key, entry[key]) for key in columns)
        worst = entry["worst"]
        told = ("", "", "") if worst is None else (words(worst["figure"]), figure(worst["measured"]), bound(worst))
        cells = f'<td class="text">{escape(told[0])}</td><td>{escape(told[1])}</td><td>{escape(told[2])}</td>'
        subject = "" if worst is None else _breaking(worst["subject"])
        head = f'<th scope="row" class="text">{escape(entry["check"])}</th>'
        rows.append(f'<tr>{head}{counts}{cells}<td class="text">{subject}</td></tr>')
    return table("Checks by name", ["check", *columns.values(), "worst figure", "", "limit", "of"], rows, "checks")


def _count_cell(key: str, number: int) -> str:
    tone = f' class="{_LOOK[key][0]}"' if number and key != "pass" else ""
    return f"<td{tone}>{number or _NONE}</td>"


def _legend(shown: Shown) -> str:
    items = kind_items(shown.kind_counts, shown.colours)
    if any(p.failed for p in shown.layers + shown.tensors):
        items.append('<li><b class="cross">✕</b>failed a check</li>')
    return f'<ul class="kinds">{"".join(items)}</ul>'


def _functional(functional: Mapping[str, Any]) -> str:
    rows = [
        row(f'<th scope="row">{escape(words(name))}</th>', [value if isinstance(value, str) else figure(value)])
        for name, value in functional.items()
        if value is not None
    ]
    note = (
        "The merged model's outputs beside those of base and adapter. The noise is what rounding the adapted weights "
        "makes of the largest difference; the effect is what leaving the adapter out makes of it."
    )
    return f'<p class="note">{note}</p>' + _narrow(table("Outputs compared", ["", "value"], rows, ""))


def _narrow(table: str) -> str:
    return f'<div class="narrow">{table}</div>'


def _layers(shown: Shown) -> str:
    columns = {
        "adapter": lambda f: shown.document["adapters"][f["adapter"]],
        "features": lambda f: str(f["num_features"]),
        "factors × block": lambda f: f"{f['num_factors']} × {f['block_size']}",
        "max |RᵀR − I|": lambda f: _small(f["residual"]),
        "by design": lambda f: _small(f["expected_residual"]),
        "det R": lambda f: _short(f["determinant"]),
        "singular values": lambda f: _between(f["smallest_singular_value"], f["largest_singular_value"]),
        "largest angle": lambda f: _angle(f["angles"]),
        "scale": lambda f: _between(f["smallest_scale"], f["largest_scale"]),
    }
    if len(shown.document["adapters"]) < 2:
        del columns["adapter"]
    return _parts("Layers", "module", shown.layers, columns)


def _tensors(shown: Shown) -> str:
    columns = {
        "action": lambda f: f["action"],
        "dtype": lambda f: f["dtype"],
        "shape": lambda f: " × ".join(map(str, f["shape"])) or "scalar",
        "wrong elements": lambda f: _short(f["wrong"]),
        "worst, ulp": lambda f: _short(f["largest_ulp"]),
        "change": lambda f: _small(f["relative_change"]),
        "rounding loss": lambda f: _small(f["rounding_loss"]),
        "from a rotation": lambda f: _small(f["residual"]),
        "rounding alone": lambda f: _small(f["noise"]),
    }
    note = f'<p class="note">{count(shown.untouched, "more tensor")} that no merge touches.</p>'
    return (_parts("Tensors", "tensor", shown.tensors, columns) if shown.tensors else "") + (
        note if shown.untouched else ""
    )


def _parts(name: str, head: str, parts: Sequence[Part], columns: Mapping[str, Any]) -> str:
    """Return a table of parts, without the columns in which there is nothing."""
    cells = {title: [cell(p.facts) for p in parts] for title, cell in columns.items()}
    filled = {title: texts for title, texts in cells.items() if any(t != _NONE for t in texts)}
    rows = [row(module_head(p.name), [texts[i] for texts in filled.values()]) for i, p in enumerate(parts)]
    return table(name, [head, *filled], rows, "wrap")


def _small(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}" if value else "0"


def _short(value: float | None) -> str:
    return _NONE if value is None else figure(value)


def _between(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return _NONE
    texts = [f"{v:.4g}" for v in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _angle(angles: Sequence[float | None]) -> str:
    largest = max((a for a in angles if a is not None), default=None)
    return _NONE if largest is None else f"{degrees(largest):.2f}°"
