"""Hyperspherical energy: how evenly a layer's neurons point in all directions."""

from __future__ import annotations

import torch
from torch import Tensor

# Neurons whose directions are closer than this are taken for one: their distance is rounding.
_SAME = 1e-6


def hyperspherical_energy(neurons: Tensor) -> float | None:
    """Return the mean of 1 / |u_i - u_j| over pairs of neurons' directions u; None where there is no pair.

    A rotation of the neurons, and a positive scale of each, leave it as it is. The sum over all pairs is the energy of
    Liu et al., "Learning towards Minimum Hyperspherical Energy" (NeurIPS 2018), with s = 1, in full space; pairs of one
    direction, for which it has no value, are left out, and so are neurons that are zero.

    Args:
        neurons: One in each row, shape (r, n), float64. O(r^2 n).
    """
    length = torch.linalg.vector_norm(neurons, dim=1)
    directions = neurons[length > 0] / length[length > 0, None]
    row, column = torch.triu_indices(len(directions), len(directions), 1)
    squared = (2 - 2 * (directions @ directions.T)[row, column]).clamp_min(0)
    squared = squared[squared > _SAME**2]
    return float(squared.rsqrt().mean()) if len(squared) else None
