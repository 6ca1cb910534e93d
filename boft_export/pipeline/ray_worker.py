"""A task on a Ray cluster, what it is told and what it tells: a weight file by the local engine, digests of inputs."""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import IO, TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError

from boft_export import native
from boft_export.checkpoint.places import AnyPath, file_state
from boft_export.checkpoint.staging import Files
from boft_export.errors import AccessError, UsageError
from boft_export.pipeline.engine import Engine
from boft_export.pipeline.environment_variable import environment_variable
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.works import Works
from boft_export.pipeline.writing import Writing
from boft_export.planning import FoldPlan
from boft_export.planning.strength import Course
from boft_export.version import __version__

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# Seconds between two words of a worker.
_WORD = 0.1
# Seconds that a task waits for the first answer, which tells whether the run is still on.
_FIRST = 1.0
# Bytes that are digested between two looks at whether the run is still on.
_DIGEST_PIECE = 4 << 20
# What folds: where it is not the best that there is, the driver's choice holds for all nodes.
_KERNEL = "BOFT_EXPORT_KERNEL"
_FOLD = "fold kernel"
_CHOSEN = ("torch", "plain")
_SHARED = "Inputs and output must lie where every node of the cluster sees them by the same path or URL."


@dataclass(frozen=True)
class Job:
    """What all tasks of a run share.

    Attributes:
        plan: The plan.
        course: How far each output goes.
        engine: How each worker computes.
        files: Where they write.
        folder: What relative paths start from.
        inputs: Each input's path by its name, and what it was like when the run began.
    """

    plan: FoldPlan
    course: Course
    engine: Engine
    files: Files
    folder: str
    inputs: Mapping[str, tuple[AnyPath, tuple[object, ...]]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        shard: The number of the shard to write; None for none.
        reads: The names of the inputs it reads.
        digests: The names of those it tells the SHA-256 of.
    """

    shard: int | None
    reads: tuple[str, ...]
    digests: tuple[str, ...]


@dataclass
class TaskResult:
    """What a task did: what to note in the journal of each file, and digests of inputs.

    Attributes:
        files: Where it writes.
        records: Each finished file, in order, with what is to be noted of it.
        digests: SHA-256 by the input's name.
    """

    files: Files
    records: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file for writing."""
        return self.files.write(name)

    def record(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep for the driver what to note of a finished file."""
        self.records.append((name, content))


class Tally:
    """An actor that holds what was last heard of each shard: its bytes written, and a tensor.

    While it lives the run goes on: that it was killed tells workers to stop. (``ray.cancel`` may abort the driver,
    where it meets a task on its way to a worker: seen with Ray 2.60.)
    """

    def __init__(self) -> None:
        self._news: dict[int, tuple[int, str]] = {}

    def tell(self, shard: int, nbytes: int, tensor: str) -> None:
        """Take note of it."""
        self._news[shard] = nbytes, tensor

    def told(self) -> dict[int, tuple[int, str]]:
        """Return what is new."""
        news, self._news = self._news, {}
        return news


class _StoppedError(Exception):
    """The run is over."""


class _Words:
    """What a worker says of a shard, and hears.

    Args:
        tally: The actor's handle.
        shard: The shard's number; -1 for none.
    """

    def __init__(self, tally: ActorHandle[Tally], shard: int) -> None:
        self._tally = tally
        self._shard = shard
        self._said: Any = None
        self._when = 0.0
        self.say(0, "", wait=_FIRST)

    def say(self, nbytes: int, tensor: str, wait: float = 0) -> None:
        """Tell how far it is, now and then.

        Raises:
            _StoppedError: If the run is over.
        """
        if time.monotonic() - self._when < _WORD:
            return
        self._when = time.monotonic()
        if self._said is None:
            self._said = self._tally.tell.remote(self._shard, nbytes, tensor)
        if not ray.wait([self._said], timeout=wait)[0]:
            return
        # That it is away for a while matters to nobody: it comes back.
        with contextlib.suppress(RayError):
            try:
                ray.get(self._said)
            except ActorDiedError as error:
                raise _StoppedError from error
        self._said = None


def do_task(versions: Mapping[str, str], job: bytes, task: bytes, tally: ActorHandle[Tally]) -> TaskResult:
    """Do a task, on a worker.

    Args:
        versions: What must be installed here, looked at before anything of the package is unpickled.
        job: A ``Job``, pickled.
        task: A ``Task``, pickled.
        tally: Who is told how far it is.

    Raises:
        UsageError: If other versions are installed here.
        BoftExportError: As ``run_plan`` does.
    """
    kernel = versions.get(_FOLD)
    with environment_variable(_KERNEL, kernel) if kernel in _CHOSEN else contextlib.nullcontext():
        _check_versions(versions)
        shared, own = (pickle.loads(x) for x in (job, task))  # noqa: S301  # whoever can start tasks can run anything
        with contextlib.suppress(OSError):
            os.chdir(shared.folder)
        try:
            return _done(shared, own, tally)
        except AccessError as error:
            message = f"{error.message.rstrip('.')} (on node {platform.node()})."
            raise AccessError(message, hint=error.hint or _SHARED) from error


def _done(job: Job, task: Task, tally: ActorHandle[Tally]) -> TaskResult:
    for name in task.reads:
        path, state = job.inputs[name]
        try:
            same = file_state(path) == state
        except OSError as error:
            raise AccessError(f"cannot read {path}: {error.strerror or error}.") from error
        if not same:
            raise AccessError(f"{path} is not the file that it is where the run was started.")
    words = _Words(tally, -1 if task.shard is None else task.shard)
    hashes = InputHashes({n: path for n, (path, _) in job.inputs.items()})
    finished = TaskResult(job.files)
    if task.shard is not None:
        _write(job, task.shard, hashes, finished, words)
    for name in task.digests:
        _digest(job.inputs[name][0], hashes, words)
    finished.digests = hashes.digests(task.digests)
    return finished


def _write(job: Job, number: int, hashes: InputHashes, finished: TaskResult, words: _Words) -> None:
    written = 0
    shard = job.plan.shards[number]
    works = Works(job.plan, job.course, job.engine, hashes)
    with Writing(works, job.plan, finished, [shard]) as news:
        for nbytes, tensor in news:
            written += nbytes
            words.say(written, tensor or "")


def _digest(path: AnyPath, hashes: InputHashes, words: _Words) -> None:
    """Have what has not passed of a file digested, as long as the run is on."""
    for stop in range(_DIGEST_PIECE, path.stat().st_size, _DIGEST_PIECE):
        hashes.advance(path, stop)
        words.say(0, "")


def _check_versions(versions: Mapping[str, str]) -> None:
    """Refuse to do by other code what the driver's would do.

    Raises:
        UsageError: If what decides the bytes is another here.
    """
    try:
        found = installed_versions(native.arithmetic() if versions.get(_FOLD) != "torch" else "torch")
    except UsageError:
        # The driver's kernel does not run here.
        found = installed_versions("missing")
    others = [n for n in {**found, **versions} if found.get(n) != versions.get(n)]
    if others:
        here, there = (", ".join(f"{n} {v.get(n)}" for n in others) for v in (found, versions))
        raise UsageError(
            f"node {platform.node()} of the cluster has {here}; the run was started with {there}.",
            hint=f"Install the same versions on all nodes, and set {_KERNEL} on none.",
        )


def installed_versions(kernel: str) -> dict[str, str]:
    """Return what decides the bytes, and how tasks are told what to do."""
    packages = {n: _version(n) for n in ("torch", "numpy", "scipy")}
    return {"boft-export": __version__, **packages, _FOLD: kernel}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"
