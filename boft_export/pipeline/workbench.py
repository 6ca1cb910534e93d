"""What becomes of a chunk: its bytes read, folded as far as each output goes, and rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from boft_export.pipeline.buffers import BufferPool
from boft_export.pipeline.chunks import Chunk
from boft_export.pipeline.devices import Device
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.measure import Measure
from boft_export.pipeline.memory import TILE_ELEMENTS
from boft_export.pipeline.native_fold import NativeFold
from boft_export.pipeline.one_torch_thread import ONE_TORCH_THREAD
from boft_export.pipeline.recipe import recipe
from boft_export.planning import Action, Step

if TYPE_CHECKING:
    from boft_export.pipeline.buffers import Buffer
    from boft_export.pipeline.engine import Engine
    from boft_export.pipeline.undo import Block
    from boft_export.pipeline.way_back import WayBack
    from boft_export.planning.strength import Course


class Piece(NamedTuple):
    """What a chunk becomes in one output.

    Attributes:
        data: Its bytes.
        measures: What was done to each tile.
        corrections: What undoing it misses.
        untouched: Whether they are the base's tensor's.
    """

    data: Buffer
    measures: list[Measure]
    corrections: Sequence[Block] = ()
    untouched: bool = False


class Workbench:
    """Makes pieces of chunks, by the compiled kernel where that can, else by torch.

    Args:
        course: How far each output goes.
        engine: How to compute.
        layers: The operators.
        back: Those that undo, where the way back is gone.
        pool: Where buffers come from.
    """

    def __init__(
        self, course: Course, engine: Engine, layers: LayerCache, back: LayerCache | None, pool: BufferPool
    ) -> None:
        self._variants = course.variants
        self._path = course.path
        self._engine = engine
        self._layers = layers
        self._pool = pool
        # As the plan counts them: those of one more tensor than there are threads that fold.
        programs = (engine.jobs + 1) * len(course.variants)
        self._native = NativeFold(layers, course.path, programs) if engine.is_native else None
        self._back: WayBack | None = None
        if back is not None:
            from boft_export.pipeline.torch_io import DTYPE_NAMED
            from boft_export.pipeline.way_back import WayBack

            self._back = WayBack(layers, back, DTYPE_NAMED[engine.compute])

    def read(self, chunk: Chunk) -> dict[int, Buffer]:
        """Return the bytes of each of a chunk's origins.

        Raises:
            DamagedFileError: If a file ends early.
            AccessError: If it can't be read.
        """
        found = {}
        for number in chunk.origins:
            width = chunk.width(number)
            found[number] = self._pool.take((chunk.stop - chunk.start) * width)
            chunk.tensor.origins[number].ref.read_into(found[number].data, chunk.start * width)
        return found

    def make(self, chunk: Chunk, data: Mapping[int, Buffer], device: Device) -> list[Piece]:
        """Return what a chunk becomes in each output."""
        if chunk.tensor.action is Action.COPY:
            return [Piece(data[0], [], untouched=True)] * len(self._variants)
        # Outputs for which a tensor goes equally far hold the same.
        made: dict[tuple[float, ...], Piece] = {}
        wanted = [v.strength.of(chunk.tensor.name) for v in self._variants]
        for alphas in wanted:
            if alphas not in made:
                made[alphas] = self._piece(chunk, data, alphas, device)
        return [made[alphas] for alphas in wanted]

    def give_back(self, data: Mapping[int, Buffer], pieces: Sequence[Piece]) -> None:
        """Let a chunk's buffers be used again."""
        for buffer in {id(b): b for b in (*data.values(), *(p.data for p in pieces))}.values():
            self._pool.give(buffer)

    def _piece(self, chunk: Chunk, data: Mapping[int, Buffer], alphas: Sequence[float], device: Device) -> Piece:
        """Return what a chunk becomes where the adapters go as far as ``alphas``."""
        tensor, segment = chunk.tensor, chunk.segment
        way = recipe(tensor, segment, alphas)
        mixture, steps = way.mixture, way.steps
        first = next(iter(mixture))
        if way.stays:
            return Piece(data[first], [], untouched=way.untouched)
        tile = segment.tile(TILE_ELEMENTS[device.type])
        if self._native is not None and way.suits_kernel(self._path):
            out = self._pool.take(chunk.nbytes)
            measures = self._native.fold(data[first], way.dtypes, steps, chunk.start, tile, out)
            brought = [first] if tensor.origins[first].adapter is not None else []
        else:
            with ONE_TORCH_THREAD:
                out, measures = self._fold_by_torch(chunk, data, mixture, steps, tile, device)
            brought = [i for i in mixture if tensor.origins[i].adapter is not None]
        # The base's infinities, as in a mask, are its own affair; an adapter's are damage.
        unsound = sum(_not_finite(data[i], tensor.origins[i].ref.dtype) for i in brought)
        measures = [replace(m, unsound=0) for m in measures]
        measures[0] = replace(measures[0], unsound=unsound)
        if self._back is None or len(mixture) != 1:
            return Piece(out, measures)
        with ONE_TORCH_THREAD:
            return self._go_back(self._back, chunk, data[first], Piece(out, measures), steps, device)

    def _fold_by_torch(
        self,
        chunk: Chunk,
        data: Mapping[int, Buffer],
        mixture: Mapping[int, float],
        steps: Sequence[tuple[Step, float]],
        tile: int,
        device: Device,
    ) -> tuple[Buffer, list[Measure]]:
        from boft_export.pipeline.fold import fold
        from boft_export.pipeline.torch_io import DTYPE_NAMED, as_tensor, torch_device

        place = torch_device(device)
        out = self._pool.take(chunk.nbytes)
        measures = fold(
            [(as_tensor(data[i], chunk.tensor.origins[i].ref.dtype), weight) for i, weight in mixture.items()],
            [(step, self._layers.get(step, alpha, place)) for step, alpha in steps],
            chunk.start,
            as_tensor(out, chunk.tensor.dtype),
            compute=DTYPE_NAMED[self._engine.compute],
            device=place,
            tile=tile,
        )
        return out, measures

    def _go_back(
        self,
        back: WayBack,
        chunk: Chunk,
        source: Buffer,
        piece: Piece,
        steps: Sequence[tuple[Step, float]],
        device: Device,
    ) -> Piece:
        """Put right what a record says, and find what undoing misses."""
        from boft_export.pipeline.corrections import put_right
        from boft_export.pipeline.torch_io import as_tensor, torch_device

        tensor, engine = chunk.tensor, self._engine
        ref = tensor.origins[chunk.origins[0]].ref
        out, measures, *_ = piece
        result = as_tensor(out, tensor.dtype)
        if (record := engine.records.get(tensor.name)) is not None:
            result.copy_(put_right(record, chunk.start, result))
            # What undoing makes too large for the dtype, the record has as it was.
            measures = [replace(m, damaged=0) for m in measures]
        found, blocks = back.go(
            result,
            as_tensor(source, ref.dtype),
            steps,
            chunk.segment,
            chunk.start,
            torch_device(device),
            correct=engine.reversible and ref is tensor.base,
            tried=engine.inverse and record is None,
        )
        return Piece(out, [measures[0] + found, *measures[1:]], blocks)


def _not_finite(data: Buffer, dtype: str) -> int:
    """Return how many values are not finite."""
    width, exponent = _EXPONENT[dtype]
    bits = data.view(width)
    return int(((bits & exponent) == exponent).sum())


# Each dtype as integers, and the bits that are all set in infinities and what is no number.
_EXPONENT = {
    "F64": (np.uint64, np.uint64(0x7FF << 52)),
    "F32": (np.uint32, np.uint32(0xFF << 23)),
    "F16": (np.uint16, np.uint16(0x1F << 10)),
    "BF16": (np.uint16, np.uint16(0xFF << 7)),
}
