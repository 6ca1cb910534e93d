"""Products of large blocks by numpy, to the same bits whatever the machine's number of cores."""

from __future__ import annotations

import threading
from typing import Any

# Blocks of up to this size are done by one thread anyway.
LARGEST_ALONE = 64


class OneBlasThread:
    """Lets numpy's BLAS compute on the calling thread alone while any thread is inside.

    What is split over threads is summed in another order. The limit is the process's, so it is set by the thread that
    comes first and lifted by the one that leaves last.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        """Set the limit."""
        from threadpoolctl import threadpool_limits

        with self._lock:
            if not self._inside:
                self._limit = threadpool_limits(1, user_api="blas")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        """Lift the limit."""
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._limit.restore_original_limits()


ONE_BLAS_THREAD = OneBlasThread()
