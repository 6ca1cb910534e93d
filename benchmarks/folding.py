"""A whole weight folded as a merge folds it, by torch or the compiled kernel, for the benchmarks of the fold alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from boft_export import Rotation
from boft_export.adapters import AdapterLayer, View
from boft_export.native import Program, Stage, fold_columns, fold_rows
from boft_export.pipeline.fold import fold
from boft_export.pipeline.layers import LayerOperator
from boft_export.pipeline.memory import TILE_ELEMENTS
from boft_export.pipeline.one_torch_thread import ONE_TORCH_THREAD
from boft_export.planning import Segment, Step

# Elements of a chunk at least.
_CHUNK = 1 << 20
_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def layer_of(weight: Tensor, view: View, m: int, b: int) -> AdapterLayer:
    """Return a layer of m factors of blocks of b for a weight."""
    n, outputs = weight.shape if view is View.RESHAPED else weight.shape[::-1]
    return AdapterLayer("", "", "", num_factors=m, num_blocks=n // b, block_size=b, num_outputs=outputs)


def fold_by_torch(
    layer: AdapterLayer, view: View, rotation: Rotation, scale: NDArray[np.float64], weight: Tensor,
    pool: ThreadPoolExecutor, device: str = "cpu",
) -> Callable[[], Tensor]:  # fmt: skip
    """Return what folds a weight and gives the result; on a GPU the copies there and back are part of it.

    Args:
        layer: Its shape.
        view: Which side of the weight is rotated.
        rotation: In stages for torch, of tensors.
        scale: One for each output.
        weight: The weight.
        pool: The threads.
        device: Where to compute.
    """
    step = Step(0, layer, view)
    placed = rotation.to(device, torch.float64)
    for factor in placed.factors:
        factor.prepare()
    operator = LayerOperator(placed, torch.from_numpy(scale).to(device))
    tile = _tile(layer, view, weight, device)
    pinned = device == "cuda"
    source = weight.view(-1).pin_memory() if pinned else weight.view(-1)
    target = torch.empty(weight.shape, dtype=weight.dtype, pin_memory=pinned)
    chunk = -(-_CHUNK // tile) * tile

    def part(first: int) -> None:
        run = slice(first, first + chunk)
        with ONE_TORCH_THREAD:
            fold(
                [(source[run], 1.0)], [(step, operator)], first, target.view(-1)[run],
                compute=torch.float64, device=torch.device(device), tile=tile,
            )  # fmt: skip

    def run() -> Tensor:
        list(pool.map(part, range(0, weight.numel(), chunk)))
        return target

    return run


def fold_by_kernel(
    layer: AdapterLayer, view: View, rotation: Rotation | None, scale: NDArray[np.float64], weight: Tensor,
    pool: ThreadPoolExecutor,
) -> Callable[[], Tensor]:  # fmt: skip
    """Return what folds a weight by the compiled kernel, and gives the result.

    Args:
        layer: Its shape.
        view: Which side of the weight is rotated.
        rotation: In stages for the kernel, of numpy arrays; None for one that is only converted and scaled.
        scale: One for each output.
        weight: The weight.
        pool: The threads.
    """
    columns = weight.shape[1]
    stages = [Stage(f.blocks, f.index) for f in rotation.factors] if rotation else []
    program = Program(stages, len(weight) if view is View.RESHAPED else columns)
    dtype, target = _NAMES[weight.dtype], torch.empty_like(weight)
    source, out = (t.view(torch.uint8).numpy() for t in (weight, target))
    rows = _tile(layer, view, weight, "cpu") // columns
    chunk = -(-_CHUNK // (rows * columns)) * rows

    def part(first: int) -> None:
        run = slice(first, first + chunk)
        if view is View.RESHAPED:
            fold_columns(
                program, source[run], dtype, out[run], dtype, columns=columns, first=first, scale=scale, tile_rows=rows
            )
        else:
            fold_rows(program, source[run], dtype, out[run], dtype, scale=scale[run], tile_rows=rows)

    def run() -> Tensor:
        list(pool.map(part, range(0, len(weight), chunk)))
        return target

    return run


def _tile(layer: AdapterLayer, view: View, weight: Tensor, device: str) -> int:
    """Return the elements of a tile, as the merge has them."""
    return Segment(0, weight.numel(), (Step(0, layer, view),)).tile(TILE_ELEMENTS[device])
