"""Rounding float64 results once."""

from __future__ import annotations

import torch
from torch import Tensor

# float32 keeps 23 of float64's 52 fraction bits.
_DROPPED = 52 - 23
_MASK = (1 << _DROPPED) - 1
# The exponent bits of a bfloat16, and their value for the smallest normal numbers; zeros and subnormals have less.
_BF16_EXPONENT = 0x7F80
_BF16_LOWEST_NORMAL = 0x0080
# The spacing of bfloat16's subnormals and of its smallest normal numbers.
_BF16_QUANTUM = 2.0**-133


def round_once(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``, each element rounded once, to nearest with ties to even.

    torch casts float64 to bfloat16 or float16 by way of float32 and so rounds twice. Here the value is first rounded
    to odd at float32's width: the dropped bits are or-ed into the last kept one, after which a second rounding gives
    what a single one would have. Source: Boldo and Melquiond, "When double rounding is odd" (IMACS 2005).

    Args:
        x: Any shape, float64 or narrower; overwritten nowhere.
        dtype: The dtype to round to.
    """
    if x.dtype is not torch.float64 or dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    bits = x.view(torch.int64)
    odd = (bits & _MASK).add_(_MASK).bitwise_or_(bits).bitwise_and_(~_MASK).view(torch.float64)
    rounded = odd.to(torch.float32).to(dtype)
    if dtype is torch.bfloat16:
        # bfloat16 and float32 share their exponent range, so among its subnormals float32 has no 23 fraction bits to
        # round to odd at. (float16's subnormals are far inside float32's normal range.) The largest of them may have
        # been rounded up to a normal number.
        exponents = rounded.view(torch.int16) & _BF16_EXPONENT
        # The smallest is found several times as fast as the comparisons are made.
        if exponents.numel() and int(exponents.amin()) <= _BF16_LOWEST_NORMAL:
            tiny = exponents <= _BF16_LOWEST_NORMAL
            exact = torch.round(x[tiny] / _BF16_QUANTUM) * _BF16_QUANTUM
            rounded[tiny] = exact.to(dtype)
    return rounded
