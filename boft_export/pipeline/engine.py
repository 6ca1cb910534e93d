"""Running a plan: threads that each read, fold and write a chunk at a time, with a bound on the bytes between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from boft_export import native
from boft_export.checkpoint import Shard, Staging
from boft_export.pipeline.chunks import Chunk
from boft_export.pipeline.crew import Crew
from boft_export.pipeline.devices import Device
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.memory import WAY_BACK_OUTPUTS, MemoryPlan
from boft_export.pipeline.options import Progress
from boft_export.pipeline.recorded import RecordedFile
from boft_export.pipeline.torch_need import native_folds
from boft_export.pipeline.undo import UndoTensor, undo_name
from boft_export.pipeline.workbench import Piece
from boft_export.pipeline.works import Admitted, Works
from boft_export.pipeline.writing import Writing
from boft_export.planning import FoldPlan, TensorPlan
from boft_export.planning.strength import Course, Variant

# What can be computed in.
COMPUTE_DTYPES = ("float64", "float32")


@dataclass(frozen=True)
class Engine:
    """How a plan is run.

    Of ``devices``, ``jobs`` and ``memory`` only the device can change the output's bytes, and those of float32 only.

    Attributes:
        devices: Where to fold.
        compute: The dtype to fold in, one of ``COMPUTE_DTYPES``.
        jobs: Threads that read, fold and write.
        memory: How memory is divided.
        inverse: Undo the adapters, which the plan has in reverse order.
        way_back: Undo each fold again, and count the elements that this gives back.
        reversible: Write what the way back misses, one file beside each weight file; needs ``way_back``.
        records: What was so written when the adapters were applied that are undone now, by tensor.
    """

    devices: tuple[Device, ...]
    compute: str
    jobs: int
    memory: MemoryPlan
    inverse: bool = False
    way_back: bool = False
    reversible: bool = False
    records: Mapping[str, UndoTensor] = field(default_factory=dict)

    @property
    def further_outputs(self) -> int:
        """How many outputs take as much memory as what is written, or read, to go the way back."""
        return WAY_BACK_OUTPUTS if self.way_back else 0

    @property
    def is_native(self) -> bool:
        """Whether the compiled kernel folds what it can."""
        return native_folds(self.devices[0].type, self.compute) and native.instruction_set() is not None

    def operators(self, plan: FoldPlan, course: Course, *, back: bool = False) -> LayerCache:
        """Return the operators to fold with, or those that undo the fold."""
        limit = self.memory.rotations * len(self.devices)
        return LayerCache(plan, course, self.compute, limit, inverse=self.inverse != back)


@dataclass(frozen=True)
class TensorResult:
    """What was done to a tensor."""

    plan: TensorPlan
    measure: Measure | None
    residual: float | None


@dataclass(frozen=True)
class OutputResult:
    """What one output is.

    Attributes:
        variant: How far it goes.
        tensors: Each tensor's result, in order.
        files: SHA-256 of each weight file written.
        undo: Size and SHA-256 of each file that undoes it.
    """

    variant: Variant
    tensors: tuple[TensorResult, ...]
    files: dict[str, str]
    undo: dict[str, RecordedFile] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        outputs: What was written, in order.
        inputs: SHA-256 of each input file.
        resumed: Weight files taken over from a killed run.
    """

    outputs: tuple[OutputResult, ...]
    inputs: dict[str, str]
    resumed: tuple[str, ...]


def run_plan(
    plan: FoldPlan, course: Course, staging: Staging, engine: Engine, progress: Progress | None = None
) -> RunResult:
    """Write the weight files of all outputs into ``staging``, but for those that are there already.

    The base is read once, however many outputs there are.

    Memory stays within ``engine.memory`` whatever the plan's size: a byte budget holds back whoever would read more.

    Raises:
        InputError: If a result is not finite.
        DamagedFileError: If an input ends early.
        AccessError: If a file can't be read or written.
        ResourceError: If the disk is full.
    """
    hashes = InputHashes(plan.input_files())
    todo = shards_to_write(plan, course, staging, engine)
    total = sum(s.nbytes for s in plan.shards) * len(course.variants)
    done = total - sum(s.nbytes for s in todo) * len(course.variants)
    with Writing(Works(plan, course, engine, hashes), plan, staging, todo) as news:
        for nbytes, tensor in news:
            done += nbytes
            if progress is not None and tensor is not None:
                progress(done, total, tensor)
    return run_result(plan, course, staging, engine, todo, hashes.digests())


def shards_to_write(plan: FoldPlan, course: Course, staging: Staging, engine: Engine) -> tuple[Shard[TensorPlan], ...]:
    """Return the shards that are not yet there in all outputs."""
    return tuple(
        s for s in plan.shards
        if any(n not in staging.done for v in course.variants for n in _names(s.name, v, engine))
    )  # fmt: skip


def run_result(
    plan: FoldPlan,
    course: Course,
    staging: Staging,
    engine: Engine,
    written: Collection[Shard[TensorPlan]],
    inputs: dict[str, str],
) -> RunResult:
    """Return what a run did that has recorded all files in ``staging``, and written these of its shards."""
    return RunResult(
        outputs=tuple(_output_result(plan, v, staging.done, engine) for v in course.variants),
        inputs=inputs,
        resumed=tuple(v.path(s.name) for v in course.variants for s in plan.shards if s not in written),
    )


@dataclass(frozen=True)
class Replay:
    """A merge whose result is looked at and not written.

    Attributes:
        pieces: Each output's bytes in order: the tensor, and the next of its bytes. They are good until the next is
            asked for.
        hashes: Digests of the inputs, complete when all pieces were taken.
        layers: The operators in use.
    """

    pieces: Iterator[tuple[TensorPlan, memoryview, list[Measure]]]
    hashes: InputHashes
    layers: LayerCache


@contextlib.contextmanager
def replay_plan(plan: FoldPlan, course: Course, engine: Engine) -> Iterator[Replay]:
    """Give what ``run_plan`` would write as the first output, in the same bounded memory.

    Raises:
        DamagedFileError: If an input ends early.
        AccessError: If a file can't be read.
    """
    hashes = InputHashes(plan.input_files())
    works = Works(plan, course, engine, hashes)
    with contextlib.closing(_pieces(works, plan.shards)) as pieces:
        yield Replay(pieces, hashes, works.layers)


def _pieces(
    works: Works, shards: Sequence[Shard[TensorPlan]]
) -> Generator[tuple[TensorPlan, memoryview, list[Measure]]]:
    """Yield the first output's pieces in order."""
    made = _Handover()

    def listed() -> Iterator[Chunk]:
        return chain.from_iterable(map(works.chunks, shards))

    def tasks() -> Iterator[tuple[int, Admitted]]:
        for number, chunk in enumerate(listed()):
            if (admitted := works.admit(chunk)) is None:
                return
            yield number, admitted

    def do(task: tuple[int, Admitted]) -> None:
        number, admitted = task
        works.make(admitted, lambda pieces, done: made.put(number, (pieces[0], done)))

    crew = Crew(works.engine.jobs, tasks(), do, made.close, works.stop)
    crew.start()
    try:
        chunks = enumerate(listed())
        following = next(chunks, None)
        while following is not None:
            number, chunk = following
            following = next(chunks, None)
            if following is None:
                # With the last piece all inputs are digested.
                crew.join()
            found = made.take(number)
            if found is None:
                crew.join()
                crew.check()
                return
            piece, done = found
            yield chunk.tensor, piece.data.data, piece.measures
            done()
        crew.check()
    finally:
        crew.close()


class _Handover:
    """Pieces made in any order and taken in theirs."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Piece, Callable[[], None]]] = {}
        self._changed = threading.Condition()
        self._closed = False

    def put(self, number: int, piece: tuple[Piece, Callable[[], None]]) -> None:
        """Leave a piece."""
        with self._changed:
            self._made[number] = piece
            self._changed.notify_all()

    def take(self, number: int) -> tuple[Piece, Callable[[], None]] | None:
        """Wait for a piece; None where there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._made or self._closed)
            return self._made.pop(number, None)

    def close(self) -> None:
        """Let whoever waits know that no more come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _names(shard: str, variant: Variant, engine: Engine) -> list[str]:
    """Return the files that are written for a shard."""
    return [variant.path(shard), *([undo_name(shard)] if engine.reversible else [])]


def _output_result(
    plan: FoldPlan, variant: Variant, done: Mapping[str, Mapping[str, Any]], engine: Engine
) -> OutputResult:
    entries = {s.name: done[variant.path(s.name)] for s in plan.shards}
    tensors = tuple(_result(t, entries[s.name]) for s in plan.shards for t in s.tensors)
    undo = {n: done[n] for n in (undo_name(s.name) for s in plan.shards if engine.reversible)}
    return OutputResult(
        variant,
        tensors,
        {name: entry["sha256"] for name, entry in entries.items()},
        {name: RecordedFile(entry["nbytes"], entry["sha256"]) for name, entry in undo.items()},
    )


def _result(tensor: TensorPlan, entry: Mapping[str, Any]) -> TensorResult:
    record = entry["tensors"][tensor.name]
    measure = Measure(**record["measure"]) if record["measure"] is not None else None
    return TensorResult(tensor, measure, record["residual"])
