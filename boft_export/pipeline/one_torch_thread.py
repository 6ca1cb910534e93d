"""Products by torch, to the same bits whatever the machine's number of cores."""

from __future__ import annotations

import threading


class OneTorchThread:
    """Lets torch compute on the calling thread alone while it is inside.

    A product that is split over threads may be summed in another order. The work is spread over tiles instead, each
    computed by one thread, so that the bytes are the same for any number of them. torch's limit is each thread's own,
    and that of threads to come: who leaves last sets that to what it was.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1

    def __enter__(self) -> None:
        """Set the limit."""
        import torch

        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        """Lift the limit."""
        import torch

        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


ONE_TORCH_THREAD = OneTorchThread()
