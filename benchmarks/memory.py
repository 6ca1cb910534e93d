"""Peak memory and time of a merge by the checkpoint's size, beside a plain copy of the same bytes.

Every linear layer of a sharded bfloat16 checkpoint is adapted with m butterfly factors. Each figure is of a whole
process, by the operating system's own account (the largest resident set, wall time).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process: what it was, its time and its largest resident set."""

    command: str
    gigabytes: float
    seconds: float
    peak_mb: float


def measure(label: str, gigabytes: float, command: list[str]) -> Run:
    """Run a command to its end and return what it took.

    Raises:
        CalledProcessError: If the command fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    return Run(label, gigabytes, seconds, usage.ru_maxrss / 1024)


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 4, 8])
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("options", nargs="*", help="further options of boft-export merge, after --")
    args = parser.parse_args()
    runs: list[Run] = []
    print(f"{'command':12} {'GB':>6} {'seconds':>8} {'GB/s':>6} {'peak MB':>8}")
    for size in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            work = Path(name)
            # In a process of its own: a child's largest resident set begins with that of its parent.
            make = [sys.executable, str(Path(__file__).with_name("synthetic.py")), name, "--gigabytes", str(size)]
            make += ["--factors", str(args.factors), "--block-size", str(args.block_size)]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
            actual = sum(f.stat().st_size for f in (work / "base").iterdir()) / 1e9
            merge = [sys.executable, "-m", "boft_export", "merge", *(str(work / n) for n in ("base", "adapter"))]
            for label, command in (
                ("cp && sync", ["sh", "-c", f"cp -r {work}/base {work}/copy && sync {work}/copy/*"]),
                ("merge", [*merge, "-o", str(work / "merged"), "-q", *args.options]),
            ):
                runs.append(run := measure(label, actual, command))
                rate = run.gigabytes / run.seconds
                print(f"{label:12} {actual:6.2f} {run.seconds:8.1f} {rate:6.2f} {run.peak_mb:8.0f}", flush=True)
                shutil.rmtree(work / "copy", ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in runs], indent=2) + "\n")


if __name__ == "__main__":
    main()
