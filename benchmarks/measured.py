"""Programs measured from outside, by the operating system's own account, and what every benchmark says of them.

It imports no more than Python's own library: a child's largest resident set begins with that of its parent, which so
has to stay small. What needs torch runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

# The program as a user starts it.
PROGRAM = str(Path(sys.executable).with_name("boft-export"))
# What keeps transformers and PEFT from talking, and from looking on the Hub.
QUIET = {"PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
T = TypeVar("T")
_PACKAGES = ("boft-export", "numpy", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Run:
    """One process, with all its children.

    Attributes:
        command: What it was.
        gigabytes: Bytes it had to do with, as said by who ran it.
        seconds: Wall time.
        cpu_seconds: User and system time.
        peak_mb: The largest resident set, which includes mapped files.
        read_gb: Bytes it asked the kernel to read, from the page cache too; 0 where the kernel doesn't say.
        written_gb: The same of bytes written.
    """

    command: str
    gigabytes: float
    seconds: float
    cpu_seconds: float
    peak_mb: float
    read_gb: float = 0.0
    written_gb: float = 0.0


def measure(
    label: str, gigabytes: float, command: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> Run:
    """Run a command to its end and return what it took; what it prints is not shown.

    Args:
        label: What to call it.
        gigabytes: How much it has to do with.
        command: The program and its arguments.
        environment: Variables that are added to this process's.

    Raises:
        CalledProcessError: If the command fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    seconds = time.monotonic() - started
    io = _io(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    cpu = usage.ru_utime + usage.ru_stime
    return Run(
        label, gigabytes, seconds, cpu, usage.ru_maxrss / 1024, io.get("rchar", 0) / 1e9, io.get("wchar", 0) / 1e9
    )


def _io(pid: int) -> dict[str, int]:
    """Return the kernel's counts of a process that has ended and is not yet waited for."""
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(count) for name, count in (line.split(": ") for line in lines)}


def interleaved(work: Mapping[str, Callable[[], T]], runs: int) -> dict[str, list[T]]:
    """Do each thing ``runs`` times, by turns: what else the machine does hits all alike.

    Each round begins with another one, so that none always follows the same.
    """
    found: dict[str, list[T]] = {name: [] for name in work}
    names = list(work)
    for i in range(runs):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(work[name]())
    return found


def middle(runs: Sequence[Run]) -> Run:
    """Return the median of each figure, and of memory the largest."""

    def of(figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, runs))

    return Run(
        runs[0].command,
        runs[0].gigabytes,
        of(lambda r: r.seconds),
        of(lambda r: r.cpu_seconds),
        max(r.peak_mb for r in runs),
        of(lambda r: r.read_gb),
        of(lambda r: r.written_gb),
    )


def ratio(runs: Sequence[Run], others: Sequence[Run]) -> float:
    """Return the median, over rounds, of how many times as long one took as another did."""
    return statistics.median(a.seconds / b.seconds for a, b in zip(runs, others, strict=True))


def size_gb(folder: Path) -> float:
    """Return the size of a folder's files in GB."""
    return sum(f.stat().st_size for f in folder.iterdir()) / 1e9


def make_checkpoint(folder: Path, **options: object) -> float:
    """Write ``base`` and an adapter below a folder by synthetic.py and its options; return the base's size in GB."""
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    script = str(Path(__file__).with_name("synthetic.py"))
    subprocess.run([sys.executable, script, str(folder), *given], check=True, stdout=subprocess.DEVNULL)
    return size_gb(folder / "base")


def settle(folder: Path | None = None) -> None:
    """Write out what earlier runs left in memory, and have a folder's files in the page cache."""
    os.sync()
    for file in sorted(folder.iterdir()) if folder else ():
        with file.open("rb", buffering=0) as source:
            while source.read(1 << 22):
                pass


def _digits(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "" if value is None else str(value)


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows of the same keys as a table."""
    if not rows:
        return
    shown = [[v if isinstance(v, str) else _digits(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(rows[0], *shown, strict=True)]
    for i, cells in enumerate([list(rows[0]), *shown]):
        texts = [isinstance(v, str) for v in rows[max(i - 1, 0)].values()]
        aligned = [f"{c:<{w}}" if t else f"{c:>{w}}" for c, w, t in zip(cells, widths, texts, strict=True)]
        print("  ".join(aligned).rstrip(), flush=True)


def write_figures(file: Path | None, figures: Mapping[str, Any]) -> None:
    """Write figures, and the machine they are from, as JSON; to no file, nothing."""
    if file:
        file.write_text(json.dumps({"machine": machine(), **figures}, indent=2) + "\n")


def machine() -> dict[str, object]:
    """Return what figures depend on: processor, memory, kernel and versions."""
    try:
        told = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        told = []
    name = next((line.split(":", 1)[1].strip() for line in told if line.startswith("model name")), platform.processor())
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: found for package in _PACKAGES if (found := _version(package))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
