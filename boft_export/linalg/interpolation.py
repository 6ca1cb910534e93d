"""Curves from the identity to a rotation, and from 1 to its scales.

All of them reach R itself at alpha = 1, to the bit, and the identity at alpha = 0; all but ``linear`` stay among the
rotations. With m factors of D blocks of size b over n = D b features, in coupled groups of g:

============  =====================================================================  =======================
curve         R(alpha)                                                               cost
============  =====================================================================  =======================
geodesic      exp(alpha log R), for each group                                       O(n g^2), once per layer
factorwise    M_{m-1}^alpha ... M_0^alpha                                            O(m n b^2)
cayley        each block Cayley(alpha S) with S its skew generator                   O(m n b^2)
truncate      M_k^f M_{k-1} ... M_0 with k + f = alpha m                             O(n b^2)
linear        (1 - alpha) I + alpha R, not a rotation                                none
============  =====================================================================  =======================

Sources: the logarithm and the geodesics of SO(n) as in Edelman, Arias and Smith, "The Geometry of Algorithms with
Orthogonality Constraints" (SIAM J. Matrix Anal. Appl. 1998); truncation is the interpolation for free of Liu et al.,
"Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization" (ICLR 2024), section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from boft_export.linalg.path import InterpolationPath
from boft_export.linalg.rotation import Factor, Rotation

# How far alpha m may be from a whole number that it was meant to be: 1/49 times 49 is not quite 1.
_WHOLE = 1e-12


def geodesic(rotation: Rotation, alpha: float) -> Rotation:
    """Return exp(alpha log R), the point at ``alpha`` of the shortest curve from I to R, as one factor.

    The curve has constant speed, R(a) R(b) = R(a + b), and its length, the norm of log R, is the distance of R from I.

    Raises:
        ValueError: If a group of R is no rotation.
    """
    return rotation.power(alpha)


def factorwise(rotation: Rotation, alpha: float) -> Rotation:
    """Return the product of each factor's own power ``alpha``: the same sparsity, and the geodesic where m = 1.

    Raises:
        ValueError: If a block is no rotation.
    """
    return Rotation(tuple(f.power(alpha) for f in rotation.factors))


def cayley_scaled(rotation: Rotation, alpha: float) -> Rotation:
    """Return the product of the Cayley transforms of ``alpha`` S: what an adapter with its weights times alpha is.

    A plane of angle 2 atan(w) goes to 2 atan(alpha w), faster at first than in proportion.

    Raises:
        ValueError: If a block has the eigenvalue -1, which no generator gives.
    """
    return Rotation(tuple(f.scaled(alpha) for f in rotation.factors))


def truncate(rotation: Rotation, alpha: float) -> Rotation:
    """Return the first ``alpha`` m factors, the one on the boundary to a fractional power, the rest the identity.

    Raises:
        ValueError: If ``alpha`` is not in [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha} is outside of [0, 1], where there are factors to take")
    count = alpha * rotation.num_factors
    if abs(count - round(count)) < _WHOLE * rotation.num_factors:
        count = float(round(count))
    whole = math.floor(count)
    kept, dropped = rotation.factors[:whole], rotation.factors[whole:]
    boundary = (dropped[0].power(count - whole),) if count > whole else ()
    # Identities stay in place, so that what is left is fused and applied as a merge of such factors would be.
    return Rotation((*kept, *boundary, *(f.identity() for f in dropped[len(boundary) :])))


def linear(rotation: Rotation, alpha: float) -> Rotation:
    """Return (1 - alpha) I + alpha R as one factor; it shortens what it turns, so it is no rotation."""
    groups = rotation.groups()
    eye = torch.eye(groups.block_size, dtype=groups.blocks.dtype, device=groups.blocks.device)
    return Rotation((Factor((1 - alpha) * eye + alpha * groups.blocks, groups.index),))


CURVES: dict[InterpolationPath, Callable[[Rotation, float], Rotation]] = {
    InterpolationPath.GEODESIC: geodesic,
    InterpolationPath.FACTORWISE: factorwise,
    InterpolationPath.CAYLEY: cayley_scaled,
    InterpolationPath.TRUNCATE: truncate,
    InterpolationPath.LINEAR: linear,
}


def interpolate_rotation(rotation: Rotation, alpha: float, path: InterpolationPath | str = "geodesic") -> Rotation:
    """Return the point at ``alpha`` of the curve ``path`` from I to ``rotation``; at 1 the rotation itself.

    Raises:
        ValueError: If there is no such path or no such point on it.
    """
    curve = CURVES[InterpolationPath(path)]
    return rotation if alpha == 1 else curve(rotation, alpha)


def path_angles(rotation: Rotation, alpha: float, path: InterpolationPath | str = "geodesic") -> Tensor:
    """Return the angles of the point at ``alpha`` of a curve, in [-pi, pi], shape (groups, g).

    Off the rotations, on ``linear``, they are those of the nearest rotation: 1 - alpha + alpha e^(i theta) has an
    argument.

    Raises:
        ValueError: If there is no such path or no such point on it.
    """
    if InterpolationPath(path) is InterpolationPath.LINEAR:
        angles = rotation.angles()
        return torch.atan2(alpha * torch.sin(angles), 1 - alpha + alpha * torch.cos(angles))
    if InterpolationPath(path) is InterpolationPath.GEODESIC:
        # Nothing is to be taken apart anew.
        return torch.remainder(alpha * rotation.angles() + math.pi, 2 * math.pi) - math.pi
    return interpolate_rotation(rotation, alpha, path).angles()


def interpolate_scale(scale: Tensor, alpha: float) -> Tensor:
    """Return s^alpha where s > 0 and 1 + alpha (s - 1) elsewhere: 1 at alpha = 0, s at alpha = 1."""
    if alpha == 1:
        return scale
    return torch.where(scale > 0, scale.clamp_min(0) ** alpha, 1 + alpha * (scale - 1))
