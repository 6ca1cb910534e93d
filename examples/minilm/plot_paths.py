"""Plots the reports of several paths into one picture: task figures, distance on the group, and energy by alpha."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

STYLE = {
    "geodesic": {"color": "#0072b2", "marker": "o"},
    "factorwise": {"color": "#009e73", "marker": "s"},
    "cayley": {"color": "#e69f00", "marker": "^"},
    "truncate": {"color": "#cc79a7", "marker": "D"},
    "linear": {"color": "#555555", "marker": "x"},
}


def over_layers(key: str, scale: float = 1.0, offset: float = 0.0) -> Callable[[dict[str, Any], int], float]:
    """Returns the median over layers of what the report says of one output."""
    return lambda report, i: median(scale * (layer["points"][i][key] - offset) for layer in report["layers"])


PANELS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "task accuracy": lambda report, i: float(report["outputs"][i]["evaluation"]["accuracy"]),
    "margin of the right answer": lambda report, i: float(report["outputs"][i]["evaluation"]["margin"]),
    "rms rotation angle, degrees\n(median layer)": over_layers("rms_angle", 180 / math.pi),
    "hyperspherical energy over the\nbase's, less 1 (median layer)": over_layers("energy_ratio", offset=1.0),
}


def main() -> None:
    """Draws a panel for each figure, with a line for each report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reports", type=Path, nargs="+", help="path reports as JSON, one for each path")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the PNG to write")
    args = parser.parse_args()
    reports = [json.loads(file.read_text()) for file in args.reports]

    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (title, value) in zip(axes.flat, PANELS.items(), strict=True):
        for report in reports:
            alphas = [output["alpha"][0] for output in report["outputs"]]
            values = [value(report, i) for i in range(len(alphas))]
            axis.plot(alphas, values, label=report["path"], markersize=4, linewidth=1.3, **STYLE[report["path"]])
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("alpha: from base (0) to tuned (1)", fontsize=9)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{reports[0]['base']} with a BOFT adapter, {len(reports[0]['layers'])} layers", fontsize=11)
    figure.savefig(args.output, dpi=130)
    print(f"plotted to {args.output}")


if __name__ == "__main__":
    main()
