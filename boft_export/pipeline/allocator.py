"""Telling the C library's allocator what a merge needs of it."""

from __future__ import annotations

import ctypes
import gc

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
# Between a tile and a chunk.
_LARGE = 4 << 20
_KEPT = 32 << 20


def keep_tiles_free_chunks() -> None:
    """Have freed tiles kept for the next tile, and freed chunks given back to the system at once.

    A fold takes and frees the same megabyte thousands of times; having the system clear its pages each time costs
    as much as the fold itself (benchmarks/stages.py). Chunks pass from thread to thread, and would pile up in each
    of their reserves, beyond the bound on memory. By default glibc moves this border as it goes; from here on it
    stays, for the whole process. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)


def give_back_freed() -> None:
    """Give the system back what was freed in small pieces, and what only waited for the garbage collector."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
