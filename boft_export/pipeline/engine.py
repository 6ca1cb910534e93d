"""Running a plan: one thread reads, some fold, one writes, with a bound on the bytes between them."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from typing import IO, Any, NamedTuple

import torch

from boft_export.checkpoint import Shard, Staging
from boft_export.checkpoint.tensors import FileBytes
from boft_export.errors import InputError
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.corrections import put_right
from boft_export.pipeline.fold import Measure, fold
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.memory import TILE_ELEMENTS, WAY_BACK_OUTPUTS, ByteBudget, MemoryPlan, chunk_bytes
from boft_export.pipeline.options import Progress
from boft_export.pipeline.recorded import RecordedFile
from boft_export.pipeline.torch_io import TORCH_DTYPES, as_bytes, one_thread, read_bytes
from boft_export.pipeline.undo import Block, UndoTensor, UndoWriter, undo_name
from boft_export.pipeline.way_back import WayBack
from boft_export.planning import Action, FoldPlan, Segment, TensorPlan
from boft_export.planning.strength import Course, Variant


@dataclass(frozen=True)
class Engine:
    """How a plan is run.

    Of ``devices``, ``jobs`` and ``memory`` only the device can change the output's bytes, and those of float32 only.

    Attributes:
        devices: Where to fold.
        compute: The dtype to fold in.
        jobs: Threads that fold.
        memory: How memory is divided.
        inverse: Undo the adapters, which the plan has in reverse order.
        way_back: Undo each fold again, and count the elements that this gives back.
        reversible: Write what the way back misses, one file beside each weight file; needs ``way_back``.
        records: What was so written when the adapters were applied that are undone now, by tensor.
    """

    devices: tuple[torch.device, ...]
    compute: torch.dtype
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


@dataclass(frozen=True)
class _Chunk:
    """A run of a tensor's elements, or of its bytes where they are only copied, and what it is made of.

    Attributes:
        start: The first element or byte in the tensor.
        origins: The origins to read, by number.
        cost: Bytes that count as in flight.
    """

    tensor: TensorPlan
    segment: Segment
    start: int
    stop: int
    origins: tuple[int, ...]
    cost: int


class _Piece(NamedTuple):
    """What a chunk becomes in one output.

    Attributes:
        data: Its bytes.
        measures: What was done to each tile.
        corrections: What undoing it misses.
    """

    data: memoryview
    measures: list[Measure]
    corrections: Sequence[Block] = ()


# What it becomes in all of them.
_Done = list[_Piece]


def run_plan(
    plan: FoldPlan, course: Course, staging: Staging, engine: Engine, progress: Progress | None = None
) -> RunResult:
    """Write the weight files of all outputs into ``staging``, but for those that are there already.

    The base is read once, however many outputs there are.

    Memory stays within ``engine.memory`` whatever the plan's size: a byte budget holds back the reader.

    Raises:
        InputError: If a result is not finite.
        DamagedFileError: If an input ends early.
        AccessError: If a file can't be read or written.
        ResourceError: If the disk is full.
    """
    keep_tiles_free_chunks()
    layers = engine.operators(plan, course)
    back = engine.operators(plan, course, back=True) if engine.way_back else None
    way_back = WayBack(layers, back, engine.compute) if back is not None else None
    hashes = InputHashes(plan.input_files())
    variants = course.variants
    todo = [s for s in plan.shards if any(n not in staging.done for v in variants for n in _names(s.name, v, engine))]
    total = sum(s.nbytes for s in plan.shards) * len(variants)
    done = total - sum(s.nbytes for s in todo) * len(variants)
    stream = _Stream(todo, course, engine, layers, hashes, way_back)
    try:
        for shard in todo:
            with contextlib.ExitStack() as opened:
                writers = [_Writer(shard, v, opened.enter_context(staging.write(v.path(shard.name)))) for v in variants]
                undo = _undo_writer(plan, shard, staging, opened) if engine.reversible else None
                done += len(shard.header) * len(writers)
                for chunk, pieces in stream.take(shard):
                    for writer, piece in zip(writers, pieces, strict=True):
                        done += writer.add(chunk.tensor, piece.data, piece.measures)
                        if undo is not None:
                            undo.add(chunk.tensor, piece.corrections)
                    # Else they would be held beside the next ones, for which their bytes are given back.
                    del piece, pieces
                    if progress is not None:
                        progress(done, total, chunk.tensor.name)
                finished = undo.finish() if undo is not None else None
            if finished is not None:
                staging.record(undo_name(shard.name), finished)
            for writer in writers:
                staging.record(writer.variant.path(shard.name), writer.journal_entry(layers))
    finally:
        stream.close()
    return RunResult(
        outputs=tuple(_output_result(plan, v, staging.done, engine) for v in variants),
        inputs=hashes.digests(),
        resumed=tuple(v.path(s.name) for v in variants for s in plan.shards if s not in todo),
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
    keep_tiles_free_chunks()
    layers = engine.operators(plan, course)
    hashes = InputHashes(plan.input_files())
    stream = _Stream(plan.shards, course, engine, layers, hashes)

    def pieces() -> Iterator[tuple[TensorPlan, memoryview, list[Measure]]]:
        for shard in plan.shards:
            for chunk, made in stream.take(shard):
                yield chunk.tensor, made[0].data, made[0].measures

    try:
        yield Replay(pieces(), hashes, layers)
    finally:
        stream.close()


class _Writer:
    """One output's file of a shard, with its digest and what was measured of its tensors."""

    def __init__(self, shard: Shard[TensorPlan], variant: Variant, file: IO[bytes]) -> None:
        self.shard = shard
        self.variant = variant
        self._file = file
        self._digest = hashlib.sha256(shard.header)
        self._measures: dict[str, Measure] = {}
        file.write(shard.header)

    def add(self, tensor: TensorPlan, data: memoryview, tiles: Sequence[Measure]) -> int:
        """Write a piece of a tensor and return its size.

        Raises:
            InputError: If a result is not finite.
        """
        self._file.write(data)
        self._digest.update(data)
        for measure in tiles:
            self._measures[tensor.name] = self._measures.get(tensor.name, Measure()) + measure
            check_finite(tensor, measure)
        return len(data)

    def journal_entry(self, layers: LayerCache) -> dict[str, object]:
        """Return what a later run, and the manifest, will need to know of the finished file."""
        tensors = {}
        for tensor in self.shard.tensors:
            measure = self._measures.get(tensor.name)
            alphas = self.variant.strength.of(tensor.name)
            residuals = [
                layers.residuals[s.adapter, s.layer.module, alphas[s.adapter]]
                for s in tensor.steps
                if alphas[s.adapter]
            ]
            tensors[tensor.name] = {
                "measure": asdict(measure) if measure is not None else None,
                "residual": max(residuals) if residuals else None,
            }
        return {"sha256": self._digest.hexdigest(), "tensors": tensors}


class _Stream:
    """Folded chunks in the order of the plan, read and folded ahead of whoever takes them."""

    def __init__(
        self,
        shards: Sequence[Shard[TensorPlan]],
        course: Course,
        engine: Engine,
        layers: LayerCache,
        hashes: InputHashes,
        back: WayBack | None = None,
    ) -> None:
        self._variants = course.variants
        self._engine = engine
        self._layers = layers
        self._hashes = hashes
        self._back = back
        self._outputs = len(course.variants) + engine.further_outputs
        self._budget = ByteBudget(engine.memory.in_flight)
        self._ready: queue.SimpleQueue[Future[_Done]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(engine.jobs, "fold", initializer=torch.set_num_threads, initargs=(1,))
        self._reader = threading.Thread(target=self._read, args=(shards,), name="read", daemon=True)
        self._scope = one_thread()
        self._scope.__enter__()
        self._reader.start()

    def take(self, shard: Shard[TensorPlan]) -> Iterator[tuple[_Chunk, _Done]]:
        """Yield a shard's chunks; each one's bytes count as in flight until the next is asked for."""
        for chunk in self._chunks(shard):
            yield chunk, self._ready.get().result()
            self._budget.release(chunk.cost)

    def close(self) -> None:
        """Stop reading and folding."""
        self._budget.close()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.join()
        self._scope.__exit__(None, None, None)

    def _chunks(self, shard: Shard[TensorPlan]) -> Iterator[_Chunk]:
        kind = self._engine.devices[0].type
        for tensor in shard.tensors:
            for segment in tensor.segments:
                if tensor.action is Action.COPY:
                    size = self._engine.memory.chunk
                    for start in range(0, tensor.source.nbytes, size):
                        stop = min(start + size, tensor.source.nbytes)
                        yield _Chunk(tensor, segment, start, stop, (0,), stop - start)
                    continue
                mixtures = [tensor.mixture(segment, v.strength.of(tensor.name)) for v in self._variants]
                origins = tuple(sorted({i for m in mixtures for i in m}))
                tile = segment.tile(TILE_ELEMENTS[kind])
                size = tile * self._engine.memory.tiles(tensor, segment, tile, self._outputs)
                for start in range(segment.start, segment.stop, size):
                    stop = min(start + size, segment.stop)
                    cost = chunk_bytes(tensor, segment, stop - start, self._outputs)
                    yield _Chunk(tensor, segment, start, stop, origins, cost)

    def _read(self, shards: Sequence[Shard[TensorPlan]]) -> None:
        """Read ahead as far as the budget allows; a failure goes to whoever takes the chunk."""
        devices = cycle(self._engine.devices)
        pinned = self._engine.devices[0].type == "cuda"
        try:
            for shard in shards:
                for chunk in self._chunks(shard):
                    if not self._budget.acquire(chunk.cost):
                        return
                    data = {i: self._read_origin(chunk, i, pinned=pinned) for i in chunk.origins}
                    self._ready.put(self._pool.submit(self._work, chunk, data, next(devices)))
        except BaseException as error:  # noqa: BLE001  # it is raised where the chunk is taken
            failed: Future[_Done] = Future()
            failed.set_exception(error)
            self._ready.put(failed)

    def _read_origin(self, chunk: _Chunk, number: int, *, pinned: bool) -> torch.Tensor:
        ref = chunk.tensor.origins[number].ref
        width = 1 if chunk.tensor.action is Action.COPY else _width(chunk.tensor, number)
        data = read_bytes(ref, chunk.start * width, chunk.stop * width, pinned=pinned)
        if isinstance(ref.source, FileBytes):
            self._hashes.feed(ref.source.path, ref.source.offset + chunk.start * width, as_bytes(data))
        return data

    def _work(self, chunk: _Chunk, data: Mapping[int, torch.Tensor], device: torch.device) -> _Done:
        if chunk.tensor.action is Action.COPY:
            return [_Piece(as_bytes(data[0]), [])] * len(self._variants)
        # Outputs for which a tensor goes equally far hold the same.
        made: dict[tuple[float, ...], _Piece] = {}
        wanted = [v.strength.of(chunk.tensor.name) for v in self._variants]
        for alphas in wanted:
            if alphas not in made:
                made[alphas] = self._piece(chunk, data, alphas, device)
        return [made[alphas] for alphas in wanted]

    def _piece(
        self, chunk: _Chunk, data: Mapping[int, torch.Tensor], alphas: Sequence[float], device: torch.device
    ) -> _Piece:
        """Return what a chunk becomes where the adapters go as far as ``alphas``."""
        tensor = chunk.tensor
        mixture = tensor.mixture(chunk.segment, alphas)
        steps = [(s, alphas[s.adapter]) for s in chunk.segment.steps if alphas[s.adapter]]
        first = next(iter(mixture))
        ref = tensor.origins[first].ref
        # What stays the base's own keeps its bytes.
        same = not steps and len(mixture) == 1 and ref is tensor.base and ref.dtype == tensor.dtype
        if same or ref.dtype not in TORCH_DTYPES:
            return _Piece(as_bytes(data[first]), [])
        elements = {i: data[i].view(TORCH_DTYPES[tensor.origins[i].ref.dtype]) for i in mixture}
        out, measures = fold(
            [(elements[i], weight) for i, weight in mixture.items()],
            [(step, self._layers.get(step, alpha, device)) for step, alpha in steps],
            chunk.start,
            TORCH_DTYPES[tensor.dtype],
            compute=self._engine.compute,
            device=device,
            tile=chunk.segment.tile(TILE_ELEMENTS[device.type]),
        )
        # The base's infinities, as in a mask, are its own affair; an adapter's are damage.
        brought = [x for i, x in elements.items() if tensor.origins[i].adapter is not None]
        unsound = sum(int((~torch.isfinite(x)).sum()) for x in brought)
        measures = [replace(m, unsound=0) for m in measures]
        measures[0] = replace(measures[0], unsound=unsound)
        blocks: Sequence[Block] = ()
        if self._back is not None and len(mixture) == 1:
            if (record := self._engine.records.get(tensor.name)) is not None:
                out = put_right(record, chunk.start, out)
                # What undoing makes too large for the dtype, the record has as it was.
                measures = [replace(m, damaged=0) for m in measures]
            found, blocks = self._back.go(
                out,
                elements[first],
                steps,
                chunk.segment,
                chunk.start,
                device,
                correct=self._engine.reversible and ref is tensor.base,
                tried=self._engine.inverse and record is None,
            )
            measures[0] += found
        return _Piece(as_bytes(out), measures, blocks)


def _width(tensor: TensorPlan, origin: int) -> int:
    """Return the bytes of an element of one of a tensor's origins."""
    ref = tensor.origins[origin].ref
    return ref.nbytes // ref.num_elements


def check_finite(tensor: TensorPlan, measure: Measure) -> None:
    """See that what was made of a tensor is finite.

    Raises:
        InputError: If it is not.
    """
    if measure.damaged:
        raise InputError(
            f"{tensor.name}: {measure.damaged} values are not finite as {tensor.dtype}, though the base's are.",
            hint="Write a wider dtype (--dtype float32), or look for very large scales in the adapter.",
        )
    if measure.unsound:
        raise InputError(
            f"{tensor.name}: {measure.unsound} values in the adapter's {tensor.source.name} are not finite.",
            hint="The training diverged, or the file is damaged. Use an earlier adapter.",
        )


def _names(shard: str, variant: Variant, engine: Engine) -> list[str]:
    """Return the files that are written for a shard."""
    return [variant.path(shard), *([undo_name(shard)] if engine.reversible else [])]


def _undo_writer(
    plan: FoldPlan, shard: Shard[TensorPlan], staging: Staging, opened: contextlib.ExitStack
) -> UndoWriter:
    """Open the file that undoes a shard, as long as ``opened`` is."""
    base = next((f.path for f in plan.base.files if f.name == shard.name), None)
    return UndoWriter(opened.enter_context(staging.write(undo_name(shard.name))), shard.tensors, base)


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
