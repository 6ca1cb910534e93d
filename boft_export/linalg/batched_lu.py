"""LU-based functions of many matrices at once, matrix by matrix where torch's own can't be trusted.

torch 2.13 with MKL 2024.2 on a CPU: once ``torch.set_num_threads`` was called anywhere, batched ``solve``, ``inv`` and
``slogdet`` of matrices of 160 and more give wrong numbers, or fail with pivots that are none. Single matrices don't.
"""

from __future__ import annotations

from collections.abc import Callable

from boft_export.linalg.arrays import Array, namespace

# Seen from 160 on.
_LARGE = 64


def solve(a: Array, b: Array) -> Array:
    """Return X with A X = B, for ``a`` and ``b`` of shape (..., n, n)."""
    return _apply(namespace(a).linalg.solve, a, b)


def inverse(a: Array) -> Array:
    """Return A^-1, for ``a`` of shape (..., n, n)."""
    return _apply(namespace(a).linalg.inv, a)


def log_determinant(a: Array) -> tuple[Array, Array]:
    """Return the sign of det A and log |det A|, for ``a`` of shape (..., n, n)."""
    xp = namespace(a)
    both = _apply(lambda x: xp.stack(xp.linalg.slogdet(x), axis=-1), a)
    return both[..., 0], both[..., 1]


def _apply(function: Callable[..., Array], *matrices: Array) -> Array:
    xp, first = namespace(matrices[0]), matrices[0]
    if first.shape[-1] < _LARGE or first.ndim == 2 or xp.__name__ == "numpy" or first.is_cuda:
        return function(*matrices)
    results = [function(*m) for m in zip(*(x.reshape(-1, *x.shape[-2:]) for x in matrices), strict=True)]
    return xp.stack(results).reshape(*first.shape[:-2], *results[0].shape)
