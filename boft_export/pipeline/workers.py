"""Threads that compare tensors, a block each, with results in the order of the blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from boft_export.pipeline.memory import usable_cores
from boft_export.pipeline.one_torch_thread import ONE_TORCH_THREAD

T = TypeVar("T")
R = TypeVar("R")

# Blocks that wait for their turn while the first of them is worked at.
_AHEAD = 1
# More than a disk can feed.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Workers:
    """Threads, and how many there are."""

    pool: ThreadPoolExecutor
    jobs: int

    def in_order(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield results in the order of the items, of which only a few are worked at ahead."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self.pool.submit(function, item))
                if len(waiting) > self.jobs + _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def default_workers() -> int:
    """Return how many threads compare: all cores, as each of them reads what it compares."""
    return min(_MOST_WORKERS, usable_cores())


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """Start threads, each of which computes on its own."""
    with ONE_TORCH_THREAD, ThreadPoolExecutor(jobs, "compare", lambda: torch.set_num_threads(1)) as pool:
        yield Workers(pool, jobs)
