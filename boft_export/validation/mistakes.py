"""What merges are known to get wrong, each as what it makes of a layer's operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boft_export.linalg.rotation import Factor, Rotation
from boft_export.pipeline.layers import LayerOperator


@dataclass(frozen=True)
class Mistake:
    """Something that merges get wrong: what it does to a layer's operator."""

    finding: str
    message: str
    change: Callable[[LayerOperator], LayerOperator]


def without_rotation(operator: LayerOperator) -> LayerOperator:
    """Return an operator that only scales."""
    return replace(operator, rotation=Rotation((operator.rotation.factors[0].identity(),)))


def _inverse(operator: LayerOperator) -> LayerOperator:
    factors = tuple(_transposed(f) for f in reversed(operator.rotation.factors))
    return replace(operator, rotation=Rotation(factors))


def _transposed(factor: Factor) -> Factor:
    return Factor(factor.blocks.mT.contiguous(), factor.index)


def _with_factors(
    choose: Callable[[tuple[Factor, ...]], tuple[Factor, ...]],
) -> Callable[[LayerOperator], LayerOperator]:
    def change(operator: LayerOperator) -> LayerOperator:
        chosen = choose(operator.rotation.factors)
        return replace(operator, rotation=Rotation(chosen)) if chosen else without_rotation(operator)

    return change


def _with_scale(choose: Callable[[Tensor], Tensor]) -> Callable[[LayerOperator], LayerOperator]:
    def change(operator: LayerOperator) -> LayerOperator:
        return operator if operator.scale is None else replace(operator, scale=choose(operator.scale))

    return change


_AS_IT_IS = Mistake("", "", lambda operator: operator)
_UNROTATED = Mistake("rotation-dropped", "it is not rotated", without_rotation)
_ROTATION_MISTAKES = (
    _AS_IT_IS,
    Mistake("transposed-rotation", "it is rotated by R in place of R^T, the other way round", _inverse),
    _UNROTATED,
    Mistake("applied-twice", "it is rotated twice", _with_factors(lambda f: f + f)),
)
# Of several factors.
_FACTOR_MISTAKES = (
    Mistake("factors-reversed", "its factors are applied in reverse order", _with_factors(lambda f: f[::-1])),
    Mistake(
        "transposed-blocks", "each of its factors is transposed", _with_factors(lambda f: tuple(map(_transposed, f)))
    ),
)
_DROPPED = Mistake("scale-dropped", "its outputs are not scaled", _with_scale(torch.ones_like))
_SCALE_MISTAKES = (
    _AS_IT_IS,
    _DROPPED,
    Mistake("scale-twice", "its outputs are scaled twice", _with_scale(torch.square)),
    Mistake("scale-inverted", "its outputs are scaled by 1 / s", _with_scale(torch.reciprocal)),
)


def _left_out(i: int, factors: int) -> Mistake:
    change = _with_factors(lambda f: f[:i] + f[i + 1 :])
    return Mistake("factor-ignored", f"factor {i} of {factors} was left out", change)


def _alone(i: int, factors: int) -> Mistake:
    return Mistake("factor-ignored", f"only factor {i} of {factors} was applied", _with_factors(lambda f: f[i : i + 1]))


def mistakes(factors: int) -> Iterator[tuple[Mistake, Mistake]]:
    """Yield what may happen to a layer of ``factors`` factors, to its rotation and to its scale, the simplest first."""
    yield _UNROTATED, _DROPPED
    rotations = [*_ROTATION_MISTAKES]
    if factors > 1:
        rotations += [*_FACTOR_MISTAKES, *(_left_out(i, factors) for i in range(factors))]
    if factors > 2:
        rotations += [_alone(i, factors) for i in range(factors)]
    yield from ((r, s) for r in rotations for s in _SCALE_MISTAKES if r.finding or s.finding)
