"""Which features each block of a butterfly factor mixes."""

from __future__ import annotations

from types import ModuleType

from boft_export.linalg.arrays import Array


def butterfly_index(factor: int, num_blocks: int, block_size: int, xp: ModuleType | None = None) -> Array:
    """Return the features that each block of a butterfly factor mixes, shape (num_blocks, block_size), int64.

    Factor i is one level of a radix-2 butterfly over half-blocks of h = b // 2 features: it joins the half-blocks
    that lie 2^i apart. With g, j = divmod(d, 2^i) block d takes the h features from g b 2^i + j h on, and the
    b - h features from g b 2^i + (j + 2^i) h on. Source: Liu et al., "Parameter-Efficient Orthogonal Finetuning via
    Butterfly Factorization" (ICLR 2024), section 4; checked against PEFT's ``block_butterfly_perm``.

    Args:
        factor: The level i, from 0.
        num_blocks: Blocks D in the factor; a multiple of 2^i.
        block_size: Features b in a block; even for i > 0.
        xp: numpy or torch, of which the array is; torch by default.

    Raises:
        ValueError: Where no such factor exists.
    """
    if xp is None:
        import torch

        xp = torch
    stride = 1 << factor
    if num_blocks % stride or (factor and block_size % 2):
        raise ValueError(f"no butterfly factor {factor} for {num_blocks} blocks of size {block_size}")
    half = block_size // 2
    block = xp.arange(num_blocks)
    first = block // stride * (block_size * stride) + block % stride * half
    within = xp.arange(block_size)
    # The second half-block starts `stride` half-blocks after the first.
    offset = xp.where(within < half, within, within - half + stride * half)
    return first[:, None] + offset
