"""Keeping freed memory for the next tile."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT = 64 << 20


def keep_freed_memory() -> None:
    """Tell the C library not to hand tiles back to the system each time they are freed.

    A fold frees and takes the same few megabytes thousands of times, and having the system clear their pages each time
    costs as much as the fold itself (benchmarks/stages.py). Affects the whole process, so only the program does it,
    never the library. Without glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _KEPT // 2)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
