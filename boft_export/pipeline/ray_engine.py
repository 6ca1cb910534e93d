"""Running a plan on a Ray cluster: a task for each weight file; the driver alone plans, keeps the journal, publishes.

A task does what the local engine does, for one file. A worker that is lost costs no more than its file, which another
one writes. What a task finished counts once the driver has it in the journal.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import platform
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from boft_export import native
from boft_export.checkpoint import Shard, Staging
from boft_export.checkpoint.places import AnyPath, file_state
from boft_export.checkpoint.staging import Files, file_system_errors
from boft_export.checkpoint.tensors import BytesInFile, HeldBytes
from boft_export.errors import AccessError, ResourceError, UsageError
from boft_export.pipeline.engine import Engine, RunResult, run_result, shards_to_write
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.memory import DEFAULT_IN_FLIGHT, RUNTIME_BYTES
from boft_export.pipeline.options import Progress, RunOptions
from boft_export.pipeline.works import Works
from boft_export.pipeline.writing import Writing
from boft_export.planning import FoldPlan, TensorPlan
from boft_export.planning.sizes import format_size
from boft_export.planning.strength import Course
from boft_export.version import __version__

if TYPE_CHECKING:
    # Ray brings no types for these.
    Ref = Any

_LOGGER = logging.getLogger(__name__)
# How often a file is written again whose worker was lost, by what is no error of ours. Counted here: of those that Ray
# kills for lack of memory it would start another for ever.
_RETRIES = 3
# Seconds between two looks at what was done, between two words of a worker, and for workers to stop by themselves.
_POLL = 0.2
_WORD = 0.1
_STOP = 5.0
# And for a cluster to answer at all.
_CONNECT = 5.0
# Seconds that a task waits for the first answer, which tells whether the run is still on.
_FIRST = 1.0
# Seconds after which it is said that nothing was heard of any worker.
_SILENCE = 30.0
# Nothing but the plan is in it; Ray's default is a third of the memory.
_OBJECT_STORE = 128 << 20
# Bytes of a task that digests and writes nothing; those that it digests, where it does several files; and those between
# two looks at whether the run is still on.
_DIGEST_MEMORY = RUNTIME_BYTES + DEFAULT_IN_FLIGHT
_DIGEST_BATCH = 256 << 20
_DIGEST_PIECE = 4 << 20
_USAGE_STATS = "RAY_USAGE_STATS_ENABLED"
# What folds: where it is not the best that there is, the driver's choice holds for all nodes.
_KERNEL = "BOFT_EXPORT_KERNEL"
_FOLD = "fold kernel"
_CHOSEN = ("torch", "plain")
_SHARED = "Inputs and output must lie where every node of the cluster sees them by the same path or URL."


@dataclass(frozen=True)
class _Job:
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
class _Task:
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
class _Finished:
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


class _Tally:
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


# What a worker does


class _StoppedError(Exception):
    """The run is over."""


class _Words:
    """What a worker says of a shard, and hears.

    Args:
        tally: The actor's handle.
        shard: The shard's number; -1 for none.
    """

    def __init__(self, tally: Any, shard: int) -> None:  # noqa: ANN401  # a handle of Ray's
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


def _perform(versions: Mapping[str, str], pickled: bytes, task: _Task, tally: Any) -> _Finished:  # noqa: ANN401
    """Do a task, on a worker.

    Raises:
        UsageError: If other versions are installed here.
        BoftExportError: As ``run_plan`` does.
    """
    kernel = versions.get(_FOLD)
    with _variable(_KERNEL, kernel) if kernel in _CHOSEN else contextlib.nullcontext():
        _check_versions(versions)
        job: _Job = pickle.loads(pickled)  # noqa: S301  # whoever can start tasks here can run anything
        with contextlib.suppress(OSError):
            os.chdir(job.folder)
        try:
            return _done(job, task, tally)
        except AccessError as error:
            message = f"{error.message.rstrip('.')} (on node {platform.node()})."
            raise AccessError(message, hint=error.hint or _SHARED) from error


def _done(job: _Job, task: _Task, tally: Any) -> _Finished:  # noqa: ANN401  # a handle of Ray's
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
    finished = _Finished(job.files)
    if task.shard is not None:
        _write(job, task.shard, hashes, finished, words)
    for name in task.digests:
        _digest(job.inputs[name][0], hashes, words)
    finished.digests = hashes.digests(task.digests)
    return finished


def _write(job: _Job, number: int, hashes: InputHashes, finished: _Finished, words: _Words) -> None:
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
        found = _versions(native.arithmetic() if versions.get(_FOLD) != "torch" else "torch")
    except UsageError:
        # The driver's kernel does not run here.
        found = _versions("missing")
    others = [n for n in {**found, **versions} if found.get(n) != versions.get(n)]
    if others:
        here, there = (", ".join(f"{n} {v.get(n)}" for n in others) for v in (found, versions))
        raise UsageError(
            f"node {platform.node()} of the cluster has {here}; the run was started with {there}.",
            hint=f"Install the same versions on all nodes, and set {_KERNEL} on none.",
        )


def _versions(kernel: str) -> dict[str, str]:
    """Return what decides the bytes, and how tasks are told what to do."""
    packages = {n: _version(n) for n in ("torch", "numpy", "scipy")}
    return {"boft-export": __version__, **packages, _FOLD: kernel}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


@contextlib.contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# What the driver does


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster, or have one on this machine for as long as that takes.

    A connection that is there already serves, and stays.

    Args:
        address: ``auto``, ``host:port``, ``ray://host:port`` or ``local``; None for what ``RAY_ADDRESS`` says, or a
            cluster on this machine.

    Raises:
        UsageError: If the address is empty.
        AccessError: If the cluster can't be reached.
    """
    place = _place(address)
    if ray.is_initialized():
        yield
        return
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if place == "local" else {}
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        try:
            _check_reached(place)
            with _variable(_USAGE_STATS, os.environ.get(_USAGE_STATS, "0")), _own_sigterm():
                ray.init(place, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **own)
        except Exception as error:  # of a cluster that can't be reached Ray raises whatever met it on the way
            raise AccessError(
                f"the Ray cluster {place} can't be used: {_reason(error)}.",
                hint="Check it with: ray status --address HOST:PORT. Where it has tokens, set RAY_AUTH_MODE=token.",
            ) from error
        yield
    finally:
        ray.shutdown()
        logger.setLevel(level)


def _place(address: str | None) -> str:
    """Return where the cluster is.

    Raises:
        UsageError: If the address is empty.
    """
    if address is not None and not address.strip():
        raise UsageError("the Ray address is empty.", hint="Leave it out for workers on this machine.")
    return address if address is not None else os.environ.get("RAY_ADDRESS") or "local"


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep what this process does when it is asked to end, in the place of which Ray puts its own."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit:
        # Ray's was there already when it was asked.
        signal.signal(signal.SIGTERM, handler)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def _check_reached(place: str) -> None:
    """Fail where nobody listens, for which Ray would wait some minutes.

    Raises:
        OSError: If so.
    """
    host, _, port = place.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT).close()


def check_request(plan: FoldPlan, options: RunOptions) -> None:
    """See that some cluster can do what is planned.

    Raises:
        UsageError: If weights are in a form that can't be read by ranges, or the address is empty.
    """
    _place(options.ray_address)
    # Held in memory, each task would bring them all along.
    for file in (*plan.base.files, *(a.weights for a in plan.adapters)):
        if any(isinstance(t.source, HeldBytes) for t in file.tensors):
            raise UsageError(
                f"{file.path} is in an old form of torch.save, which workers can't read by ranges.",
                hint="Save it as safetensors, or use --engine local.",
            )


def check_cluster(plan: FoldPlan, jobs: int, device: str, options: RunOptions, memory: int) -> None:
    """See that the cluster that this process is connected to can do what is planned.

    Args:
        plan: The plan.
        jobs: Threads of a worker.
        device: ``cpu`` or ``cuda``.
        options: What was asked for.
        memory: Bytes that a worker takes, at most.

    Raises:
        UsageError: If no node can do it, or weights are in a form that can't be read by ranges.
        ResourceError: If no node has the memory.
    """
    check_request(plan, options)
    _fit(jobs, device, memory, options)


def run_on_ray(plan: FoldPlan, course: Course, staging: Staging, engine: Engine, options: RunOptions) -> RunResult:
    """Do what ``run_plan`` does on the cluster that this process is connected to.

    Raises:
        UsageError: If no node can do it.
        ResourceError: If no node has the memory, or workers are lost again and again.
        AccessError: If a node does not see the files.
        BoftExportError: As ``run_plan`` does.
    """
    needs = _fit(engine.jobs, engine.devices[0].type, engine.memory.peak, options)
    engine = replace(engine, jobs=int(needs["num_cpus"]))
    inputs = plan.input_files()
    job = _Job(
        plan,
        course,
        engine,
        staging.shared,
        str(Path.cwd()),
        {n: (p, file_state(p)) for n, p in inputs.items()},
    )
    todo = shards_to_write(plan, course, staging, engine)
    run = _Run(plan, course, staging, todo, options.progress)
    digests = run.perform(job, _tasks(plan, todo, {n: p.stat().st_size for n, p in inputs.items()}), needs)
    return run_result(plan, course, staging, engine, todo, {n: digests[n] for n in job.inputs})


class _Run:
    """Tasks on their way."""

    def __init__(
        self,
        plan: FoldPlan,
        course: Course,
        staging: Staging,
        todo: Sequence[Shard[TensorPlan]],
        progress: Progress | None,
    ) -> None:
        self._plan = plan
        self._staging = staging
        self._progress = progress
        self._sizes = [s.nbytes * len(course.variants) for s in plan.shards]
        # Bytes written of each shard, of those that were there before all.
        self._written = {i: self._sizes[i] for i, s in enumerate(plan.shards) if s not in todo}
        self._whole = set(self._written)
        # How often a task's worker was lost.
        self._lost: Counter[_Task] = Counter()
        self._heard = time.monotonic()
        self._warned = False

    def perform(self, job: _Job, tasks: Sequence[_Task], needs: Mapping[str, float]) -> dict[str, str]:
        """Have all tasks done; return the digests of the inputs.

        Args:
            job: What they share.
            tasks: The tasks.
            needs: What one that writes asks of a node.
        """
        # Near this process, so that no other node's loss is its end.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        tally = ray.remote(_Tally).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        shared = ray.put(pickle.dumps(job))
        versions = _versions(native.arithmetic() if job.engine.is_native else "torch")
        digests: dict[str, str] = {}
        pending: dict[Ref, _Task] = {}

        def begin(task: _Task) -> None:
            do = ray.remote(_perform).options(**_needs(task, needs), max_retries=0, name=self._name(task))
            pending[do.remote(versions, shared, task, tally)] = task

        try:
            for task in tasks:
                begin(task)
            news = tally.told.remote()
            while pending:
                for ref in ray.wait(list(pending), timeout=_POLL)[0]:
                    task = pending.pop(ref)
                    if (finished := self._take(ref, task)) is None:
                        begin(task)
                    else:
                        digests |= finished.digests
                    self._heard = time.monotonic()
                if ray.wait([news], timeout=0)[0]:
                    # Without it nothing is lost but a bar that moves.
                    with contextlib.suppress(RayError):
                        self._show(ray.get(news))
                    news = tally.told.remote()
                self._warn_of_silence(needs)
        except BaseException:
            with contextlib.suppress(RayError):
                ray.kill(tally)
                # Those at work get some time to remove what is half written.
                if pending:
                    ray.wait(list(pending), num_returns=len(pending), timeout=_STOP)
            raise
        ray.kill(tally)
        return digests

    def _name(self, task: _Task) -> str:
        return f"write {self._plan.shards[task.shard].name}" if task.shard is not None else f"digest {task.reads[0]}"

    def _warn_of_silence(self, needs: Mapping[str, float]) -> None:
        """Say once that nothing was heard of any worker for long."""
        if self._warned or time.monotonic() - self._heard < _SILENCE:
            return
        self._warned = True
        _LOGGER.warning(
            "nothing was heard of the Ray cluster's workers for %.0f s; each file waits for a node with %s free "
            "(ray status tells what there is)",
            _SILENCE,
            _told(needs),
        )

    def _take(self, ref: Ref, task: _Task) -> _Finished | None:
        """Take a task's result, and note in the journal what it finished; None where it is to be done again."""
        try:
            finished: _Finished = ray.get(ref)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            self._lost[task] += 1
            if self._lost[task] <= _RETRIES:
                return None
            raise ResourceError(
                f"gave up to {self._name(task)} after {1 + _RETRIES} tries: {_reason(error)}.",
                hint="A worker may have run out of memory: lower --max-memory or --jobs. Then go on with --resume.",
            ) from error
        for name, content in finished.records:
            with file_system_errors(self._staging.output):
                self._staging.record(name, content)
        if task.shard is not None:
            self._whole.add(task.shard)
            self._show(
                {task.shard: (self._sizes[task.shard], self._plan.shards[task.shard].tensors[-1].name)}, last=True
            )
        return finished

    def _show(self, news: Mapping[int, tuple[int, str]], *, last: bool = False) -> None:
        """Tell how far it is; a shard that is written again begins at nothing."""
        if news:
            self._heard = time.monotonic()
        for shard, (nbytes, tensor) in news.items():
            if shard < 0 or not tensor or (shard in self._whole and not last):
                continue
            self._written[shard] = nbytes
            if self._progress is not None:
                self._progress(sum(self._written.values()), sum(self._sizes), tensor)


def _tasks(plan: FoldPlan, todo: Sequence[Shard[TensorPlan]], sizes: Mapping[str, int]) -> list[_Task]:
    """Return a task for each shard, and some for the inputs that not exactly one shard reads.

    Args:
        plan: The plan.
        todo: The shards to write.
        sizes: Bytes of each input.
    """
    inputs = plan.input_files()
    names = {path: name for name, path in inputs.items()}
    adapters = [n for n in inputs if n.startswith("adapter")]
    reads: dict[int, list[str]] = {}
    for number, shard in enumerate(plan.shards):
        if shard in todo:
            sources = (o.ref.source for t in shard.tensors for o in t.origins)
            paths = dict.fromkeys(s.path for s in sources if isinstance(s, BytesInFile))
            reads[number] = [names[p] for p in paths if p in names]
    readers = Counter(itertools.chain.from_iterable(reads.values()))
    own = {n for n, count in readers.items() if count == 1}
    tasks = [
        _Task(i, tuple(dict.fromkeys((*found, *adapters))), tuple(n for n in found if n in own))
        for i, found in reads.items()
    ]
    batches: list[list[str]] = []
    room = 0
    for name in (n for n in inputs if n not in own):
        if not batches or sizes[name] > room:
            batches.append([])
            room = _DIGEST_BATCH
        batches[-1].append(name)
        room -= sizes[name]
    return tasks + [_Task(None, tuple(b), tuple(b)) for b in batches]


def _needs(task: _Task, needs: Mapping[str, float]) -> dict[str, float]:
    """Return what a task asks of a node, where ``needs`` is what one asks that writes."""
    if task.shard is not None:
        return dict(needs)
    return {"num_cpus": 1.0, "memory": min(needs["memory"], float(_DIGEST_MEMORY))}


def _told(needs: Mapping[str, float]) -> str:
    gpu = ", a GPU" if "num_gpus" in needs else ""
    return f"{needs['num_cpus']:.0f} CPUs{gpu} and {format_size(int(needs['memory']))} of memory"


def _fit(jobs: int, device: str, memory: int, options: RunOptions) -> dict[str, float]:
    """Return what a task that writes asks of a node, one CPU for each of its threads.

    Raises:
        UsageError: If there is no such node.
        ResourceError: If none has the memory.
    """
    # A cluster without any of them may yet grow.
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU", 0) >= 1]
    needs = {"num_cpus": float(jobs), "memory": float(memory)}
    beside = ""
    if device == "cuda":
        needs["num_gpus"] = 1.0
        beside = " beside a GPU"
        with_gpu = [n for n in nodes if n.get("GPU", 0) >= 1]
        if nodes and not with_gpu:
            raise UsageError("no node of the Ray cluster has a GPU.", hint="Use --device cpu.")
        nodes = with_gpu
    if not nodes:
        return needs
    room = int(max(n.get("memory", 0) for n in nodes))
    if memory > room:
        raise ResourceError(
            f"no node of the Ray cluster has the {memory:,} bytes of memory that a worker takes{beside}; the largest "
            f"has {room:,}.",
            hint=f"Give --max-memory {room >> 20}MiB or less, or fewer --jobs.",
        )
    most = int(max(n["CPU"] for n in nodes if n.get("memory", 0) >= memory))
    if jobs > most:
        if options.jobs is not None:
            raise UsageError(
                f"no node of the Ray cluster has {jobs} CPUs for one task{beside}; the largest has {most}.",
                hint=f"Use --jobs {most} or fewer: so many threads work on one file, and files side by side.",
            )
        needs["num_cpus"] = float(most)
    return needs


def _cause(error: RayTaskError) -> BaseException:
    """Return what was raised on the worker."""
    cause: BaseException = error.cause
    text = str(cause).strip()
    # Whose arguments were others in another version.
    other = isinstance(cause, TypeError) and "_perform()" in text
    if isinstance(cause, ImportError) or (isinstance(cause, RuntimeError) and "boft_export" in text) or other:
        return UsageError(
            f"a node of the Ray cluster can't load boft-export {__version__}: {(text.splitlines() or [''])[-1]}",
            hint=f'On each node: pip install "boft-export[ray]=={__version__}"',
        )
    return cause


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__).rstrip(".")
