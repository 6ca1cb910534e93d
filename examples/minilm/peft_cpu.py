"""Lets PEFT run BOFT adapters of more than one butterfly factor without CUDA.

PEFT places the blocks of a factor in a dense matrix with a CUDA extension that it compiles when a BOFT layer is made.
Where that fails, as on a machine without a GPU, it warns and falls back to a single factor, which can neither train
nor load an adapter with more. The extension does nothing that PyTorch's own indexing could not.
"""

from __future__ import annotations

import peft.tuners.boft.layer
import torch
from torch import Tensor


class _BlockDiagonal:
    """What PEFT calls on the compiled extension, by the same names and in the same shapes."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """(N, D, H, H) -> (N, DH, DH), the D blocks along the diagonal and zeros elsewhere."""
        n, d, h, _ = blocks.shape
        dense = torch.zeros(n, d, h, d, h, dtype=blocks.dtype, device=blocks.device)
        dense.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [dense.view(n, d * h, d * h)]

    @staticmethod
    def backward(grad_dense: Tensor, blocks: Tensor) -> list[Tensor]:
        """(N, DH, DH) -> (N, D, H, H), the gradient of each block read back from the diagonal."""
        n, d, h, _ = blocks.shape
        return [grad_dense.reshape(n, d, h, d, h).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


def enable_butterflies_on_cpu() -> None:
    """Has PEFT use a pure PyTorch stand-in for its compiled extension; call it before making a PEFT model."""
    peft.tuners.boft.layer.get_fbd_cuda = lambda: _BlockDiagonal
