"""What several alphas cost in one run: bytes read, time and peak memory, beside one run for each and a plain copy.

Every linear layer of a sharded bfloat16 checkpoint is adapted with m butterfly factors. Each figure is of a whole
process: bytes as the kernel counts them (/proc/self/io, so Linux only), the largest resident set, wall time.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from measured import PROGRAM, make_checkpoint, measure, write_figures


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
    parser.add_argument("--shape", default="llama-3-8b", help="one of those in synthetic.py")
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--alphas", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--paths", nargs="+", default=["geodesic", "factorwise", "cayley", "truncate", "linear"])
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        made = {"gigabytes": args.gigabytes, "factors": args.factors, "block-size": args.block_size}
        size = make_checkpoint(work, shape=args.shape, targets="linear", **made)
        base, adapter = work / "base", work / "adapter"
        print(f"{size:.2f} GB, m = {args.factors}, b = {args.block_size}, {len(args.alphas)} alphas")
        print(f"{'what':34} {'seconds':>8} {'GB read':>8} {'peak MB':>8}")
        runs: list[Sweep] = []

        def tell(run: Sweep) -> None:
            runs.append(run)
            print(f"{run.what:34} {run.seconds:8.1f} {run.read_gb:8.2f} {run.peak_mb:8.0f}", flush=True)

        def interpolate(label: str, path: str, alphas: list[float]) -> Sweep:
            options = [o for a in alphas for o in ("--alpha", repr(a))]
            command = [PROGRAM, "interpolate", str(base), str(adapter)]
            done = measure(label, size, [*command, "-o", str(work / "out"), "--path", path, "-q", *options])
            shutil.rmtree(work / "out")
            return Sweep(label, done.seconds, done.read_gb, done.peak_mb)

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
    write_figures(args.json, {"sweep": [asdict(r) for r in runs]})


if __name__ == "__main__":
    main()
