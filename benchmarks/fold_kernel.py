"""The fold kernel alone: what a dense stage costs by its size, and a layer's fold by b, m, dtype, threads and kernel.

A weight in the order of rows, and of columns where the output side is rotated, in the stages that a merge folds in,
with scales and with all the sums that a manifest has. Each figure is the least of several runs, each of which folds the
whole weight. GB/s are bytes read and written. "torch" is the fold that serves where there is no
compiled kernel.
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
from measured import print_table, write_figures
from numpy.typing import NDArray

from boft_export import Factor, Rotation
from boft_export.errors import UsageError
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.planner import KERNEL_COSTS, TORCH_COSTS
from boft_export.linalg.rounding import round_once
from boft_export.native import Program, Stage, fold_columns, fold_rows, instruction_set
from boft_export.pipeline.allocator import keep_tiles_free_chunks

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TILE = 1 << 17


def kernels() -> list[str]:
    """Return the names of the kernels that run here, and torch."""
    found = []
    for name in ("avx512", "avx2", "neon", "plain"):
        os.environ["BOFT_EXPORT_KERNEL"] = name
        try:
            instruction_set()
        except UsageError:
            continue
        found.append(name)
    return [*found, "torch"]


def orthogonal(count: int, size: int) -> NDArray[np.float64]:
    """Return random orthogonal blocks."""
    blocks: NDArray[np.float64] = np.linalg.qr(np.random.default_rng(size).standard_normal((count, size, size)))[0]
    return blocks


def butterfly(n: int, m: int, b: int) -> list[Factor]:
    """Return the m factors of a layer."""
    return [Factor(torch.from_numpy(orthogonal(n // b, b)), butterfly_index(i, n // b, b)) for i in range(m)]


def least(work: Callable[[], object], seconds: float) -> float:
    """Return the least time that something takes, of as many runs as fit."""
    best, ends = float("inf"), time.monotonic() + seconds
    while time.monotonic() < ends or best == float("inf"):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def fold(
    kernel: str,
    factors: list[Factor],
    weight: torch.Tensor,
    dtype: str,
    pool: ThreadPoolExecutor,
    threads: int,
    side: str,
) -> Callable[[], object]:
    """Return what folds a whole weight, a part in each thread."""
    os.environ["BOFT_EXPORT_KERNEL"] = kernel
    n = factors[0].num_features if factors else weight.shape[1]
    out = torch.empty_like(weight)
    rows = max(1, TILE // weight.shape[1])
    if kernel == "torch":
        scale = torch.ones(len(weight), 1, dtype=torch.float64)
        rotation = Rotation(tuple(factors))

        def tile(first: int) -> None:
            x = weight[first : first + rows].double()
            y = rotation.rotate_columns(x) * scale[first : first + rows]
            rounded = round_once(y, weight.dtype)
            out[first : first + rows] = rounded
            wide = rounded.double()
            for d in (x, y - x, wide - y):
                torch.dot(d.view(-1), d.view(-1))
            (wide != x).sum()

        return lambda: list(pool.map(tile, range(0, len(weight), rows)))
    program = Program([Stage(f.blocks.numpy(), f.index.numpy()) for f in factors], n)
    source, target = (t.view(torch.uint8).numpy() for t in (weight, out))
    step = -(-len(weight) // (threads * rows)) * rows
    ones = np.ones(len(weight))

    def part(first: int) -> None:
        here, there = source[first : first + step], target[first : first + step]
        if side == "columns":
            fold_columns(
                program, here, dtype, there, dtype, columns=weight.shape[1], first=first, scale=ones, tile_rows=rows
            )
        else:
            fold_rows(program, here, dtype, there, dtype, scale=ones[first : first + step], tile_rows=rows)

    return lambda: list(pool.map(part, range(0, len(weight), step)))


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
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_tiles_free_chunks()

    def figures(kernel: str, factors: list[Factor], dtype: str, threads: int, side: str) -> dict[str, object]:
        shape = (args.rows, n) if side == "rows" else (n, n)
        weight = (torch.randn(shape) * 0.02).to(DTYPES[dtype])
        with ThreadPoolExecutor(threads) as pool:
            best = least(fold(kernel, factors, weight, dtype, pool, threads, side), args.seconds)
        return {"ns/element": 1e9 * best / weight.numel(), "GB/s": 2 * weight.nbytes / best / 1e9}

    stages: list[dict[str, object]] = []
    for size in (s for s in SIZES if s <= n):
        factors = (
            [Factor(torch.from_numpy(orthogonal(n // size, size)), torch.arange(n).view(-1, size))] if size else []
        )
        row: dict[str, object] = {"stage": size}
        for kernel in args.kernels:
            measured = size or kernel != "torch"
            row[kernel] = figures(kernel, factors, "BF16", 1, "rows")["ns/element"] if measured else None
        stages.append(row)
    print(f"one stage, BF16, rows of {n}, one thread, ns per element (0: conversion, scale and sums alone)")
    print_table(stages)

    layers: list[dict[str, object]] = []
    for b, m in ((4, 1), (8, 1), (8, 2), (4, 4), (8, 4)):
        rotation = Rotation(tuple(butterfly(n, m, b)))
        for dtype in DTYPES if (b, m) == (8, 2) else ["BF16"]:
            for side in ("rows", "columns"):
                for threads in args.threads:
                    for kernel in args.kernels:
                        if kernel != "torch" or side == "rows":
                            costs = TORCH_COSTS if kernel == "torch" else KERNEL_COSTS
                            factors = list(rotation.fused(costs.smallest if side == "rows" else 1, costs).factors)
                            told = {
                                "b": str(b), "m": str(m), "stages": "+".join(str(f.index.shape[1]) for f in factors),
                                "dtype": dtype, "side": side, "threads": str(threads), "kernel": kernel,
                            }  # fmt: skip
                            layers.append({**told, **figures(kernel, factors, dtype, threads, side)})
    print_table(layers)
    write_figures(args.json, {"stages": stages, "layers": layers})


if __name__ == "__main__":
    main()
