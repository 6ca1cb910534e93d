"""What several alphas cost in one run: bytes read, time and peak memory, beside one run for each and a plain copy.

Every linear layer of a sharded bfloat16 checkpoint is adapted with m butterfly factors. Each figure is of a whole
process: bytes as the kernel counts them (/proc/self/io, so Linux only), the largest resident set, wall time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from memory import measure

# Runs the program and writes how many bytes it read to the file that its first argument names.
COUNTED = """
import sys
counts = sys.argv.pop(1)
from boft_export.cli.main import app
try:
    app()
finally:
    with open("/proc/self/io") as lines, open(counts, "w") as out:
        out.write(next(line.split()[1] for line in lines if line.startswith("rchar")))
"""


@dataclass(frozen=True)
class Sweep:
    """What one way of writing the checkpoints took."""

    what: str
    seconds: float
    read_gb: float
    peak_mb: float


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--paths", nargs="+", default=["geodesic", "factorwise", "cayley", "truncate", "linear"])
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        make = [sys.executable, str(Path(__file__).with_name("synthetic.py")), name]
        make += ["--gigabytes", str(args.gigabytes), "--factors", str(args.factors)]
        subprocess.run([*make, "--block-size", str(args.block_size)], check=True, stdout=subprocess.DEVNULL)
        base, adapter = work / "base", work / "adapter"
        size = sum(f.stat().st_size for f in base.iterdir()) / 1e9
        print(f"{size:.2f} GB, m = {args.factors}, b = {args.block_size}, {len(args.alphas)} alphas")
        print(f"{'what':34} {'seconds':>8} {'GB read':>8} {'peak MB':>8}")
        runs: list[Sweep] = []

        def tell(run: Sweep) -> None:
            runs.append(run)
            print(f"{run.what:34} {run.seconds:8.1f} {run.read_gb:8.2f} {run.peak_mb:8.0f}", flush=True)

        def interpolate(label: str, path: str, alphas: list[float]) -> Sweep:
            counts = work / "counts"
            options = [o for a in alphas for o in ("--alpha", repr(a))]
            command = [sys.executable, "-c", COUNTED, str(counts), "interpolate", str(base), str(adapter)]
            done = measure(label, size, [*command, "-o", str(work / "out"), "--path", path, "-q", *options])
            shutil.rmtree(work / "out")
            return Sweep(label, done.seconds, int(counts.read_text()) / 1e9, done.peak_mb)

        copies = " && ".join(f"cp -r {base} {work}/copy-{i}" for i in range(len(args.alphas)))
        copied = measure("copy", size, ["sh", "-c", f"{copies} && sync {work}/copy-*/*"])
        tell(Sweep(f"{len(args.alphas)} x cp, sync", copied.seconds, size * len(args.alphas), copied.peak_mb))
        for folder in work.glob("copy-*"):
            shutil.rmtree(folder)
        for path in args.paths:
            tell(interpolate(f"{path}, one run", path, args.alphas))
        each = [interpolate("", args.paths[0], [a]) for a in args.alphas]
        tell(
            Sweep(
                f"{args.paths[0]}, a run for each alpha",
                sum(e.seconds for e in each),
                sum(e.read_gb for e in each),
                max(e.peak_mb for e in each),
            )
        )
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in runs], indent=2) + "\n")


if __name__ == "__main__":
    main()
