"""The Cayley transform: from trained matrices to skew-symmetric ones, and from those to rotations."""

from __future__ import annotations

from boft_export.linalg.arrays import Array, namespace
from boft_export.linalg.batched_lu import solve


def skew(a: Array) -> Array:
    """Return the skew part (A - A^T) / 2 of ``a``, shape (..., b, b)."""
    return (a - a.mT) / 2


def from_triangle(entries: Array, size: int) -> Array:
    """Return the skew-symmetric U - U^T of shape (..., b, b), where ``entries`` fill U above its diagonal row by row.

    Args:
        entries: Shape (..., b (b - 1) / 2).
        size: The size b.
    """
    xp = namespace(entries)
    place = xp.arange(size, device=entries.device)
    upper = xp.zeros((*entries.shape[:-1], size, size), dtype=entries.dtype, device=entries.device)
    upper[..., place[:, None] < place] = entries
    return upper - upper.mT


def shrink(a: Array, norm: float) -> Array:
    """Return ``a``, shape (..., b, b), with those matrices scaled down to Frobenius norm ``norm`` that are beyond it.

    The constraint of COFT. Source: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS
    2023); PEFT's ``_project_batch``.
    """
    xp = namespace(a)
    own = xp.linalg.matrix_norm(a, keepdims=True)
    # Where it is 0 nothing is divided by it.
    beyond = own > norm
    return xp.where(beyond, norm * (a / xp.where(beyond, own, 1)), a)


def cayley(s: Array) -> Array:
    """Return Q = (I - S)(I + S)^-1 for skew-symmetric ``s``, shape (..., b, b).

    I + S has no singular value below 1, so there is always a solution; it is orthogonal to about eps |S|, with det +1,
    and never has the eigenvalue -1. The transform is its own inverse. Source: Qiu et al., "Controlling
    Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS 2023), section 3.2; PEFT's ``cayley_batch``.
    """
    eye = namespace(s).eye(s.shape[-1], dtype=s.dtype, device=s.device)
    # The two factors are functions of S and commute, so a solve from the left gives the same product.
    return solve(eye + s, eye - s)
