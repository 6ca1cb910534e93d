"""Polynomials of skew-symmetric matrices: what approaches a Cayley transform, and how far that is from a rotation."""

from __future__ import annotations

from collections.abc import Sequence

from boft_export.linalg.arrays import Array, namespace


def polynomial(s: Array, coefficients: Sequence[float]) -> Array:
    """Return p(S) = c_0 I + c_1 S + c_2 S^2 + ... for matrices ``s``, shape (..., b, b), by Horner's rule.

    With 1, 2, 2, ... it is the Neumann series of (I + S)(I - S)^-1, cut off. That is the transpose of ``cayley(s)``.
    Source: Qiu et al., "Orthogonal Finetuning Made Scalable" (arXiv 2506.19847), the Cayley-Neumann parametrisation;
    PEFT's ``OFTRotationModule._cayley_batch``.

    Args:
        s: The matrices.
        coefficients: c_0, c_1, ...; at least one.
    """
    xp = namespace(s)
    eye = xp.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    result = xp.zeros_like(s)
    for coefficient in reversed(coefficients):
        result = s @ result + coefficient * eye
    return result


def expected_residual(generators: Array, coefficients: Sequence[float]) -> float:
    """Return the residual ||R^T R - I||_2 that R = p(S) has by design: the largest over all matrices.

    S is normal with eigenvalues i w, and so is R with p(i w). So R^T R has |p(i w)|^2, and the spectral norm of
    R^T R - I is the largest | |p(i w)|^2 - 1 |. Costs one Hermitian eigendecomposition of each matrix.

    Args:
        generators: Skew-symmetric S, shape (..., b, b).
        coefficients: Those of p, c_0 first.
    """
    if not all(generators.shape):
        return 0.0
    xp = namespace(generators)
    w = xp.linalg.eigvalsh(generators * -1j)
    real, imaginary = xp.zeros_like(w), xp.zeros_like(w)
    for coefficient in reversed(coefficients):
        # (x + i y) i w + c
        real, imaginary = coefficient - imaginary * w, real * w
    return float(abs(real**2 + imaginary**2 - 1).max())
