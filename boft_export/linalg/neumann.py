"""Polynomials of skew-symmetric matrices: what approaches a Cayley transform, and how far that is from a rotation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(s: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return p(S) = c_0 I + c_1 S + c_2 S^2 + ... for matrices ``s``, shape (..., b, b), by Horner's rule.

    With 1, 2, 2, ... it is the Neumann series of (I + S)(I - S)^-1, cut off. That is the transpose of ``cayley(s)``.
    Source: Qiu et al., "Orthogonal Finetuning Made Scalable" (arXiv 2506.19847), the Cayley-Neumann parametrisation;
    PEFT's ``OFTRotationModule._cayley_batch``.

    Args:
        s: The matrices.
        coefficients: c_0, c_1, ...; at least one.
    """
    result = torch.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = s @ result
        result.diagonal(dim1=-2, dim2=-1).add_(coefficient)
    return result


def expected_residual(generators: Tensor, coefficients: Sequence[float]) -> float:
    """Return the residual ||R^T R - I||_2 that R = p(S) has by design: the largest over all matrices.

    S is normal with eigenvalues i w, and so is R with p(i w). So R^T R has |p(i w)|^2, and the spectral norm of
    R^T R - I is the largest | |p(i w)|^2 - 1 |. Costs one Hermitian eigendecomposition of each matrix.

    Args:
        generators: Skew-symmetric S, shape (..., b, b).
        coefficients: Those of p, c_0 first.
    """
    if generators.numel() == 0:
        return 0.0
    w = torch.linalg.eigvalsh(generators * -1j)
    real, imaginary = torch.zeros_like(w), torch.zeros_like(w)
    for coefficient in reversed(coefficients):
        # (x + i y) i w + c
        real, imaginary = coefficient - imaginary * w, real * w
    return float((real**2 + imaginary**2 - 1).abs().max())
