"""Rotations by their planes and angles, which is what powers and logarithms are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from boft_export.linalg.cayley import cayley, skew

# What comes too close to half a turn is taken apart by its real Schur form. A rotation with an angle beyond the one of
# this cosine: its Cayley transform grows as tan(angle / 2) and loses as many digits.
_FAR = -0.9
# A generator beyond this: its eigenvectors of opposite sign are conjugate only to its own rounding, and their sum real.
_VAST = 1e6


@dataclass(frozen=True)
class Spectrum:
    """Eigenvectors and angles of rotations: Q = V diag(exp(i angles)) V^H.

    Attributes:
        vectors: V, unitary, shape (B, k, k), complex.
        angles: In [-pi, pi], shape (B, k); those of a plane are a pair of opposite sign.
    """

    vectors: Tensor
    angles: Tensor

    @classmethod
    def of_generator(cls, s: Tensor) -> Spectrum:
        """Return the spectrum of (I - S)(I + S)^-1 for skew-symmetric ``s``, shape (B, k, k).

        -iS is Hermitian, with real eigenvalues w, and (1 - iw) / (1 + iw) = exp(-2i atan w). However close an angle is
        to pi, w tells it apart from pi to full precision. Costs one Hermitian eigendecomposition, O(B k^3).
        """
        vast = s.abs().amax(dim=(1, 2)) > _VAST
        if bool(vast.any()):
            return cls._apart(s, vast, cls.of_generator, lambda sine, _: -2 * math.atan(sine))
        w, vectors = torch.linalg.eigh(s * -1j)
        return cls(vectors, -2 * torch.atan(w))

    @classmethod
    def of_rotation(cls, q: Tensor) -> Spectrum:
        """Return the spectrum of rotations ``q``, shape (B, k, k): by their Cayley transform, which is its own inverse.

        A rotation that comes close to the eigenvalue -1, where the transform has a pole, is taken apart by its real
        Schur form instead: that is backward stable whatever the angles, and its planes stay real.

        Raises:
            ValueError: If a matrix has determinant -1: a reflection has no real powers.
        """
        far = torch.linalg.eigvalsh((q + q.mT) / 2)[:, 0] < _FAR
        if bool(far.any()):
            return cls._apart(q, far, cls.of_rotation, math.atan2)
        return cls.of_generator(skew(cayley(q)))

    @classmethod
    def _apart(
        cls, x: Tensor, far: Tensor, regular: Callable[[Tensor], Spectrum], angle: Callable[[float, float], float]
    ) -> Spectrum:
        """Return a batch's spectrum: matrices in ``far`` one by one by their real Schur form, the others as usual."""
        vectors = torch.empty_like(x, dtype=torch.complex128)
        angles = torch.empty_like(x[..., 0])
        if not bool(far.all()):
            rest = regular(x[~far])
            vectors[~far], angles[~far] = rest.vectors, rest.angles
        for i in far.nonzero()[:, 0].tolist():
            vectors[i], angles[i] = _schur(x[i], angle)
        return cls(vectors, angles)

    def power(self, alpha: float) -> Tensor:
        """Return Q^alpha = I + V diag(exp(i alpha angles) - 1) V^H, shape (B, k, k).

        Written as a change to I, a power near I keeps the relative precision of that change, alpha = 0 gives I exactly,
        and a direction that does not turn stays as it is.
        """
        phase = alpha * self.angles
        change = torch.complex(-2 * torch.sin(phase / 2) ** 2, torch.sin(phase))
        power = ((self.vectors * change[:, None, :]) @ self.vectors.mH).real
        return power + torch.eye(power.shape[-1], dtype=power.dtype, device=power.device)


def _schur(x: Tensor, angle: Callable[[float, float], float]) -> tuple[Tensor, Tensor]:
    """Return the eigenvectors and angles of one rotation, or of its generator, from its real Schur form Z T Z^T.

    T has a 2-by-2 block [[c, -s], [s, c]] for each plane, whose angle is ``angle(s, c)``, and numbers for single
    directions. Of a rotation, those of -1 are turned by pi in pairs; which two form a plane is free.
    """
    from scipy.linalg import schur

    t, z = (torch.from_numpy(a) for a in schur(x.cpu().numpy(), output="real"))
    size = len(t)
    planes: list[tuple[int, int, float]] = []
    opposite: list[int] = []
    i = 0
    while i < size:
        if i + 1 < size and t[i + 1, i] != 0:
            sine, cosine = float(t[i + 1, i] - t[i, i + 1]) / 2, float(t[i, i] + t[i + 1, i + 1]) / 2
            planes.append((i, i + 1, angle(sine, cosine)))
            i += 2
            continue
        if angle(0.0, float(t[i, i])):
            opposite.append(i)
        i += 1
    if len(opposite) % 2:
        raise ValueError("a reflection (determinant -1) has no real powers")
    planes += [(a, b, math.pi) for a, b in zip(opposite[::2], opposite[1::2], strict=True)]
    vectors, angles = z.to(torch.complex128), torch.zeros(size, dtype=torch.float64)
    for a, b, theta in planes:
        one = torch.complex(z[:, a], -z[:, b]) / math.sqrt(2)
        vectors[:, a], vectors[:, b] = one, one.conj()
        angles[a], angles[b] = theta, -theta
    return vectors.to(x.device), angles.to(x.device)
