"""Plots what merge.py, peers.py, precision.py and inference.py wrote as JSON: a PNG for each file, in docs/."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One of the plots side by side: what it shows of a row, and the scale of its axis."""

    title: str
    of: Callable[[Row], float | None]
    scale: str


@dataclass(frozen=True)
class Plot:
    """What is drawn of a file: rows in groups, what a group and a row are called, and the panels."""

    group: str
    row: str
    panels: Sequence[Panel]


PLOTS = {
    "merge": Plot(
        "{GB} GB",
        "{command}",
        (
            Panel("seconds", lambda r: r["seconds"], "linear"),
            Panel("peak memory, MB", lambda r: r["peak MB"], "linear"),
        ),
    ),
    "peers": Plot(
        "m = {m}, {targets}, {GB} GB",
        "{by}",
        (
            Panel("seconds", lambda r: r["seconds"], "log"),
            Panel("memory above the base's size, MB", lambda r: r["above base"], "log"),
        ),
    ),
    "precision": Plot(
        "{dtype}, m = {m}",
        "{by}",
        (
            Panel("wrongly rounded, of a million elements", lambda r: 1e6 * r["wrong"] / r["of"], "symlog"),
            Panel("largest error, units in the last place", lambda r: r["largest error, ulp"], "log"),
        ),
    ),
    "inference": Plot(
        "{model}, m = {m}",
        "{by}",
        (
            Panel("seconds", lambda r: r["seconds"], "log"),
            Panel("times as long as the base", lambda r: r["of base"], "log"),
        ),
    ),
}
OURS, OTHERS, COMPUTED = "#0072b2", "#999999", "#d8d8d8"


def colour(row: Row) -> str:
    """Return a row's colour: ours stands out, and what was not run is pale."""
    if "extrapolated" in row.get("note", ""):
        return COMPUTED
    told = str(row.get("by", row.get("command"))).partition(",")[0]
    return OURS if told in {"boft-export", "merged", "merge"} else OTHERS


def called(plot: Plot, row: Row) -> str:
    """Return a row's name."""
    told = plot.row.format(**row)
    return f"{told}, extrapolated" if colour(row) == COMPUTED else told


def draw(plot: Plot, rows: list[Row], output: Path) -> None:
    """Draw a row of panels with a bar for each row of figures, and a gap and a heading before each group."""
    rows = [row for row in rows if all(panel.of(row) is not None for panel in plot.panels)]
    places: list[tuple[float, str, Row | None]] = []
    for heading, members in groupby(rows, lambda row: plot.group.format(**row)):
        places.append((len(places), heading, None))
        places += [(len(places) + i, called(plot, row), row) for i, row in enumerate(members)]
    figure = Figure(figsize=(10, 1 + 0.2 * len(places)), layout="constrained")
    axes = figure.subplots(1, len(plot.panels), sharey=True)
    for axis, panel in zip(axes, plot.panels, strict=True):
        bars = [(y, row) for y, _, row in places if row is not None]
        drawn = axis.barh([y for y, _ in bars], [panel.of(r) for _, r in bars], color=[colour(r) for _, r in bars])
        axis.bar_label(drawn, fmt=lambda x: f"{x:,.0f}" if x >= 1000 else f"{x:.3g}", padding=3, fontsize=7)
        axis.set_xscale(panel.scale)
        axis.margins(x=0.12)
        axis.set_title(panel.title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks([y for y, _, _ in places], [name for _, name, _ in places], fontsize=8)
    for text, (_, _, row) in zip(axes[0].get_yticklabels(), places, strict=True):
        text.set_fontweight("bold" if row is None else "normal")
    axes[0].invert_yaxis()
    figure.savefig(output, dpi=130)
    print(f"plotted to {output}")


def main() -> None:
    """Plot each file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", type=Path, nargs="+", help="JSON files that the benchmarks wrote")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "docs", help="folder for PNGs")
    args = parser.parse_args()
    for file in args.figures:
        figures = json.loads(file.read_text())
        for kind in PLOTS.keys() & figures.keys():
            draw(PLOTS[kind], figures[kind], args.output / f"speed-{kind}.png")


if __name__ == "__main__":
    main()
