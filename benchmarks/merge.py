"""A merge beside a plain copy of the same bytes: time, processor time and memory, by size and by what is adapted.

A checkpoint with a model's shapes, in bfloat16, and adapters of m butterfly factors on queries and values or on all
linear layers. Each command is a process of its own, started as a user would, with the base in the page cache; commands
take turns, and figures are medians. With --outputs, interpolations to several alphas in one run stand beside as many
copies.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from measured import (
    PROGRAM,
    Run,
    interleaved,
    make_checkpoint,
    measure,
    middle,
    print_table,
    ratio,
    settle,
    write_figures,
)

COPY, SYNCED = "cp", "cp && sync"


def commands(
    work: Path, targets: list[str], outputs: list[int], options: list[str]
) -> dict[str, tuple[int, list[str]]]:
    """Return what is measured: how many checkpoints each writes to ``out``, and its command."""
    base, out = work / "base", work / "out"
    found = {
        COPY: (1, ["cp", "-r", str(base), str(out)]),
        SYNCED: (1, ["sh", "-c", f"cp -r {base} {out} && sync {out}/*"]),
    }
    for name in targets:
        merge = [PROGRAM, "merge", str(base), str(work / f"adapter-{name}"), "-o", str(out), "-q", *options]
        found[f"merge, {name}"] = (1, merge)
    for count in outputs:
        copies = " && ".join(f"cp -r {base} {out}/{i}" for i in range(count))
        found[f"{count} x cp"] = (count, ["sh", "-c", f"mkdir {out} && {copies}"])
        alphas = [part for i in range(count) for part in ("--alpha", f"{(i + 1) / (count + 1):.4f}")]
        for name in targets:
            sweep = [PROGRAM, "interpolate", str(base), str(work / f"adapter-{name}"), "-o", str(out), "-q", *alphas]
            found[f"{count} alphas, {name}"] = (count, [*sweep, *options])
    return found


def measure_size(work: Path, gigabytes: float, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measure all commands on a checkpoint of one size and return their figures."""
    size = make_checkpoint(
        work, gigabytes=gigabytes, shape=args.shape, factors=args.factors, block_size=args.block_size
    )

    def once(label: str, command: list[str]) -> Callable[[], Run]:
        def run() -> Run:
            shutil.rmtree(work / "out", ignore_errors=True)
            settle(work / "base")
            return measure(label, size, command)

        return run

    asked = commands(work, args.targets, args.outputs, args.options)
    found = interleaved({label: once(label, command) for label, (_, command) in asked.items()}, args.runs)
    rows = []
    for label, runs in found.items():
        count, run = asked[label][0], middle(runs)
        row: dict[str, object] = {
            "command": label,
            "GB": round(size, 2),
            "outputs": count,
            "seconds": run.seconds,
            "of cp": ratio(runs, found[COPY if count == 1 else f"{count} x cp"]),
            "of cp && sync": ratio(runs, found[SYNCED]) / count,
            "GB/s": size * count / run.seconds,
            "CPU s": run.cpu_seconds,
            "peak MB": run.peak_mb,
            "GB read": run.read_gb,
        }
        rows.append(row)
    print(f"\n{args.shape}, {size:.2f} GB, m = {args.factors}, b = {args.block_size}, {args.runs} runs")
    print_table(rows)
    return [
        {
            **row,
            "targets": label.rpartition(", ")[2] if ", " in label else None,
            "runs": [asdict(r) for r in found[label]],
        }
        for label, row in zip(found, rows, strict=True)
    ]


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 13.5])
    parser.add_argument("--shape", default="llama-2-7b", help="one of those in synthetic.py")
    parser.add_argument("--targets", nargs="+", choices=["qv", "linear"], default=["qv", "linear"])
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--outputs", type=int, nargs="+", default=[], help="numbers of alphas, each in one run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("options", nargs="*", help="further options of boft-export, after --")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for size in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            rows += measure_size(Path(name), size, args)
    settings = {"shape": args.shape, "factors": args.factors, "block_size": args.block_size, "options": args.options}
    write_figures(args.json, {"merge": rows, **settings})


if __name__ == "__main__":
    main()
