"""Values that several threads need and that are dear to make."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Kept(Generic[K, V]):
    """Values made once each, however many threads ask at once; those used last are kept.

    Args:
        limit: The size that those kept may have in all; the newest one is kept in any case.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[K, tuple[Future[V], int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, size: int, make: Callable[[], V]) -> V:
        """Return the value of ``key``, which ``make`` makes where it isn't kept and which counts as ``size``.

        Raises:
            BaseException: What ``make`` raised, for all who ask.
        """
        with self._lock:
            entry = self._entries.get(key)
            mine = entry is None
            if entry is None:
                entry = self._entries[key] = Future(), size
                self._size += size
                while self._size > self._limit and len(self._entries) > 1:
                    self._size -= self._entries.popitem(last=False)[1][1]
            else:
                self._entries.move_to_end(key)
        future = entry[0]
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001  # it is raised where the value is asked for
                future.set_exception(error)
        return future.result()
