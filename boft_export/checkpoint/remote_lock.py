"""A lock on a store: an object that says whose it is, renewed by a thread for as long as it is held."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boft_export.checkpoint.remote import RemotePath
from boft_export.checkpoint.remote_objects import put_json, read_json, remove
from boft_export.errors import AccessError, UsageError

# A lock that was not renewed for so many seconds is that of a killed run.
_LIFE = 600.0


class RemoteLock:
    """The right to write an output, until it is released.

    Two runs that begin at the very same time may both take it where the store can't create exclusively; the one that
    loses it is told at its next ``check``.

    Args:
        path: The object.
        output: What it is for.

    Raises:
        UsageError: If another run holds it.
        AccessError: If the store can't be read or written.
    """

    def __init__(self, path: RemotePath, output: RemotePath) -> None:
        self.owner = uuid.uuid4().hex
        self.path = path
        self._output = output
        self._lost = False
        self._take()
        self._end = threading.Event()
        # A daemon: a run that ends without a word must not be kept alive by its lock.
        self._thread = threading.Thread(target=self._renew, name="boft-export lock", daemon=True)
        self._thread.start()

    def check(self, *, anew: bool = False) -> None:
        """Fail where another run has taken the lock over.

        Args:
            anew: Ask the store now, and not only what the last renewal found.

        Raises:
            UsageError: If so.
            AccessError: If the store can't be asked.
        """
        if self._lost or (anew and not self.is_held()):
            raise UsageError(f"another run has begun to write {self._output}.", hint="Wait for it.")

    def is_held(self) -> bool:
        """Tell whether the lock is still this run's, as the store has it.

        Raises:
            AccessError: If the store can't be asked.
        """
        return (read_json(self.path) or {}).get("owner") == self.owner

    def release(self) -> None:
        """Give the lock back, if it still is this run's.

        Raises:
            AccessError: If the store can't be asked.
        """
        self.stop()
        if self.is_held():
            remove(self.path.parent, [self.path.key])

    def abandon(self) -> None:
        """Give the lock back where it can't be removed: it is nobody's then, or ends by itself."""
        self.stop()
        with contextlib.suppress(AccessError):
            if self.is_held():
                put_json(self.path, {})

    def stop(self) -> None:
        """Renew the lock no more."""
        self._end.set()
        self._thread.join()

    def _take(self) -> None:
        held = read_json(self.path)
        if held is not None and _is_alive(held):
            raise UsageError(
                f"another run is writing {self._output} right now (on {held.get('host')}).",
                hint="Wait for it. Of a killed run on another machine the lock ends by itself after ten minutes.",
            )
        try:
            put_json(self.path, self._entry(), create=held is None)
        except AccessError:
            # Either another was faster, or the store can't create exclusively, which each says in its own way.
            if held is not None or read_json(self.path) is None:
                put_json(self.path, self._entry())
        if not self.is_held():
            raise UsageError(f"another run began to write {self._output} at the same time.", hint="Wait for it.")

    def _entry(self) -> dict[str, Any]:
        return {"owner": self.owner, **_process_space(), "pid": os.getpid(), "time": time.time()}

    def _renew(self) -> None:
        """Renew the lock until it is released, or another run's."""
        while not self._end.wait(_LIFE / 10):
            # A store that can't be reached may be there the next time; whoever has to know asks it by himself.
            with contextlib.suppress(AccessError):
                if not self.is_held():
                    self._lost = True
                    return
                put_json(self.path, self._entry())


def _process_space() -> dict[str, Any]:
    """Return what two processes share whose numbers are of one kind: containers may have one host name."""
    space: dict[str, Any] = {"host": platform.node(), "boot": None, "space": None}
    with contextlib.suppress(OSError):
        space["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space["space"] = Path("/proc/self/ns/pid").stat().st_ino
    return space


def _is_alive(lock: Mapping[str, Any]) -> bool:
    """Tell whether the run that holds a lock may still go on; an entry that makes no sense is nobody's."""
    pid, renewed = lock.get("pid"), lock.get("time")
    if isinstance(pid, int) and all(lock.get(k) == v for k, v in _process_space().items()):
        try:
            os.kill(pid, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except PermissionError:
            pass
    try:
        # A time that is far ahead is no better than one that is long ago.
        return isinstance(renewed, int | float) and abs(time.time() - renewed) < _LIFE
    except OverflowError:
        return False
