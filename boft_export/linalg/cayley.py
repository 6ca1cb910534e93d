"""The Cayley transform: skew-symmetric matrices to rotations."""

from __future__ import annotations

import torch
from torch import Tensor


def skew(a: Tensor) -> Tensor:
    """Return the skew part (A - A^T) / 2 of ``a``, shape (..., b, b)."""
    return (a - a.mT) / 2


def cayley(s: Tensor) -> Tensor:
    """Return Q = (I - S)(I + S)^-1 for skew-symmetric ``s``, shape (..., b, b).

    I + S has no singular value below 1, so there is always a solution; it is orthogonal to about eps |S|, with det +1,
    and never has the eigenvalue -1. The transform is its own inverse. Source: Qiu et al., "Controlling
    Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS 2023), section 3.2; PEFT's ``cayley_batch``.
    """
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    # The two factors are functions of S and commute, so a solve from the left gives the same product.
    q: Tensor = torch.linalg.solve(eye + s, eye - s)
    return q
