"""How much memory a merge takes, and how it is kept within a bound given in bytes."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

from boft_export.errors import ResourceError
from boft_export.linalg.planner import SMALLEST_STAGE, plan_stages
from boft_export.planning import Action, FoldPlan, Segment, Step, TensorPlan

# The interpreter with torch's libraries in it.
RUNTIME_BYTES = 300 << 20
# Elements of a tile: in float64 a tile and its result stay in a core's second-level cache. A GPU wants more at once.
TILE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
# What is read at once, where memory allows.
CHUNK_BYTES = 8 << 20
DEFAULT_IN_FLIGHT = 128 << 20
_MOST_JOBS = 8
# Tiles in float64 that are alive at once while one is folded, measured, and rounded.
_TILES_ALIVE = 6


@dataclass(frozen=True)
class MemoryPlan:
    """How memory is divided.

    Attributes:
        in_flight: Bytes of weights read and not yet written, at most.
        chunk: Bytes to read at once.
        rotations: Bytes of rotations to keep ready: those of one more tensor than there are threads that fold.
        peak: The whole process, at most.
    """

    in_flight: int
    chunk: int
    rotations: int
    peak: int


def plan_memory(plan: FoldPlan, limit: int | None, jobs: int, device: str = "cpu") -> MemoryPlan:
    """Divide memory for a merge.

    Args:
        plan: What will be done.
        limit: Bytes the whole process may take; None for what runs well.
        jobs: Threads that fold.
        device: ``cpu`` or ``cuda``; on a GPU the tiles are in its own memory.

    Raises:
        ResourceError: If ``limit`` is too small even for the smallest steps.
    """
    folded = [(t, s) for t in plan.tensors if t.action is not Action.COPY for s in t.segments]
    tile = max((s.tile(TILE_ELEMENTS[device]) for _, s in folded), default=0)
    scratch = jobs * tile * 8 * _TILES_ALIVE if device == "cpu" else 0
    rotations = (jobs + 1) * max((sum(map(rotation_bytes, t.steps)) for t, _ in folded), default=0)
    fixed = RUNTIME_BYTES + scratch + rotations
    smallest = max((chunk_bytes(t, s, s.tile(TILE_ELEMENTS[device])) for t, s in folded), default=1 << 16)
    in_flight = max(DEFAULT_IN_FLIGHT, (jobs + 1) * smallest) if limit is None else limit - fixed
    if in_flight < smallest:
        raise ResourceError(
            f"{limit or 0:,} bytes of memory are too few: this merge needs {fixed + smallest:,}.",
            hint=f"Raise --max-memory to at least {-(-(fixed + smallest) // (1 << 20))}MiB, or use fewer --jobs.",
        )
    chunk = max(min(CHUNK_BYTES, in_flight // (2 * (jobs + 1))), 1 << 16)
    return MemoryPlan(in_flight, chunk, rotations, fixed + in_flight)


def rotation_bytes(step: Step) -> int:
    """Return the size of a step's rotation, built and fused, in float64."""
    layer = step.layer
    stages = plan_stages(layer.num_factors, layer.run_size)
    fused = sum(max(layer.run_size(i, j), SMALLEST_STAGE) for i, j in stages)
    # Trained blocks and their transforms are there while the stages are built.
    return 8 * layer.num_features * (fused + 3 * layer.num_factors * layer.block_size)


def chunk_bytes(tensor: TensorPlan, segment: Segment, elements: int) -> int:
    """Return the bytes in flight for ``elements`` of a segment: what is read and what is written."""
    count = min(elements, segment.stop - segment.start)
    total = max(tensor.source.num_elements, 1)
    return count * (tensor.source.nbytes // total + 8 * (tensor.action is not Action.COPY))


def default_jobs() -> int:
    """Return how many threads fold: all cores but one, which reads, writes and hashes; no more than a disk can feed."""
    return max(1, min(_MOST_JOBS, len(os.sched_getaffinity(0)) - 1))


class ByteBudget:
    """A semaphore counted in bytes.

    Args:
        limit: Bytes that may be out at once; one request larger than that waits until nothing is out.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._out = 0
        self._closed = False
        self._changed = threading.Condition()
        self.peak = 0

    def acquire(self, size: int) -> bool:
        """Wait until ``size`` bytes may be taken; return False if the budget was closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._out == 0 or self._out + size <= self._limit)
            self._out += size
            self.peak = max(self.peak, self._out)
            return not self._closed

    def release(self, size: int) -> None:
        """Give ``size`` bytes back."""
        with self._changed:
            self._out -= size
            self._changed.notify_all()

    def close(self) -> None:
        """Let everyone who waits go on, and be told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
