"""An output folder on an object store that appears as nearly at once as a store allows.

Everything is written below a hidden name beside the output, ``.NAME.boft-export``, and copied to its place by the store
itself when all of it is there. The files without which no loader sees a model come last. A record that publishing has
begun stays until it has ended, so that the next run can end it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import quote

from boft_export.checkpoint.remote import RemotePath, remote_errors
from boft_export.checkpoint.staging import Files, Staging
from boft_export.errors import AccessError, UsageError

# One part of an upload; a store takes 10,000 of them, and some three are in memory.
PART_BYTES = 16 << 20
# Each of these is of use only with those before it. The manifest says that all is there.
_LAST = ("*.index.json", "config.json", "boft_export.json")
# A lock of another machine that was not renewed for so many seconds is that of a killed run.
_LOCK_LIFE = 600.0


class RemoteStaging(Staging):
    """A folder under construction on a remote file system: as ``Staging``, but for what a store can't do.

    Two runs that begin at the very same time may both take the lock where the store can't create exclusively; the one
    that loses it finds out when a later file of its own is finished, or before it publishes. While an existing output
    is replaced there is a time in which no loader sees a model there.

    Args:
        output: Where the finished folder is to appear.
        fingerprint: Stands for all that decides the output's bytes; only a run with the same one may go on.
        resume: Take over the finished files of a killed run, or end its publishing.
        overwrite: Allow ``output`` to exist.

    Raises:
        UsageError: If ``output`` exists, another run is writing it, or there is nothing fit to resume.
        AccessError: If the store can't be read or written.
    """

    def __init__(  # the base class's is for a folder
        self, output: RemotePath, fingerprint: str, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        output.refresh()
        check_remote_output(output, overwrite=overwrite)
        self.output = self._target = output
        self._root = _root(output)
        self._files = self._root / "files"
        self.done = {}
        self.discarded = False
        self._owner = uuid.uuid4().hex
        self._renewed = 0.0
        # Some file systems show what is half written: only what is known to be whole is published.
        self._whole: set[str] = set()
        if _is_publishing(output) and not (resume or overwrite):
            raise UsageError(
                f"a killed run has published only a part of {output}.",
                hint="Finish it with --resume, or start over with --overwrite.",
            )
        self._take_remote_lock()
        try:
            previous = self._read(self._root / "begun.json")
            if previous is not None and resume and previous.get("fingerprint") != fingerprint:
                raise UsageError(
                    f"{self._root} was begun with other inputs or settings and can't be resumed.",
                    hint="Run without --resume to start over.",
                )
            if previous is not None:
                self.done = self._finished()
            if not resume:
                self.discarded = bool(self.done)
                self.done = {}
                self._remove([self._files, self._root / "journal", self._root / "publishing.json"])
            self._put(self._root / "begun.json", {"fingerprint": fingerprint})
        except BaseException:
            self.keep()
            raise

    # The journal: one small object for each finished file, since no object can be added to.

    def _finished(self) -> dict[str, Mapping[str, Any]]:
        sizes = _sizes(self._files)
        entries = [e for p in (self._root / "journal").iterdir() if (e := self._read(p)) is not None]
        return {e["file"]: e for e in entries if "file" in e and sizes.get(e["file"], -1) == e.get("nbytes")}

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Note in the journal that ``name`` is finished, with what the manifest will need of it."""
        self._renew_lock()
        size = cast("int", (self._files / name).state()[0])
        entry = {"file": name, "nbytes": size, **content}
        self._put(self._root / "journal" / f"{quote(name, safe='')}.json", entry)
        self.done[name] = entry

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing in order; it is there only when it is complete."""
        with _upload(self._files / name, self._renew_lock) as file:
            yield file
        self._whole.add(name)

    @property
    def shared(self) -> Files:
        """Where other processes put files; it can be pickled."""
        return RemoteFiles(self._files)

    def hold(self) -> None:
        """Renew the lock where it is due."""
        self._renew_lock()

    # Publishing

    def publish(self) -> None:
        """Have the store put all files in their places, those first that no loader begins with."""
        self._renew_lock(now=True)
        new = sorted(self._whole.union(self.done), key=lambda n: (_rank(n), n))
        with remote_errors(self._target, "write"):
            self._put(self._root / "publishing.json", {"files": new})
            old = _sizes(self._target)
            # From here until the end no loader takes what is there for a model.
            self._remove(self._target / n for n in sorted(old, key=_rank, reverse=True) if _rank(n))
            self._copy([n for n in new if not _rank(n)])
            self._remove(self._target / n for n in old if not _rank(n) and n not in new)
            for name in new:
                if _rank(name):
                    self._copy([name])
        self.discard()

    def _copy(self, names: list[str]) -> None:
        if not names:
            return
        sources, targets = ([p / n for n in names] for p in (self._files, self._target))
        system = self._target.file_system
        for source, target in zip(sources, targets, strict=True):
            system.cp_file(source.key, target.key)
        system.invalidate_cache()
        for source, target in zip(sources, targets, strict=True):
            if source.state()[0] != target.state()[0]:
                raise AccessError(f"{target} is not as large as it was written.", hint="Go on with --resume.")

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(AccessError):
            # What another run has taken over is its own.
            if self._holds_lock():
                self._remove([self._root])

    def keep(self) -> None:
        """Leave what was written for a later ``resume``."""
        with contextlib.suppress(AccessError):
            if self._holds_lock():
                self._remove([self._root / "lock.json"])

    # The lock: an object that says whose it is.

    def _take_remote_lock(self) -> None:
        path = self._root / "lock.json"
        held = self._read(path)
        if held is not None and _is_alive(held):
            raise UsageError(
                f"another run is writing {self.output} right now (on {held.get('host')}).",
                hint="Wait for it. Of a killed run on another machine the lock ends by itself after ten minutes.",
            )
        self._put(path, self._lock_entry(), create=held is None)
        if not self._holds_lock():
            raise UsageError(f"another run began to write {self.output} at the same time.", hint="Wait for it.")

    def _lock_entry(self) -> dict[str, Any]:
        self._renewed = time.time()
        return {"owner": self._owner, "host": platform.node(), "pid": os.getpid(), "time": self._renewed}

    def _renew_lock(self, *, now: bool = False) -> None:
        if not now and time.time() - self._renewed < _LOCK_LIFE / 10:
            return
        if not self._holds_lock():
            raise UsageError(f"another run has begun to write {self.output}.", hint="Wait for it.")
        self._put(self._root / "lock.json", self._lock_entry())

    def _holds_lock(self) -> bool:
        return (self._read(self._root / "lock.json") or {}).get("owner") == self._owner

    # Objects

    def _read(self, path: RemotePath) -> dict[str, Any] | None:
        """Return a small object's JSON; None if there is none, or it is not whole."""
        try:
            with remote_errors(path):
                path.file_system.invalidate_cache(path.file_system._parent(path.key))  # noqa: SLF001
            value = json.loads(path.read_bytes())
        except AccessError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def _put(self, path: RemotePath, value: Mapping[str, Any], *, create: bool = False) -> None:
        data = json.dumps(value).encode()
        with remote_errors(path, "write"):
            system = path.file_system
            try:
                system.pipe_file(path.key, data, **({"mode": "create"} if create else {}))
            except FileExistsError:
                raise UsageError(
                    f"another run began to write {self.output} at the same time.", hint="Wait for it."
                ) from None
            except (TypeError, NotImplementedError):
                system.pipe_file(path.key, data)

    def _remove(self, paths: Iterable[RemotePath]) -> None:
        for path in paths:
            with remote_errors(path, "write"):
                system = path.file_system
                system.invalidate_cache()
                with contextlib.suppress(FileNotFoundError):
                    system.rm(path.key, recursive=True)
                system.invalidate_cache()


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a folder under construction, for other processes, also on other machines; it can be pickled.

    Attributes:
        folder: Where they are.
    """

    folder: RemotePath

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file for writing in order; it is there only when it is complete."""
        return _upload(self.folder / name)


@contextlib.contextmanager
def _upload(target: RemotePath, after: Callable[[], None] = lambda: None) -> Iterator[IO[bytes]]:
    """Open ``target`` for writing in order, with ``after`` called on each write; it is there only when complete."""
    with remote_errors(target, "write"):
        file = target.file_system.open(target.key, "wb", block_size=PART_BYTES)
    try:
        yield cast("IO[bytes]", _Upload(file, target, after))
        with remote_errors(target, "write"):
            file.close()
    except BaseException:
        with contextlib.suppress(Exception):
            file.discard()
        with contextlib.suppress(AttributeError):
            # Else it would be closed, and so be there, when it is collected.
            file.closed = True
        raise


class _Upload(io.RawIOBase):
    """A file that is only written to, in order, and whose failures are ours."""

    def __init__(self, file: IO[bytes], target: RemotePath, after: Callable[[], None]) -> None:
        super().__init__()
        self._after = after
        self._file = file
        self._target = target

    def writable(self) -> bool:
        """Tell that it can be written."""
        return True

    def write(self, data: Any) -> int:  # noqa: ANN401  # whatever is a buffer
        """Write all of ``data``."""
        with remote_errors(self._target, "write"):
            self._file.write(data)
        self._after()
        return len(data)


def check_remote_output(output: RemotePath, *, overwrite: bool) -> None:
    """Refuse an output that may not be written.

    Raises:
        UsageError: If it is a bucket, a file, or a folder with content and ``overwrite`` is off.
        AccessError: If it can't be looked up.
    """
    if len(output.parts) < 2:
        raise UsageError(f"{output} is a whole bucket.", hint=f"Name a folder in it: -o {output}/merged.")
    if output.is_file():
        raise UsageError(f"{output} exists and is not a folder.", hint="Choose another -o.")
    # Of what a killed run published in part, the staging decides.
    if not overwrite and any(True for _ in output.iterdir()) and not _is_publishing(output):
        raise UsageError(f"{output} exists.", hint="Choose another -o, or replace it with --overwrite.")


def _root(output: RemotePath) -> RemotePath:
    return output.with_name(f".{output.name}.boft-export")


def _is_publishing(output: RemotePath) -> bool:
    return (_root(output) / "publishing.json").is_file()


def _rank(name: str) -> int:
    """Return how late a file is published; 0 for no matter when."""
    base = name.rsplit("/", 1)[-1]
    return next((i for i, n in enumerate(_LAST, 1) if base == n or (n[0] == "*" and base.endswith(n[1:]))), 0)


def _sizes(folder: RemotePath) -> dict[str, int]:
    """Return the size of each file below a folder, asked anew."""
    with remote_errors(folder):
        system, key = folder.file_system, folder.key.rstrip("/")
        system.invalidate_cache()
        found = system.find(key, detail=True)
    return {n[len(key) :].lstrip("/"): int(i["size"]) for n, i in found.items() if n.rstrip("/") != key}


def _is_alive(lock: Mapping[str, Any]) -> bool:
    """Tell whether the run that holds a lock may still go on."""
    if lock.get("host") == platform.node() and isinstance(lock.get("pid"), int):
        try:
            os.kill(lock["pid"], 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
    return time.time() - float(lock.get("time", 0)) < _LOCK_LIFE
