"""An output folder on an object store that appears as nearly at once as a store allows.

Everything is written below a hidden name beside the output, ``.NAME.boft-export``, and copied to its place by the store
itself when all of it is there. The files without which no loader sees a model come last. A record that publishing has
begun stays until it has ended, so that the next run can end it.

What a run writes lies below a name of that run's own, so that whatever still works for one that is over does no harm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any, cast
from urllib.parse import quote

from boft_export.checkpoint.remote import RemotePath, remote_errors
from boft_export.checkpoint.remote_lock import RemoteLock
from boft_export.checkpoint.remote_objects import put_json, read_json, remove, sizes, upload
from boft_export.checkpoint.staging import Files, Staging
from boft_export.errors import AccessError, UsageError

# Each of these is of use only with those before it. The manifest says that all is there.
_LAST = ("*.index.json", "config.json", "boft_export.json")
_FINISH = "Finish it with --resume."


class RemoteStaging(Staging):
    """A folder under construction on a remote file system: as ``LocalStaging``, but for what a store can't do.

    While an existing output is replaced there is a time in which no loader sees a model there.

    Args:
        output: Where the finished folder is to appear.
        fingerprint: Stands for all that decides the output's bytes; only a run with the same one may go on.
        resume: Take over the finished files of a killed run, or end its publishing.
        overwrite: Allow ``output`` to exist.

    Raises:
        UsageError: If ``output`` exists, another run is writing it, or there is nothing fit to resume.
        AccessError: If the store can't be read or written.
    """

    def __init__(self, output: RemotePath, fingerprint: str, *, resume: bool = False, overwrite: bool = False) -> None:
        output.refresh()
        check_remote_output(output, overwrite=overwrite)
        super().__init__(output)
        self._overwrite = overwrite
        self._target = output
        self._root = _root(output)
        # Some file systems show what is half written: only what is known to be whole is published.
        self._whole: set[str] = set()
        if _is_publishing(output) and not (resume or overwrite):
            raise UsageError(
                f"a killed run has published only a part of {output}.",
                hint="Finish it with --resume, or start over with --overwrite.",
            )
        self._held = RemoteLock(self._root / "lock.json", output)
        try:
            # Another run may have ended since.
            output.refresh()
            check_remote_output(output, overwrite=overwrite)
            self._is_partial = _is_publishing(output)
            previous = read_json(self._root / "begun.json")
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
            self._clear()
            put_json(self._root / "begun.json", {"fingerprint": fingerprint})
        except BaseException:
            self.keep()
            raise

    def _file(self, name: str) -> RemotePath:
        """Return where a file is until it is published: what was taken over lies with the run that wrote it."""
        run = self.done[name]["run"] if name in self.done else self._held.owner
        return self._root / "files" / run / name

    def _clear(self) -> None:
        """Remove what earlier runs left, but for what is taken over and that publishing has begun."""
        kept = {self._held.path, self._root / "publishing.json"}
        if self.done:
            kept |= {self._root / "begun.json", *map(self._file, self.done), *map(self._entry, self.done)}
        keys = {p.key for p in kept}
        # In the order of names, in which the one comes first that makes a journal of the others.
        remove(self._root, sorted(k for k in sizes(self._root) if k not in keys))

    # The journal: one small object for each finished file, since no object can be added to.

    def _entry(self, name: str) -> RemotePath:
        return self._root / "journal" / f"{quote(name, safe='')}.json"

    def _finished(self) -> dict[str, Mapping[str, Any]]:
        there = sizes(self._root / "files")
        entries = [e for p in (self._root / "journal").iterdir() if (e := read_json(p)) is not None]
        return {
            e["file"]: e
            for e in entries
            if isinstance(e.get("file"), str) and isinstance(e.get("run"), str)
            if there.get((self._root / "files" / e["run"] / e["file"]).key, -1) == e.get("nbytes")
        }

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Note in the journal that ``name`` is finished, with what the manifest will need of it."""
        self._held.check()
        run = self._held.owner
        size = cast("int", (self._root / "files" / run / name).state()[0])
        entry = {"file": name, "nbytes": size, "run": run, **content}
        put_json(self._entry(name), entry)
        self.done[name] = entry

    @contextlib.contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file for writing in order; it is there only when it is complete."""
        self._held.check()
        with self.shared.write(name) as file:
            yield file
        self._whole.add(name)

    @property
    def shared(self) -> Files:
        """Where other processes put files; it can be pickled."""
        return RemoteFiles(self._root / "files" / self._held.owner)

    # Publishing

    def publish(self) -> None:
        """Have the store put all files in their places, those first that no loader begins with."""
        self._held.check(anew=True)
        # Something may have come to lie there since.
        self._target.refresh()
        check_remote_output(self._target, overwrite=self._overwrite)
        self._is_partial = True
        cut = f"publishing {self._target} was cut short"
        try:
            with remote_errors(self._target, "write"):
                self._publish()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {cut}. {_FINISH}") from None
        except AccessError as error:
            raise AccessError(f"{cut}: {error.message}", hint=f"{error.hint or ''} {_FINISH}".strip()) from error
        self._is_partial = False
        try:
            self.discard()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {self._target} was published.") from None

    def _publish(self) -> None:
        begun = self._root / "publishing.json"
        put_json(begun, {})
        made, old = sizes(self._root / "files"), sizes(self._target)
        new = sorted(self._whole.union(self.done), key=lambda n: (_rank(n), n))
        first = [n for n in new if not _rank(n)]
        # From here until the end no loader takes what is there for a model.
        remove(self._target, sorted((k for k in old if _rank(k)), key=_rank, reverse=True))
        for name in first:
            self._held.check()
            self._copy(name)
        wanted = {(self._target / n).key for n in new}
        # The list is as old as the copying took: what a successor has published since is not for this run to remove.
        self._held.check(anew=True)
        remove(self._target, (k for k in old if not _rank(k) and k not in wanted))
        self._check(first, made)
        for name in new[len(first) :]:
            self._held.check(anew=True)
            self._copy(name)
        self._check(new, made)
        # From here on it is whole, whatever becomes of the rest.
        remove(self._root, [begun.key])

    def _copy(self, name: str) -> None:
        self._target.file_system.cp_file(self._file(name).key, (self._target / name).key)

    def _check(self, names: Iterable[str], made: Mapping[str, int]) -> None:
        """See that files are published as they were made, by their sizes."""
        there = sizes(self._target)
        for name in names:
            target = self._target / name
            if there.get(target.key, -1) != made.get(self._file(name).key):
                raise AccessError(f"{target} is not as large as it was written.")

    def discard(self) -> None:
        """Remove what was written, unless a part of it is published: only what is here can end that."""
        if self._is_partial:
            self.keep()
            return
        try:
            # What another run has taken over is its own. The lock comes last, so that none begins meanwhile.
            if self._held.is_held():
                remove(self._root, (k for k in sizes(self._root) if k != self._held.path.key))
            self._held.release()
        except AccessError as error:
            self.left = f"{self._root} could not be removed: {error.message}"
            self._held.abandon()

    def keep(self) -> None:
        """Leave what was written for a later ``resume``."""
        try:
            self._held.release()
        except AccessError:
            self._held.abandon()


@dataclass(frozen=True)
class RemoteFiles:
    """The files of a folder under construction, for other processes, also on other machines; it can be pickled.

    Attributes:
        folder: Where those of one run are.
    """

    folder: RemotePath

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file for writing in order; it is there only when it is complete."""
        return upload(self.folder / name)


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
