"""The fold kernel alone: what a dense stage costs by its size, and a layer's fold by b, m, dtype, threads and kernel.

A weight in the order of rows, and of columns where the output side is rotated, in the stages that a merge folds in,
with scales and with all the sums that a manifest has. Each figure is the least of several runs, each of which folds the
whole weight. GB/s are bytes read and written. "torch" is the fold that serves where there is no
compiled kernel; "cuda", where there is a GPU, is the same there, with the copies both ways.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from folding import fold_by_kernel, fold_by_torch, layer_of
from measured import print_table, write_figures
from numpy.typing import NDArray

from boft_export import Factor, Rotation
from boft_export.adapters import View
from boft_export.errors import UsageError
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.planner import KERNEL_COSTS, TORCH_COSTS
from boft_export.native import instruction_set
from boft_export.pipeline.allocator import keep_tiles_free_chunks

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
VIEWS = {"rows": View.INPUT, "columns": View.RESHAPED}
# Where torch folds, by the name in the table.
TORCH_DEVICES = {"torch": "cpu", "cuda": "cuda"}
# As many times the rows, of which a GPU takes millions of elements at once.
GPU_TIMES = 16


def kernels() -> list[str]:
    """Return the names of the kernels that run here, torch, and a GPU."""
    found = []
    for name in ("avx512", "avx2", "neon", "plain"):
        os.environ["BOFT_EXPORT_KERNEL"] = name
        try:
            instruction_set()
        except UsageError:
            continue
        found.append(name)
    return [*found, "torch", *(["cuda"] if torch.cuda.is_available() else [])]


def orthogonal(count: int, size: int) -> NDArray[np.float64]:
    """Return random orthogonal blocks."""
    blocks: NDArray[np.float64] = np.linalg.qr(np.random.default_rng(size).standard_normal((count, size, size)))[0]
    return blocks


def butterfly(n: int, m: int, b: int) -> Rotation:
    """Return the rotation of a layer."""
    return Rotation(tuple(Factor(orthogonal(n // b, b), butterfly_index(i, n // b, b, np)) for i in range(m)))


def least(work: Callable[[], object], seconds: float) -> float:
    """Return the least time that something takes, of as many runs as fit."""
    best, ends = float("inf"), time.monotonic() + seconds
    while time.monotonic() < ends or best == float("inf"):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


# Of stages; 0 is conversion alone.
SIZES = (0, 4, 8, 16, 32, 64, 128, 256, 512)


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=2048, help="of a weight whose stages are timed")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each figure")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--kernels", nargs="*", default=kernels())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    n = args.features
    torch.manual_seed(0)
    keep_tiles_free_chunks()

    def figures(
        kernel: str, rotation: Rotation | None, m: int, b: int, dtype: str, threads: int, side: str
    ) -> dict[str, object]:
        rows = args.rows * (GPU_TIMES if kernel == "cuda" else 1)
        weight = (torch.randn((rows, n) if side == "rows" else (n, rows)) * 0.02).to(DTYPES[dtype])
        scale = np.ones(rows)
        view = VIEWS[side]
        layer = layer_of(weight, view, m, b or 1)
        with ThreadPoolExecutor(threads) as pool:
            if rotation is not None and kernel in TORCH_DEVICES:
                device = TORCH_DEVICES[kernel]
                work = fold_by_torch(layer, view, rotation.tensors(), scale, weight, pool, device)
            else:
                os.environ["BOFT_EXPORT_KERNEL"] = kernel
                work = fold_by_kernel(layer, view, rotation, scale, weight, pool)
            best = least(work, args.seconds)
        return {"ns/element": 1e9 * best / weight.numel(), "GB/s": 2 * weight.nbytes / best / 1e9}

    stages: list[dict[str, object]] = []
    for size in (s for s in SIZES if s <= n):
        rotation = Rotation((Factor(orthogonal(n // size, size), np.arange(n).reshape(-1, size)),)) if size else None
        row: dict[str, object] = {"stage": size}
        for kernel in args.kernels:
            measured = size or kernel not in TORCH_DEVICES
            row[kernel] = figures(kernel, rotation, 1, size, "BF16", 1, "rows")["ns/element"] if measured else None
        stages.append(row)
    print(f"one stage, BF16, rows of {n}, one thread, ns per element (0: conversion, scale and sums alone)")
    print_table(stages)

    layers: list[dict[str, object]] = []
    for b, m in ((4, 1), (8, 1), (8, 2), (4, 4), (8, 4)):
        whole = butterfly(n, m, b)
        for dtype in DTYPES if (b, m) == (8, 2) else ["BF16"]:
            for side in ("rows", "columns"):
                for threads in args.threads:
                    for kernel in args.kernels:
                        costs = TORCH_COSTS if kernel in TORCH_DEVICES else KERNEL_COSTS
                        rotation = whole.fused(costs.smallest if side == "rows" else 1, costs)
                        stages_text = "+".join(str(f.index.shape[1]) for f in rotation.factors)
                        told = {
                            "b": str(b), "m": str(m), "stages": stages_text,
                            "dtype": dtype, "side": side, "threads": str(threads), "kernel": kernel,
                        }  # fmt: skip
                        layers.append({**told, **figures(kernel, rotation, m, b, dtype, threads, side)})
    print_table(layers)
    write_figures(args.json, {"stages": stages, "layers": layers})


if __name__ == "__main__":
    main()
