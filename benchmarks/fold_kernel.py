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
from measured import print_table, write_figures
from numpy.typing import NDArray

from boft_export import Factor, Rotation
from boft_export.adapters import AdapterLayer, View
from boft_export.errors import UsageError
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.planner import KERNEL_COSTS, TORCH_COSTS
from boft_export.native import Program, Stage, fold_columns, fold_rows, instruction_set
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.fold import fold
from boft_export.pipeline.layers import LayerOperator
from boft_export.pipeline.memory import TILE_ELEMENTS
from boft_export.planning import Segment, Step

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
VIEWS = {"rows": View.INPUT, "columns": View.RESHAPED}
# The device of the fold by torch.
TORCH = {"torch": "cpu", "cuda": "cuda"}


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


def fold_by_torch(
    device: str, layer: AdapterLayer, factors: list[Factor], weight: torch.Tensor, pool: ThreadPoolExecutor,
    threads: int, side: str,
) -> Callable[[], object]:  # fmt: skip
    """Return what folds a whole weight as a merge does without the compiled kernel, a part in each thread."""
    step = Step(0, layer, VIEWS[side])
    scale = torch.ones(weight.numel() // layer.num_features, dtype=torch.float64, device=device)
    operator = LayerOperator(Rotation(tuple(factors)).to(device, torch.float64), scale)
    tile = Segment(0, weight.numel(), (step,)).tile(TILE_ELEMENTS[device])
    pinned = device == "cuda"
    source = weight.view(-1).pin_memory() if pinned else weight.view(-1)
    target = torch.empty(weight.numel(), dtype=weight.dtype, pin_memory=pinned)
    size = -(-weight.numel() // (threads * tile)) * tile

    def part(first: int) -> None:
        run = slice(first, first + size)
        fold(
            [(source[run], 1.0)], [(step, operator)], first, target[run],
            compute=torch.float64, device=torch.device(device), tile=tile,
        )  # fmt: skip

    return lambda: list(pool.map(part, range(0, weight.numel(), size)))


def fold_by_kernel(
    kernel: str, factors: list[Factor], weight: torch.Tensor, dtype: str, pool: ThreadPoolExecutor, threads: int,
    side: str,
) -> Callable[[], object]:  # fmt: skip
    """Return what folds a whole weight by a compiled kernel, a part in each thread."""
    os.environ["BOFT_EXPORT_KERNEL"] = kernel
    n = factors[0].num_features if factors else weight.shape[1]
    rows = max(1, TILE_ELEMENTS["cpu"] // weight.shape[1])
    program = Program([Stage(f.blocks.numpy(), f.index.numpy()) for f in factors], n)
    source, target = (t.view(torch.uint8).numpy() for t in (weight, torch.empty_like(weight)))
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

    def figures(
        kernel: str, b: int, m: int, factors: list[Factor], dtype: str, threads: int, side: str
    ) -> dict[str, object]:
        shape = (args.rows, n) if side == "rows" else (n, n)
        weight = (torch.randn(shape) * 0.02).to(DTYPES[dtype])
        with ThreadPoolExecutor(threads) as pool:
            if kernel in TORCH:
                layer = AdapterLayer("", "", "", m, n // b, b, weight.numel() // n)
                work = fold_by_torch(TORCH[kernel], layer, factors, weight, pool, threads, side)
            else:
                work = fold_by_kernel(kernel, factors, weight, dtype, pool, threads, side)
            best = least(work, args.seconds)
        return {"ns/element": 1e9 * best / weight.numel(), "GB/s": 2 * weight.nbytes / best / 1e9}

    stages: list[dict[str, object]] = []
    for size in (s for s in SIZES if s <= n):
        factors = (
            [Factor(torch.from_numpy(orthogonal(n // size, size)), torch.arange(n).view(-1, size))] if size else []
        )
        row: dict[str, object] = {"stage": size}
        for kernel in args.kernels:
            measured = size or kernel not in TORCH
            row[kernel] = figures(kernel, size, 1, factors, "BF16", 1, "rows")["ns/element"] if measured else None
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
                        costs = TORCH_COSTS if kernel in TORCH else KERNEL_COSTS
                        factors = list(rotation.fused(costs.smallest if side == "rows" else 1, costs).factors)
                        told = {
                            "b": str(b), "m": str(m), "stages": "+".join(str(f.index.shape[1]) for f in factors),
                            "dtype": dtype, "side": side, "threads": str(threads), "kernel": kernel,
                        }  # fmt: skip
                        layers.append({**told, **figures(kernel, b, m, factors, dtype, threads, side)})
    print_table(layers)
    write_figures(args.json, {"stages": stages, "layers": layers})


if __name__ == "__main__":
    main()
