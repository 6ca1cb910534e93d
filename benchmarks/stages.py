"""Cost of one dense stage of a fold by its size: where the planner's table comes from.

A 4096-feature weight in tiles as the merge cuts them, float64 on one core. Prints nanoseconds of processor time per
weight element: for features that are neighbours, and for blocks of two runs far apart, which have to be gathered first.
"""

from __future__ import annotations

import argparse
import time

import torch

from boft_export.linalg.planner import STAGE_COST
from boft_export.linalg.rotation import Factor
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.memory import TILE_ELEMENTS


def cost(factor: Factor, tile: torch.Tensor, repeats: int) -> float:
    """Return nanoseconds per element of applying ``factor`` to ``tile``, the least of ``repeats`` measurements."""
    best = float("inf")
    for _ in range(repeats):
        started = time.process_time_ns()
        for _ in range(16):
            factor.rotate_columns(tile)
        best = min(best, (time.process_time_ns() - started) / 16 / tile.numel())
    return best


def main() -> None:
    """Measure every size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--tile", type=int, default=TILE_ELEMENTS["cpu"], help="elements of a tile")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_tiles_free_chunks()
    n = args.features
    tile = torch.randn(args.tile // n, n, dtype=torch.float64)
    print(f"{'size':>5} {'neighbours':>11} {'gathered':>9} {'in the planner':>15}   ns per element")
    for size in (4, 8, 16, 32, 64, 128, 256, 512):
        blocks = torch.randn(n // size, size, size, dtype=torch.float64)
        near = torch.arange(n).view(-1, size)
        apart = torch.arange(n).view(2, -1, size // 2).transpose(0, 1).reshape(-1, size)
        figures = [cost(Factor(blocks, index), tile, args.repeats) for index in (near, apart)]
        planned = f"{STAGE_COST[size]:.1f}" if size in STAGE_COST else "widened"
        print(f"{size:5} {figures[0]:11.2f} {figures[1]:9.2f} {planned:>15}")


if __name__ == "__main__":
    main()
