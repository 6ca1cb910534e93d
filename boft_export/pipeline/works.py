"""What threads that make pieces of a plan share: operators, memory, buffers, and the digests of what they read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from boft_export.checkpoint import Shard
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.tensors import BytesInFile
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.buffers import BufferPool
from boft_export.pipeline.chunks import Chunk, chunks
from boft_export.pipeline.crew import Line
from boft_export.pipeline.devices import Device
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.memory import Budget
from boft_export.pipeline.workbench import Piece, Workbench
from boft_export.planning import FoldPlan, TensorPlan
from boft_export.planning.strength import Course

if TYPE_CHECKING:
    from boft_export.pipeline.buffers import Buffer
    from boft_export.pipeline.engine import Engine


class _Place(NamedTuple):
    """Where bytes come from, and when it is their turn to be digested."""

    line: Line
    ticket: int
    path: AnyPath
    offset: int


@dataclass(frozen=True)
class Admitted:
    """A chunk that there is memory for: where it is folded, and by origin the line in which it is digested."""

    chunk: Chunk
    device: Device
    lines: Mapping[int, _Place]


class Use(Protocol):
    """What is done with a chunk."""

    def __call__(self, pieces: list[Piece], done: Callable[[], None]) -> None:
        """Use what became of a chunk; call ``done`` once it is needed no more."""


class Works:
    """Makes pieces of a plan's chunks, in bounded memory.

    Args:
        plan: The plan.
        course: How far each output goes.
        engine: How to compute.
        hashes: Digests of the inputs.
    """

    def __init__(self, plan: FoldPlan, course: Course, engine: Engine, hashes: InputHashes) -> None:
        keep_tiles_free_chunks()
        self.engine = engine
        self.variants = course.variants
        self.layers = engine.operators(plan, course)
        self.hashes = hashes
        self._budget = Budget(engine.memory.in_flight)
        self._pool = BufferPool(engine.memory.in_flight, pinned=engine.devices[0].type == "cuda")
        back = engine.operators(plan, course, back=True) if engine.way_back else None
        self._bench = Workbench(course, engine, self.layers, back, self._pool)
        # Each input is digested in the order of its bytes.
        self._inputs: dict[AnyPath, Line] = {}
        self._admitted = 0

    def chunks(self, shard: Shard[TensorPlan]) -> Iterator[Chunk]:
        """Yield a shard's chunks in order."""
        outputs = len(self.variants) + self.engine.further_outputs
        return chunks(shard, self.variants, self.engine.memory, outputs, self.engine.devices[0].type)

    def admit(self, chunk: Chunk) -> Admitted | None:
        """Wait until there is memory for the next chunk; None where the work was stopped meanwhile."""
        if not self._budget.acquire(chunk.cost):
            return None
        lines = {}
        for origin in chunk.origins:
            source = chunk.tensor.origins[origin].ref.source
            if isinstance(source, BytesInFile):
                line = self._inputs.setdefault(source.path, Line())
                offset = source.offset + chunk.start * chunk.width(origin)
                lines[origin] = _Place(line, line.ticket(), source.path, offset)
        devices = self.engine.devices
        self._admitted += 1
        return Admitted(chunk, devices[self._admitted % len(devices)], lines)

    def make(self, admitted: Admitted, use: Use) -> None:
        """Read a chunk, fold it, and have it used."""
        chunk = admitted.chunk
        data = self._bench.read(chunk)
        pieces = self._bench.make(chunk, data, admitted.device)
        done = _Countdown(1 + len(admitted.lines), partial(self._release, chunk, data, pieces))
        for origin, place in admitted.lines.items():
            place.line.put(place.ticket, partial(self._digest, place, data[origin], done))
        use(pieces, done)

    def stop(self) -> None:
        """Let everyone who waits for memory go, and admit no more."""
        self._budget.close()
        self.hashes.stop()

    def _digest(self, place: _Place, data: Buffer, done: Callable[[], None]) -> None:
        self.hashes.feed(place.path, place.offset, data.data)
        done()

    def _release(self, chunk: Chunk, data: Mapping[int, Buffer], pieces: Sequence[Piece]) -> None:
        self._bench.give_back(data, pieces)
        self._budget.release(chunk.cost)


class _Countdown:
    """Calls ``end`` when it was called ``count`` times."""

    def __init__(self, count: int, end: Callable[[], None]) -> None:
        self._count = count
        self._end = end
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._count -= 1
            last = not self._count
        if last:
            self._end()
