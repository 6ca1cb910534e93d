"""Plots what merge.py, peers.py, precision.py and inference.py wrote as JSON: a PNG for each file, in docs/."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# By the key of a file's rows: what a bar is called, and its panels: title, key, and the scale of the axis.
PLOTS: dict[str, tuple[Sequence[str], Sequence[tuple[str, str, str]]]] = {
    "merge": (("GB", "command"), (("seconds", "seconds", "linear"), ("peak memory, MB", "peak MB", "linear"))),
    "peers": (
        ("GB", "m", "targets", "by", "note"),
        (("seconds", "seconds", "log"), ("memory above the base, MB", "above base", "log")),
    ),
    "precision": (
        ("model", "dtype", "m", "by"),
        (("correctly rounded", "right", "linear"), ("largest error, ulp", "largest error, ulp", "log")),
    ),
    "inference": (("model", "m", "by"), (("seconds", "seconds", "log"), ("times the base's", "of base", "log"))),
}
COLOURS = {"boft-export": "#0072b2", "merged": "#0072b2", "merge": "#0072b2"}


def colour(row: dict[str, Any]) -> str:
    """Return a row's colour: ours stands out."""
    told = str(row.get("by", row.get("command"))).partition(",")[0]
    return COLOURS.get(told, "#999999")


def plot(kind: str, rows: list[dict[str, Any]], output: Path) -> None:
    """Draw a row of panels with a bar for each row of figures."""
    names, panels = PLOTS[kind]
    rows = [row for row in rows if all(row[key] is not None for _, key, _ in panels)]
    labels = ["  ".join(str(row[name]).partition(";")[0] for name in names) for row in rows]
    figure = Figure(figsize=(10, 1.2 + 0.24 * len(rows)), layout="constrained")
    for axis, (title, key, scale) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        axis.barh(range(len(rows)), [row[key] for row in rows], color=[colour(row) for row in rows])
        axis.set_yticks(range(len(rows)), labels, fontsize=8)
        axis.set_xscale(scale)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
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
            plot(kind, figures[kind], args.output / f"speed-{kind}.png")


if __name__ == "__main__":
    main()
