"""What it takes to check a merge, beside the merge itself: time and peak memory of each, in one run.

Every linear layer of a sharded bfloat16 checkpoint is adapted with m butterfly factors. ``validate`` merges every
tensor again and compares; without the adapter, and in ``diff``, Gram matrices tell whether each tensor was rotated;
``unmerge`` takes the adapter out again. Each figure is of a whole process, by the operating system's own account (the
largest resident set, wall time), the median of several rounds in which all commands take turns.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

from measured import PROGRAM, Run, make_checkpoint, measure, middle, write_figures


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shape", default="llama-3-8b", help="one of those in synthetic.py")
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    runs: dict[str, list[Run]] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        made = {"gigabytes": args.gigabytes, "factors": args.factors, "block-size": args.block_size}
        size = make_checkpoint(work, shape=args.shape, targets="linear", **made)
        base, adapter, merged, back = (str(work / n) for n in ("base", "adapter", "merged", "back"))
        commands = {
            "merge": ["merge", base, adapter, "-o", merged, "--overwrite"],
            "validate": ["validate", adapter, "--base", base, "--merged", merged],
            "validate, no adapter": ["validate", "--base", base, "--merged", merged],
            "diff": ["diff", base, merged],
            "unmerge": ["unmerge", merged, adapter, "-o", back],
        }
        for _ in range(args.runs):
            for label, command in commands.items():
                run = measure(label, size, [PROGRAM, *command, "-q"])
                runs.setdefault(label, []).append(run)
                shutil.rmtree(back, ignore_errors=True)
    medians = [middle(found) for found in runs.values()]
    print(f"{size:.2f} GB, m = {args.factors}, b = {args.block_size}; median of {args.runs}")
    print(f"{'command':22} {'seconds':>8} {'of merge':>9} {'peak MB':>8}")
    for median in medians:
        share = median.seconds / medians[0].seconds
        print(f"{median.command:22} {median.seconds:8.1f} {share:8.2f}x {median.peak_mb:8.0f}")
    write_figures(args.json, {"validate": [asdict(r) for r in medians]})


if __name__ == "__main__":
    main()
