"""Threads that share the work on a stream of tasks, and lines in which parts of it keep their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Line:
    """Work that is done one piece at a time, in the order of its tickets, by whichever thread comes by.

    Whoever brings a piece does it if it is next, and then all that wait behind it; else it is left for whoever does
    the one before. So nobody waits, and no thread is kept for it alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Callable[[], None]] = {}
        self._tickets = 0
        self._next = 0
        self._busy = False

    def ticket(self) -> int:
        """Return the next place in the line."""
        with self._lock:
            self._tickets += 1
            return self._tickets - 1

    def put(self, ticket: int, work: Callable[[], None]) -> None:
        """Do ``work`` when its turn comes, now or by another thread."""
        with self._lock:
            self._waiting[ticket] = work
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                piece = self._waiting.pop(self._next, None)
                if piece is None:
                    self._busy = False
                    return
                self._next += 1
            piece()


class Crew(Generic[T]):
    """Threads that each take the next task and do all of it.

    Args:
        size: How many threads.
        tasks: The tasks; asked for by one thread at a time.
        do: Does one; called by several threads at once.
        end: Called once, by the last thread, when there is nothing more to do or something failed.
        stop: Called once when something failed, to wake whoever waits in ``tasks`` or ``do``.
    """

    def __init__(
        self,
        size: int,
        tasks: Iterator[T],
        do: Callable[[T], None],
        end: Callable[[], None],
        stop: Callable[[], None],
    ) -> None:
        self._tasks = tasks
        self._do = do
        self._end = end
        self._stop = stop
        self._lock = threading.Lock()
        self._stopped = False
        self._running = size
        self.failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, name=f"crew-{i}", daemon=True) for i in range(size)]

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: If the system allows no more threads; those that were started have ended.
        """
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close()
            raise

    def join(self) -> None:
        """Wait until all is done, or something failed and every thread has ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def close(self) -> None:
        """Let each thread end after what it is at, and wait for that."""
        self.fail(None)
        self.join()

    def check(self) -> None:
        """Raise what failed first, if anything did."""
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if self._stopped or (task := next(self._tasks, None)) is None:
                        return
                self._do(task)
        except BaseException as error:  # noqa: BLE001  # it is raised where the crew is waited for
            self.fail(error)
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self._end()

    def fail(self, error: BaseException | None) -> None:
        """Stop; for ``error``, where that is why."""
        if self.failure is None:
            self.failure = error
        if not self._stopped:
            self._stopped = True
            self._stop()
