"""Buffers that are used again and again, so that the system need not clear fresh pages for each."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Buffer = NDArray[np.uint8]

# Smaller ones come from the allocator's own reserves.
_SMALL = 256 << 10


class BufferPool:
    """Buffers, each of which goes back when it is no longer needed.

    Args:
        limit: Bytes that are kept, those in use included, as far as more are not in use.
        pinned: Take page-locked memory, from which a GPU fetches on its own.
    """

    def __init__(self, limit: int, *, pinned: bool = False) -> None:
        self._limit = limit
        self._make: Callable[[int], Buffer] = _pinned if pinned else _plain
        self._lock = threading.Lock()
        self._free: OrderedDict[int, list[Buffer]] = OrderedDict()
        self._held = 0

    def take(self, size: int) -> Buffer:
        """Return a buffer of ``size`` bytes, uint8, with anything in it."""
        if size < _SMALL:
            return self._make(size)
        with self._lock:
            if self._free.get(size):
                return self._free[size].pop()
            self._held += size
            self._shrink()
        return self._make(size)

    def give(self, buffer: Buffer) -> None:
        """Take a buffer back."""
        size = len(buffer)
        if size < _SMALL:
            return
        with self._lock:
            self._free.setdefault(size, []).append(buffer)
            self._free.move_to_end(size)
            self._shrink()

    def _shrink(self) -> None:
        """Let go of free buffers, first of the sizes that were not used for longest."""
        while self._held > self._limit and (size := next((s for s, b in self._free.items() if b), None)) is not None:
            self._free[size].pop()
            self._held -= size


def _plain(size: int) -> Buffer:
    return np.empty(size, np.uint8)


def _pinned(size: int) -> Buffer:
    import torch

    found: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return found  # type: ignore[no-any-return]
