"""An output folder that appears whole or not at all.

Everything is written in a hidden folder beside the output, ``.NAME.boft-export``, and renamed when it is complete and
flushed. A journal there names each finished file, so that a killed run can go on where it stopped.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, overload

from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.remote import RemotePath
from boft_export.errors import AccessError, ResourceError, UsageError

_JOURNAL = "journal.jsonl"
_FILES = "files"
_PARTS = "parts"
_LOCK = "lock"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def file_system_errors(path: AnyPath) -> Iterator[None]:
    """Turn the operating system's errors on ``path`` into ours: a full disk is a lack of resources."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk is full: writing {path} failed.",
                hint="Free some space, then run again: a merge goes on with --resume.",
            ) from error
        raise AccessError(f"cannot write {path}: {error.strerror or error}.") from error


@contextlib.contextmanager
def write_whole(target: Path, partial: Path | None = None) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name only when it is complete and flushed to disk.

    Args:
        target: The file.
        partial: Its name until then; by default one beside it.

    Raises:
        ResourceError: If the disk is full.
        AccessError: If the file can't be written.
    """
    partial = partial or target.with_name(target.name + ".partial")
    with file_system_errors(target):
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class Files(Protocol):
    """Where files of a folder under construction are put."""

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file for writing; it is there only when it is complete."""


class Journalled(Files, Protocol):
    """The same, and where it is noted that they are finished."""

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Note that ``name`` is finished, with what the manifest will need of it."""


@dataclass(frozen=True)
class SharedFiles:
    """The files of a folder under construction, for other processes, also on other machines; it can be pickled.

    Several may write the same file at once, as where one was given up that still runs: each has its own until it is
    complete, and none of these is ever published. What is complete lies in a folder of the one run; the end of that, or
    the next one, removes it: what still runs then has nowhere to put what it wrote.

    Attributes:
        parts: The run's folder.
    """

    parts: Path

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing; it gets its name only when it is complete and flushed to disk.

        Raises:
            ResourceError: If the disk is full.
            AccessError: If the file can't be written, the folder is not seen here, or the run is over.
        """
        target = part_of(self.parts, name)
        with write_whole(target, target.with_name(f"{target.name}.{uuid.uuid4().hex}")) as file:
            yield file


def part_of(parts: Path, name: str) -> Path:
    """Return where another process puts a file: in no folder of its own, since none may be made there."""
    return parts / name.replace("%", "%25").replace("/", "%2F")


class Staging(Journalled, ABC):
    """A folder under construction, on disk or on a remote file system.

    Attributes:
        output: Where the finished folder is to appear.
        done: What the journal has of each finished file.
        discarded: Finished files of an earlier run were not taken over.
        left: What could not be removed at the end, and why.
    """

    def __init__(self, output: AnyPath) -> None:
        self.output = output
        self.done: dict[str, Mapping[str, Any]] = {}
        self.discarded = False
        self.left: str | None = None

    @property
    @abstractmethod
    def shared(self) -> Files:
        """Where other processes put files; it can be pickled. What they finish is for this one to record."""

    @abstractmethod
    def publish(self) -> None:
        """Put the folder in its place, and forget the journal."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what was written."""

    @abstractmethod
    def keep(self) -> None:
        """Leave what was written for a later ``resume``."""


class LocalStaging(Staging):
    """A folder under construction on disk.

    Args:
        output: Where the finished folder is to appear.
        fingerprint: Stands for all that decides the output's bytes; only a run with the same one may go on.
        resume: Take over the finished files of a killed run.
        overwrite: Allow ``output`` to exist; it is replaced in one step at the end.

    Attributes:
        root: The hidden folder.
        files: What will be the output, in it.

    Raises:
        UsageError: If ``output`` exists, another run is writing it, or there is nothing fit to resume.
        AccessError: If the folder cannot be made.
    """

    def __init__(self, output: Path, fingerprint: str, *, resume: bool = False, overwrite: bool = False) -> None:
        check_output(output, overwrite=overwrite)
        self._place = output = _place(output)
        self._overwrite = overwrite
        super().__init__(output)
        self.root = output.parent / f".{output.name}.boft-export"
        self.files = self.root / _FILES
        self._parts = self.root.absolute() / _PARTS / uuid.uuid4().hex
        with file_system_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
            journal = self.root / _JOURNAL
            previous = self._read_journal()
            if resume and previous is not None and previous[0] == fingerprint:
                self.done = previous[1]
            else:
                if resume and previous is not None:
                    self._lock.close()
                    raise UsageError(
                        f"{self.root} was begun with other inputs or settings and can't be resumed.",
                        hint="Run without --resume to start over.",
                    )
                self.discarded = previous is not None and bool(previous[1])
                self._clear()
                self.files.mkdir()
            # What was being written when a run was killed is not in the journal.
            for leftover in self.files.rglob("*.partial"):
                leftover.unlink()
            shutil.rmtree(self.root / _PARTS, ignore_errors=True)
            # Written anew, so that no line cut short stands before those to come.
            with write_whole(journal) as file:
                records = ({"fingerprint": fingerprint}, *self.done.values())
                file.writelines(json.dumps(r).encode() + b"\n" for r in records)

    def _clear(self) -> None:
        """Remove what a killed run left, scratch included."""
        for path in self.root.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)

    def _take_lock(self) -> IO[str]:
        lock = (self.root / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UsageError(f"another run is writing {self.output} right now.", hint="Wait for it.") from None
        return lock

    def _read_journal(self) -> tuple[str, dict[str, Mapping[str, Any]]] | None:
        """Return the fingerprint and the finished files; a last line cut short by a kill counts as not written."""
        fingerprint: str | None = None
        done: dict[str, tuple[int, Mapping[str, Any]]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            first, *rest = (self.root / _JOURNAL).read_text().splitlines()
            fingerprint = json.loads(first)["fingerprint"]
            for line in rest:
                record = json.loads(line)
                done[record["file"]] = record["nbytes"], record
        if fingerprint is None:
            return None
        return fingerprint, {n: r for n, (size, r) in done.items() if _size(self.files / n) == size}

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing; it gets its name only when it is complete and flushed to disk."""
        target = self.files / name
        with file_system_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with write_whole(target) as file:
            yield file

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Note in the journal that ``name`` is finished, with what the manifest will need of it."""
        target = self.files / name
        with file_system_errors(target):
            if (part := part_of(self._parts, name)).exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                part.replace(target)
            entry = {"file": name, "nbytes": target.stat().st_size, **content}
        with file_system_errors(self.root), (self.root / _JOURNAL).open("a") as journal:
            journal.write(json.dumps(entry) + "\n")
            journal.flush()
            os.fsync(journal.fileno())
        self.done[name] = entry

    @property
    def shared(self) -> Files:
        """Where other processes put files; it can be pickled. What they finish is for this one to record."""
        with file_system_errors(self._parts):
            self._parts.mkdir(parents=True, exist_ok=True)
        return SharedFiles(self._parts)

    def publish(self) -> None:
        """Put the folder in its place in one step, and forget the journal.

        Raises:
            UsageError: If something has come to lie there that may not be replaced.
        """
        check_output(self._place, overwrite=self._overwrite)
        with file_system_errors(self._place):
            for folder in [p for p in self.files.rglob("*") if p.is_dir()] + [self.files]:
                _sync_folder(folder)
            if self._place.is_dir() and any(self._place.iterdir()):
                # What is replaced comes to lie where the finished files were: no later run may take it for them.
                journal = self.root / _JOURNAL
                aside = journal.rename(self.root / f"{_JOURNAL}.aside")
                try:
                    _exchange(self.files, self._place)
                except OSError:
                    aside.rename(journal)
                    raise
            else:
                self.files.replace(self._place)
        # The output is there: that its name may not outlast a power failure is no reason to call the run failed.
        with contextlib.suppress(OSError):
            _sync_folder(self._place.parent)
        self.discard()

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()

    def keep(self) -> None:
        """Leave what was written for a later ``resume``."""
        self._lock.close()


def check_output(output: AnyPath, *, overwrite: bool) -> None:
    """Refuse an output that may not be written.

    Raises:
        UsageError: If it is a file, a folder that can't be replaced, or one with content and ``overwrite`` is off.
    """
    if isinstance(output, RemotePath):
        from boft_export.checkpoint.remote_staging import check_remote_output

        check_remote_output(output, overwrite=overwrite)
        return
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} exists and is not a folder.", hint="Choose another -o.")
    real = Path(os.path.realpath(output))
    with contextlib.suppress(FileNotFoundError):
        if Path.cwd().is_relative_to(real):
            raise UsageError(f"{output} is, or holds, the current folder.", hint="Name a folder in it: -o merged.")
    if os.path.ismount(real):
        raise UsageError(f"{output} is a mount point, which can't be replaced.", hint=f"Use -o {output / 'merged'}.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise UsageError(f"{output} exists.", hint="Choose another -o, or replace it with --overwrite.")


def open_staging(output: AnyPath, fingerprint: str, *, resume: bool = False, overwrite: bool = False) -> Staging:
    """Begin a folder, on disk or on a remote file system.

    Args: see ``LocalStaging``.

    Raises:
        BoftExportError: As ``LocalStaging`` and ``RemoteStaging`` do.
    """
    if not isinstance(output, RemotePath):
        return LocalStaging(output, fingerprint, resume=resume, overwrite=overwrite)
    from boft_export.checkpoint.remote_staging import RemoteStaging

    return RemoteStaging(output, fingerprint, resume=resume, overwrite=overwrite)


@overload
def free_bytes(folder: Path) -> int: ...


@overload
def free_bytes(folder: AnyPath) -> int | None: ...


def free_bytes(folder: AnyPath) -> int | None:
    """Return the free space where ``folder`` is, or will be; None of a store, which has no end."""
    if isinstance(folder, RemotePath):
        return None
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _place(output: Path) -> Path:
    """Return the path that can be renamed to: what a link points at, and a name in place of ``..``."""
    return Path(os.path.realpath(output)) if output.is_symlink() or output.name in {"", ".."} else output


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Swap two folders; in one step where the system can (Linux's renameat2), else by two renames."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):
            paths = os.fsencode(new), os.fsencode(old)
            if libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
                return
    aside = new.with_name("replaced")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
