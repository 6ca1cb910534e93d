"""Products by torch, to the same bits whatever the machine's number of cores."""

from __future__ import annotations

import threading


class OneTorchThread:
    """Lets torch compute on the calling thread alone while that is inside.

    A product that is split over threads may be summed in another order. The work is spread over tiles instead, each
    computed by one thread, so that the bytes are the same for any number of them.

    torch's limit is each thread's own, and whoever sets it also sets that of threads to come. So each sets it for
    itself, and back to what it was before anyone came.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = 1
        self._own = threading.local()

    def __enter__(self) -> None:
        """Set the limit."""
        import torch

        self._own.depth = getattr(self._own, "depth", 0) + 1
        if self._own.depth > 1:
            return
        with self._lock:
            if not self._inside:
                self._usual = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        """Lift the limit."""
        import torch

        self._own.depth -= 1
        if self._own.depth:
            return
        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._usual)


ONE_TORCH_THREAD = OneTorchThread()
