"""Running a plan on a Ray cluster: a task for each weight file; the driver alone plans, keeps the journal, publishes.

A worker that is lost costs no more than its file, which another one writes. What a task finished counts once the driver
has it in the journal.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import pickle
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from boft_export import native
from boft_export.checkpoint import Shard, Staging
from boft_export.checkpoint.places import file_state
from boft_export.checkpoint.staging import file_system_errors
from boft_export.checkpoint.tensors import BytesInFile
from boft_export.errors import ResourceError, UsageError, first_line
from boft_export.pipeline.engine import Engine, RunResult, run_result, shards_to_write
from boft_export.pipeline.memory import DEFAULT_IN_FLIGHT, RUNTIME_BYTES
from boft_export.pipeline.options import Progress, RunOptions
from boft_export.pipeline.ray_cluster import needs_text, worker_needs
from boft_export.pipeline.ray_worker import Job, Tally, Task, TaskResult, do_task, installed_versions
from boft_export.planning import FoldPlan, TensorPlan
from boft_export.planning.strength import Course
from boft_export.version import __version__

if TYPE_CHECKING:
    from ray import ObjectRef

_LOGGER = logging.getLogger(__name__)
# How often a file is written again whose worker was lost, by what is no error of ours. Counted here: of those that Ray
# kills for lack of memory it would start another for ever.
_RETRIES = 3
# Seconds between two looks at what was done, and for workers to stop by themselves.
_POLL = 0.2
_STOP = 5.0
# Seconds after which it is said that nothing was heard of any worker.
_SILENCE = 30.0
# Bytes of a task that digests and writes nothing, and those that it digests, where it does several files.
_DIGEST_MEMORY = RUNTIME_BYTES + DEFAULT_IN_FLIGHT
_DIGEST_BATCH = 256 << 20


def run_on_ray(plan: FoldPlan, course: Course, staging: Staging, engine: Engine, options: RunOptions) -> RunResult:
    """Do what ``run_plan`` does on the cluster that this process is connected to.

    Raises:
        UsageError: If no node can do it.
        ResourceError: If no node has the memory, or workers are lost again and again.
        AccessError: If a node does not see the files.
        BoftExportError: As ``run_plan`` does.
    """
    needs = worker_needs(engine.jobs, engine.devices[0].type, engine.memory.peak, options)
    engine = replace(engine, jobs=int(needs["num_cpus"]))
    inputs = plan.input_files()
    job = Job(
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
        self._lost: Counter[Task] = Counter()
        self._heard = time.monotonic()
        self._warned = False

    def perform(self, job: Job, tasks: Sequence[Task], needs: Mapping[str, float]) -> dict[str, str]:
        """Have all tasks done; return the digests of the inputs.

        Args:
            job: What they share.
            tasks: The tasks.
            needs: What one that writes asks of a node.
        """
        # Near this process, so that no other node's loss is its end.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        tally = ray.remote(Tally).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        shared = ray.put(pickle.dumps(job))
        versions = installed_versions(native.arithmetic() if job.engine.is_native else "torch")
        digests: dict[str, str] = {}
        pending: dict[ObjectRef[TaskResult], Task] = {}

        def begin(task: Task) -> None:
            do = ray.remote(do_task).options(**_needs(task, needs), max_retries=0, name=self._name(task))
            pending[do.remote(versions, shared, pickle.dumps(task), tally)] = task

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

    def _name(self, task: Task) -> str:
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
            needs_text(needs),
        )

    def _take(self, ref: ObjectRef[TaskResult], task: Task) -> TaskResult | None:
        """Take a task's result, and note in the journal what it finished; None where it is to be done again."""
        try:
            finished: TaskResult = ray.get(ref)
        except RayTaskError as error:
            raise _cause(error) from error
        except RayError as error:
            self._lost[task] += 1
            if self._lost[task] <= _RETRIES:
                return None
            raise ResourceError(
                f"gave up to {self._name(task)} after {1 + _RETRIES} tries: {first_line(error)}.",
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


def _tasks(plan: FoldPlan, todo: Sequence[Shard[TensorPlan]], sizes: Mapping[str, int]) -> list[Task]:
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
        Task(i, tuple(dict.fromkeys((*found, *adapters))), tuple(n for n in found if n in own))
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
    return tasks + [Task(None, tuple(b), tuple(b)) for b in batches]


def _needs(task: Task, needs: Mapping[str, float]) -> dict[str, float]:
    """Return what a task asks of a node, where ``needs`` is what one asks that writes."""
    if task.shard is not None:
        return dict(needs)
    return {"num_cpus": 1.0, "memory": min(needs["memory"], float(_DIGEST_MEMORY))}


def _cause(error: RayTaskError) -> BaseException:
    """Return what was raised on the worker."""
    cause: BaseException = error.cause
    text = str(cause).strip()
    # Whose arguments were others in another version.
    other = isinstance(cause, TypeError) and f"{do_task.__name__}()" in text
    if isinstance(cause, ImportError) or (isinstance(cause, RuntimeError) and "boft_export" in text) or other:
        return UsageError(
            f"a node of the Ray cluster can't load boft-export {__version__}: {(text.splitlines() or [''])[-1]}",
            hint=f'On each node: pip install "boft-export[ray]=={__version__}"',
        )
    return cause
