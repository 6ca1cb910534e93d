"""The Cayley transform: from trained matrices to skew-symmetric ones, and from those to rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from boft_export.linalg.batched_lu import solve


def skew(a: Tensor) -> Tensor:
    """Return the skew part (A - A^T) / 2 of ``a``, shape (..., b, b)."""
    return (a - a.mT) / 2


def from_triangle(entries: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric U - U^T of shape (..., b, b), where ``entries`` fill U above its diagonal row by row.

    Args:
        entries: Shape (..., b (b - 1) / 2).
        size: The size b.
    """
    rows, columns = torch.triu_indices(size, size, 1, device=entries.device)
    upper = entries.new_zeros(*entries.shape[:-1], size, size)
    upper[..., rows, columns] = entries
    return upper - upper.mT


def shrink(a: Tensor, norm: float) -> Tensor:
    """Return ``a``, shape (..., b, b), with those matrices scaled down to Frobenius norm ``norm`` that are beyond it.

    The constraint of COFT. Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS
    2023); PEFT's ``_project_batch``.
    """
    own = torch.linalg.matrix_norm(a, keepdim=True)
    return torch.where(own <= norm, a, norm * (a / own))


def cayley(s: Tensor) -> Tensor:
    """Return Q = (I - S)(I + S)^-1 for skew-symmetric ``s``, shape (..., b, b).

    I + S has no singular value below 1, so there is always a solution; it is orthogonal to about eps |S|, with det +1,
    and never has the eigenvalue -1. The transform is its own inverse. Source: Qiu et al., "Controlling
    Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS 2023), section 3.2; PEFT's ``cayley_batch``.
    """
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    # The two factors are functions of S and commute, so a solve from the left gives the same product.
    return solve(eye + s, eye - s)
