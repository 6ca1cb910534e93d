"""The bits of floating-point numbers as integers, and the same in the order of the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_integers(x: Tensor) -> Tensor:
    """Return the bits of ``x``, the same memory: equal where two numbers are the same, with their sign of zero."""
    return x.view(_INTEGERS[x.element_size()])


def to_order(x: Tensor) -> Tensor:
    """Return a different int64 for each number, ascending; neighbours differ by 1, and so do -0 and 0."""
    bits = as_integers(x)
    largest = torch.iinfo(bits.dtype).max
    # A negative number's magnitude grows with its bits.
    return torch.where(bits < 0, -1 - (bits.long() & largest), bits.long())


def from_order(order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that ``to_order`` gave ``order`` for, in ``dtype``."""
    integer = _INTEGERS[dtype.itemsize]
    info = torch.iinfo(integer)
    return torch.where(order < 0, info.min + (-1 - order), order).to(integer).view(dtype)


def largest_step(a: Tensor, b: Tensor) -> int:
    """Return by how many numbers of their dtype two tensors are apart at most, where -0 is 0; on the CPU."""
    if not a.numel():
        return 0
    first, second = (_order_of_values(as_integers(x).numpy()) for x in (a, b))
    unsigned = f"u{first.dtype.itemsize}"
    # The difference of two signed integers always fits the unsigned ones.
    return int((np.maximum(first, second).view(unsigned) - np.minimum(first, second).view(unsigned)).max())


def _order_of_values(bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return integers in the order of the floats whose bits are given; both zeros become 0."""
    negative = bits >> (8 * bits.dtype.itemsize - 1)
    return ((bits & np.iinfo(bits.dtype).max) ^ negative) - negative
