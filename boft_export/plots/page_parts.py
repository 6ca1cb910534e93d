"""The elements that pages are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from boft_export.plots.inline_svg import panel_svg
from boft_export.plots.page_style import COLOURS, CSS
from boft_export.plots.panel import Panel

# Longer tables are folded away at first.
_MOST_ROWS = 40


def html_page(title: str, parts: Iterable[str], css: str = CSS) -> str:
    """Return a page without scripts or other files."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # A name that got past the escaping could still load and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def count(number: int, name: str) -> str:
    """Return ``3 outputs``, or ``1 output``."""
    return f"{number} {name}" + ("" if number == 1 else "s")


def plots(panels: Sequence[Panel]) -> str:
    """Return plots with their titles and captions, side by side where there is room."""
    figures = "\n".join(
        f"<figure><h3>{escape(p.title)}</h3>{panel_svg(p, COLOURS)}"
        f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        for p in panels
    )
    return f'<div class="plots">\n{figures}\n</div>'


def row(head: str, cells: Iterable[str], more: str = "") -> str:
    """Return a table's row: its head as HTML, cells as texts, and more cells as HTML."""
    return f"<tr>{head}{''.join(f'<td>{escape(c)}</td>' for c in cells)}{more}</tr>"


def module_head(name: str) -> str:
    """Return the head of a module's or tensor's row; a long name breaks at its dots."""
    return f'<th scope="row" class="module">{escape(name).replace(".", ".<wbr>")}</th>'


def kind_items(counts: Mapping[str, int], colours: Mapping[str, str]) -> list[str]:
    """Return the items of a legend: each kind of module with its colour and number."""
    return [
        f'<li><b style="background:{COLOURS[colour]}"></b>{escape(kind)} ({counts[kind]})</li>'
        for kind, colour in colours.items()
    ]


def table(name: str, heads: Iterable[str], rows: Sequence[str], kind: str) -> str:
    """Return a table that scrolls within its own frame, folded away where it is long."""
    folded = len(rows) > _MOST_ROWS
    body = "\n".join(rows)
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in heads)
    whole = (
        # With a place in the tab order, the arrow keys can scroll it.
        f'<div class="scroll{" tall" if folded else ""}" role="region" aria-label="{name}" tabindex="0"><table>\n'
        f'<thead class="{kind}"><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )
    if folded:
        return f'<details class="card"><summary>{name}: {len(rows)} rows</summary>{whole}</details>'
    return f'<div class="card">{whole}</div>'


def decimals(values: Iterable[float]) -> int:
    """Return with how many decimals the largest has three digits or more."""
    most = max(map(abs, values), default=0.0)
    return next((d for d in range(1, 6) if most * 10**d >= 100), 6) if most else 1
