"""Running a plan: one thread reads, some fold, one writes, with a bound on the bytes between them."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch

from boft_export.checkpoint import Shard, Staging
from boft_export.checkpoint.tensors import FileBytes
from boft_export.errors import InputError
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.fold import Measure, fold
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.memory import TILE_ELEMENTS, ByteBudget, MemoryPlan, chunk_bytes
from boft_export.pipeline.torch_io import TORCH_DTYPES, as_bytes, one_thread, read_bytes
from boft_export.planning import Action, FoldPlan, Segment, TensorPlan

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Engine:
    """How a plan is run; none of it changes the output's bytes but ``compute`` and, for float32 output, the device.

    Attributes:
        devices: Where to fold.
        compute: The dtype to fold in.
        jobs: Threads that fold.
        memory: How memory is divided.
    """

    devices: tuple[torch.device, ...]
    compute: torch.dtype
    jobs: int
    memory: MemoryPlan


@dataclass(frozen=True)
class TensorResult:
    """What was done to a tensor."""

    plan: TensorPlan
    measure: Measure | None
    residual: float | None


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Attributes:
        tensors: Each tensor's result, in order.
        files: SHA-256 of each weight file written.
        inputs: SHA-256 of each input file.
        resumed: Weight files taken over from a killed run.
    """

    tensors: tuple[TensorResult, ...]
    files: dict[str, str]
    inputs: dict[str, str]
    resumed: tuple[str, ...]


@dataclass(frozen=True)
class _Chunk:
    """A run of bytes of a tensor's source, and what in the output it becomes."""

    tensor: TensorPlan
    segment: Segment
    start: int
    stop: int
    cost: int


_Done = tuple[memoryview, list[Measure]]


def run_plan(plan: FoldPlan, staging: Staging, engine: Engine, progress: Progress | None = None) -> RunResult:
    """Write a plan's weight files into ``staging``, but for those that are there already.

    Memory stays within ``engine.memory`` whatever the plan's size: a byte budget holds back the reader.

    Raises:
        InputError: If a result is not finite.
        DamagedFileError: If an input ends early.
        AccessError: If a file can't be read or written.
        ResourceError: If the disk is full.
    """
    keep_tiles_free_chunks()
    layers = LayerCache(plan, engine.compute, engine.memory.rotations * len(engine.devices))
    hashes = InputHashes(plan.input_files())
    todo = [s for s in plan.shards if s.name not in staging.done]
    total = sum(s.nbytes for s in plan.shards)
    done = total - sum(s.nbytes for s in todo)
    stream = _Stream(todo, engine, layers, hashes)
    try:
        for shard in todo:
            digest = hashlib.sha256(shard.header)
            measures: dict[str, Measure] = {}
            with staging.write(shard.name) as file:
                file.write(shard.header)
                done += len(shard.header)
                for chunk, (data, tiles) in stream.take(shard):
                    file.write(data)
                    digest.update(data)
                    done += len(data)
                    name = chunk.tensor.name
                    for measure in tiles:
                        measures[name] = measures.get(name, Measure()) + measure
                        if measure.damaged or (measure.unsound and chunk.tensor.source is not chunk.tensor.base):
                            raise _not_finite(chunk.tensor, measure)
                    if progress is not None:
                        progress(done, total, name)
            staging.record(shard.name, _journal_entry(shard, digest.hexdigest(), measures, layers))
    finally:
        stream.close()
    resumed = tuple(s.name for s in plan.shards if s not in todo)
    return RunResult(
        tensors=tuple(_result(t, staging.done[s.name]) for s in plan.shards for t in s.tensors),
        files={s.name: staging.done[s.name]["sha256"] for s in plan.shards},
        inputs=hashes.digests(),
        resumed=resumed,
    )


class _Stream:
    """Folded chunks in the order of the plan, read and folded ahead of whoever takes them."""

    def __init__(
        self, shards: Sequence[Shard[TensorPlan]], engine: Engine, layers: LayerCache, hashes: InputHashes
    ) -> None:
        self._engine = engine
        self._layers = layers
        self._hashes = hashes
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
                        yield _Chunk(tensor, segment, start, stop, stop - start)
                    continue
                width = tensor.source.nbytes // tensor.source.num_elements
                tile = segment.tile(TILE_ELEMENTS[kind])
                size = tile * max(1, self._engine.memory.chunk // (tile * width))
                for first in range(segment.start, segment.stop, size):
                    last = min(first + size, segment.stop)
                    cost = chunk_bytes(tensor, segment, last - first)
                    yield _Chunk(tensor, segment, first * width, last * width, cost)

    def _read(self, shards: Sequence[Shard[TensorPlan]]) -> None:
        """Read ahead as far as the budget allows; a failure goes to whoever takes the chunk."""
        devices = cycle(self._engine.devices)
        pinned = self._engine.devices[0].type == "cuda"
        try:
            for shard in shards:
                for chunk in self._chunks(shard):
                    if not self._budget.acquire(chunk.cost):
                        return
                    source = chunk.tensor.source
                    data = read_bytes(source, chunk.start, chunk.stop, pinned=pinned)
                    if isinstance(source.source, FileBytes):
                        self._hashes.feed(source.source.path, source.source.offset + chunk.start, as_bytes(data))
                    self._ready.put(self._pool.submit(self._work, chunk, data, next(devices)))
        except BaseException as error:  # noqa: BLE001  # it is raised where the chunk is taken
            failed: Future[_Done] = Future()
            failed.set_exception(error)
            self._ready.put(failed)

    def _work(self, chunk: _Chunk, data: torch.Tensor, device: torch.device) -> _Done:
        tensor = chunk.tensor
        if tensor.action is Action.COPY or tensor.source.dtype not in TORCH_DTYPES:
            return as_bytes(data), []
        elements = data.view(TORCH_DTYPES[tensor.source.dtype])
        out, measures = fold(
            elements,
            chunk.segment,
            chunk.start // elements.element_size(),
            TORCH_DTYPES[tensor.dtype],
            compute=self._engine.compute,
            device=device,
            tile=chunk.segment.tile(TILE_ELEMENTS[device.type]),
            operator=lambda step: self._layers.get(step, device),
        )
        return as_bytes(out), measures


def _not_finite(tensor: TensorPlan, measure: Measure) -> InputError:
    if measure.unsound and not measure.damaged:
        return InputError(
            f"{tensor.name}: {measure.unsound} values in the adapter's {tensor.source.name} are not finite.",
            hint="The training diverged, or the file is damaged. Use an earlier adapter.",
        )
    return InputError(
        f"{tensor.name}: {measure.damaged} values are not finite as {tensor.dtype}, though the base's are.",
        hint="Write a wider dtype (--dtype float32), or look for very large scales in the adapter.",
    )


def _journal_entry(
    shard: Shard[TensorPlan], sha256: str, measures: dict[str, Measure], layers: LayerCache
) -> dict[str, object]:
    tensors = {}
    for tensor in shard.tensors:
        measure = measures.get(tensor.name)
        residuals = [layers.residuals[s.adapter, s.layer.module] for s in tensor.steps]
        tensors[tensor.name] = {
            "measure": asdict(measure) if measure is not None else None,
            "residual": max(residuals) if residuals else None,
        }
    return {"sha256": sha256, "tensors": tensors}


def _result(tensor: TensorPlan, entry: Mapping[str, Any]) -> TensorResult:
    record = entry["tensors"][tensor.name]
    measure = Measure(**record["measure"]) if record["measure"] is not None else None
    return TensorResult(tensor, measure, record["residual"])
