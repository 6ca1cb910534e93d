"""How much memory a merge takes, and how it is kept within a bound given in bytes."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.remote import RANGE_BYTES, RANGES, RemotePath
from boft_export.checkpoint.remote_objects import PART_BYTES
from boft_export.errors import ResourceError
from boft_export.linalg.path import InterpolationPath
from boft_export.linalg.planner import SMALLEST_STAGE, plan_stages
from boft_export.planning import Action, FoldPlan, Segment, Step, TensorPlan
from boft_export.planning.strength import Course

# The interpreter with what a run imports: with torch's libraries, and without.
RUNTIME_BYTES = 300 << 20
_SMALL_RUNTIME_BYTES = 100 << 20
# Elements of a tile: in float64 a tile and its result stay in a core's second-level cache. A GPU wants more at once, of
# which the bytes are a little fewer than a power of 2: that is what page-locked memory is rounded up to.
TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 15 << 20}
# What is read at once, where memory allows.
CHUNK_BYTES = 1 << 20
# And from a store, where each request takes its time.
REMOTE_CHUNK_BYTES = 8 << 20
# What is held of ranges on their way from a store, for each thread, and of parts on their way to one, for each file.
_REMOTE_READ = RANGES * RANGE_BYTES
_REMOTE_WRITE = 3 * PART_BYTES
# Threads that one weight file keeps busy: two digest what is read and what is written, as fast as a core can, and all
# else takes as long again (docs/speed.md).
_JOBS_PER_SHARD = 4
DEFAULT_IN_FLIGHT = 64 << 20
_MOST_JOBS = 8
# Tiles in float64 that are alive at once while one is folded, measured, and rounded.
_TILES_ALIVE = 6
# And while the way back is gone, and what it misses is told.
_TILES_ALIVE_BACK = 8
# Outputs' worth of bytes of what the way back misses: at most its elements whole, and two bits and a byte for each.
WAY_BACK_OUTPUTS = 2
# What the allocator keeps of the pieces of each further output, with its file's buffer and its digest.
_OUTPUT_BYTES = 320 << 10
# Real matrices' worth of memory that finding eigenvectors and taking a power of them needs at once.
_DECOMPOSITION = 10


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided.

    Attributes:
        in_flight: Bytes of weights read and not yet written, at most.
        chunk: Bytes to read at once.
        share: Bytes in flight that a chunk may take, so that reading, folding and writing go on side by side.
        rotations: Bytes of rotations to keep ready: those of one more tensor than there are threads that fold.
        peak: The whole process, at most.
    """

    in_flight: int
    chunk: int
    share: int
    rotations: int
    peak: int

    def tiles(self, tensor: TensorPlan, segment: Segment, tile: int, outputs: int) -> int:
        """Return how many tiles of ``tile`` elements make a chunk."""
        width = max(o.ref.nbytes // max(o.ref.num_elements, 1) for o in tensor.origins)
        return max(1, min(self.chunk // (tile * width), self.share // chunk_bytes(tensor, segment, tile, outputs)))


def plan_memory(
    plan: FoldPlan,
    course: Course,
    limit: int | None,
    jobs: int,
    device: str = "cpu",
    *,
    way_back: bool = False,
    torch: bool = True,
    beside: int = 0,
) -> MemoryPlan:
    """Divide memory for a run.

    Args:
        plan: What will be done.
        course: How far each output goes.
        limit: Bytes the whole process may take; None for what runs well.
        jobs: Threads that read, fold and write.
        device: ``cpu`` or ``cuda``; on a GPU the tiles are in its own memory.
        way_back: Each fold is undone too, and what that misses may be written.
        torch: It is loaded.
        beside: Bytes that whoever takes the results needs.

    Raises:
        ResourceError: If ``limit`` is too small even for the smallest steps.
    """
    folded = [(t, s) for t in plan.tensors if t.action is not Action.COPY for s in t.segments]
    tile = max((s.tile(TILE_ELEMENTS[device]) for _, s in folded), default=0)
    alive = _TILES_ALIVE + (_TILES_ALIVE_BACK if way_back else 0)
    scratch = jobs * tile * 8 * alive if device == "cpu" else 0
    alphas = course.alphas_of_layers(plan)

    def kept(tensor: TensorPlan) -> int:
        return sum(rotation_bytes(s, course.path, alphas[s.adapter, s.layer.module]) for s in tensor.steps)

    # Twice: the compiled kernel has its own form of them, and the way back its own.
    rotations = (jobs + 1) * max((kept(t) for t, _ in folded), default=0)
    outputs = len(course.variants) + (WAY_BACK_OUTPUTS if way_back else 0)
    runtime = RUNTIME_BYTES if torch else _SMALL_RUNTIME_BYTES
    fixed = runtime + beside + scratch + rotations * 2 + (outputs - 1) * _OUTPUT_BYTES
    smallest = max((chunk_bytes(t, s, s.tile(TILE_ELEMENTS[device]), outputs) for t, s in folded), default=1 << 16)
    if outputs > 1:
        # Of many outputs the pieces are small, and the allocator keeps a chunk's worth of them.
        fixed += smallest
    wanted = REMOTE_CHUNK_BYTES if is_remote(plan) else CHUNK_BYTES
    in_flight = max(DEFAULT_IN_FLIGHT, (jobs + 1) * max(smallest, 2 * wanted)) if limit is None else limit - fixed
    if in_flight < smallest:
        raise ResourceError(
            f"{limit or 0:,} bytes of memory are too few: this run needs {fixed + smallest:,}.",
            hint=f"Raise --max-memory to at least {-(-(fixed + smallest) // (1 << 20))}MiB, or use fewer --jobs.",
        )
    # Whole elements, whatever their size.
    chunk = max(min(wanted, in_flight // (2 * (jobs + 1)) // 8 * 8), 1 << 16)
    return MemoryPlan(in_flight, chunk, in_flight // (jobs + 1), rotations, fixed + in_flight)


def rotation_bytes(step: Step, path: InterpolationPath, alphas: Sequence[float]) -> int:
    """Return the size of a step's rotations at ``alphas``, built and fused, in float64."""
    layer = step.layer
    stages = [layer.run_size(i, j) for i, j in plan_stages(layer.num_factors, layer.run_size)]
    # Between base and tuned, a geodesic is dense in each coupled group.
    whole = path is InterpolationPath.GEODESIC and layer.num_factors > 1
    between = [layer.run_size(0, layer.num_factors)] if whole else stages
    fused = sum(max(size, SMALLEST_STAGE) for a in alphas for size in (stages if a == 1 else between))
    # Trained blocks and their transforms are there while the stages are built, and with them a decomposition: complex
    # eigenvectors, what they were found from, and one power in the making.
    blocks = layer.num_factors * layer.block_size
    decomposed = 0 if all(a == 1 for a in alphas) else _DECOMPOSITION * (between[0] if whole else blocks)
    return 8 * layer.num_features * (fused + 3 * blocks + decomposed)


def chunk_bytes(tensor: TensorPlan, segment: Segment, elements: int, outputs: int) -> int:
    """Return the bytes in flight for ``elements`` of a segment: what is read, and what is written to each output."""
    count = min(elements, segment.stop - segment.start)
    read = sum(o.ref.nbytes // max(o.ref.num_elements, 1) for o in tensor.origins)
    return count * (read + DTYPE_BITS[tensor.dtype] // 8 * outputs)


def is_remote(plan: FoldPlan) -> bool:
    """Tell whether the base is read from a store."""
    return isinstance(plan.base.root, RemotePath)


def remote_bytes(plan: FoldPlan, course: Course, output: AnyPath, jobs: int, *, reversible: bool = False) -> int:
    """Return what is held of bytes on their way from a store and to one.

    Args:
        plan: What will be done.
        course: How far each output goes.
        output: The folder to write.
        jobs: Threads that read, fold and write.
        reversible: With each weight file one is written that undoes it.
    """
    roots = (plan.base.root, *(a.root for a in plan.adapters))
    reading = jobs * _REMOTE_READ if any(isinstance(r, RemotePath) for r in roots) else 0
    files = open_shards(jobs) * (len(course.variants) + reversible)
    return reading + (files * _REMOTE_WRITE if isinstance(output, RemotePath) else 0)


def shards_in_turn(jobs: int) -> int:
    """Return how many weight files of an output are written side by side."""
    return -(-jobs // _JOBS_PER_SHARD)


def open_shards(jobs: int) -> int:
    """Return how many are open at once: one more, begun before the last pieces of another are written and flushed."""
    return shards_in_turn(jobs) + 1


def usable_cores() -> int:
    """Return how many cores this process may use."""
    # Not every system can bind a process to some of them.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(*, remote: bool = False) -> int:
    """Return how many threads read, fold and write: one for each core, no more than a disk can feed.

    Args:
        remote: They wait for a store most of the time.
    """
    return _MOST_JOBS if remote else max(1, min(_MOST_JOBS, usable_cores()))


class Budget:
    """A semaphore counted in bytes, or in files, that can be closed.

    Args:
        limit: What may be out at once; one request larger than that waits until nothing is out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._out = 0
        self._closed = False
        self._changed = threading.Condition()
        self.peak = 0

    def acquire(self, size: int) -> bool:
        """Wait until ``size`` may be taken; return False if the budget was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._out == 0 or self._out + size <= self._limit)
            self._out += size
            self.peak = max(self.peak, self._out)
            return not self._closed

    def release(self, size: int) -> None:
        """Give ``size`` back."""
        with self._changed:
            self._out -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone who waits go on, and be told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
