"""Time and memory of folding an adapter into an ONNX graph that exists, beside an export of base and adapter.

A causal model with random float32 weights, about 300 million of them, is exported once; then an adapter of all its
linear layers is folded into that graph, and exported with the base anew. Each figure is of a whole process: wall time,
and the largest anonymous memory (RssAnon: what has no file behind it). What comes out is held together byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from onnx_memory import linear, write_base
from safetensors.torch import save_file

HIDDEN = 1024
_INTERVAL = 0.01


@dataclass(frozen=True)
class Run:
    """One process: what it did, its time, that of the verification in it, and its largest anonymous memory."""

    command: str
    gigabytes: float
    seconds: float
    verification: float
    peak_mb: float

    @property
    def unverified(self) -> float:
        """The time of all but the verification."""
        return self.seconds - self.verification


def write_adapter(folder: Path, layers: int) -> None:
    """Write a PEFT BOFT adapter of two factors for all linear layers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (out, n) in linear(HIDDEN).items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.boft_R"] = torch.randn(2, n // 8, 8, 8, generator=generator) * 0.1
            tensors[f"{prefix}.boft_s"] = 1 + torch.randn(out, 1, generator=generator) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "BOFT", "peft_version": "0.21.2", "exclude_modules": None, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def export(model: str, adapters: list[str], output: str, base_onnx: str | None) -> float:
    """Export in this process, and return the seconds that the verification took."""
    from boft_export.onnx import export as flow

    taken = 0.0

    def timed(name: str) -> None:
        function = vars(flow)[name]

        def wrapped(*args: object, **kwargs: object) -> object:
            nonlocal taken
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                taken += time.monotonic() - started

        setattr(flow, name, wrapped)

    timed("verify")
    timed("verify_patched")
    flow.export_onnx(model, adapters, output, base_onnx=base_onnx)
    return taken


def measure(label: str, gigabytes: float, arguments: list[str]) -> Run:
    """Run an export to its end in a process of its own and return what it took.

    Raises:
        CalledProcessError: If it fails.
    """
    command = [sys.executable, __file__, "--export", *arguments]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _anonymous(process.pid))
        time.sleep(_INTERVAL)
    seconds = time.monotonic() - started
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    told = process.stdout.read() if process.stdout is not None else ""
    return Run(label, gigabytes, seconds, float(told.split()[-1]), peak / 1024)


def _anonymous(process: int) -> int:
    """Return a process's anonymous memory in KiB."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--export", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        model, output, *rest = args.export
        adapters, graphs = rest[:1], rest[1:]
        print(export(model, adapters, output, graphs[0] if graphs else None))
        return
    runs = []
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        layers = write_base(work / "base", args.gigabytes, HIDDEN, tied=False)
        write_adapter(work / "adapter", layers)
        actual = sum(f.stat().st_size for f in (work / "base").iterdir()) / 1e9
        base, adapter = str(work / "base"), str(work / "adapter")
        print(f"{layers} layers, {actual:.2f} GB, {os.cpu_count()} cores")
        print(f"{'command':28} {'seconds':>8} {'verifying':>10} {'the rest':>9} {'anonymous MB':>13}")
        for label, arguments in (
            ("base, exported once", [base, str(work / "graph")]),
            ("base + adapter, exported", [base, str(work / "fresh"), adapter]),
            ("adapter folded into graph", [base, str(work / "patched"), adapter, str(work / "graph" / "model.onnx")]),
        ):
            runs.append(run := measure(label, actual, arguments))
            figures = f"{run.seconds:8.1f} {run.verification:10.1f} {run.unverified:9.1f} {run.peak_mb:13.0f}"
            print(f"{label:28} {figures}", flush=True)
        _, fresh, patched = runs
        pairs = [(work / "fresh" / n, work / "patched" / n) for n in ("model.onnx", "model.onnx_data")]
        same = all(filecmp.cmp(*pair, shallow=False) for pair in pairs)
        print(
            f"{fresh.unverified / patched.unverified:.1f} times as fast without verification, "
            f"{fresh.seconds / patched.seconds:.1f} times with it; {'the same bytes' if same else 'OTHER BYTES'}"
        )
        shutil.rmtree(work / "graph")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in runs], indent=2) + "\n")


if __name__ == "__main__":
    main()
