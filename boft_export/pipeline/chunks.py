"""A plan cut into chunks: runs of a tensor's elements that are read, folded and written at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from boft_export.checkpoint import Shard
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.pipeline.memory import TILE_ELEMENTS, MemoryPlan, chunk_bytes
from boft_export.planning import Action, Segment, TensorPlan
from boft_export.planning.strength import Variant


@dataclass(frozen=True)
class Chunk:
    """A run of a tensor's elements, or of its bytes where they are only copied, and what it is made of.

    Attributes:
        start: The first element or byte in the tensor.
        origins: The origins to read, by number.
        cost: Bytes that count as in flight.
        offset: Where in the output's file its bytes begin.
        nbytes: How many they are.
    """

    tensor: TensorPlan
    segment: Segment
    start: int
    stop: int
    origins: tuple[int, ...]
    cost: int
    offset: int
    nbytes: int

    def width(self, origin: int) -> int:
        """Return the bytes in one of the chunk's units, of one of the tensor's origins."""
        ref = self.tensor.origins[origin].ref
        return 1 if self.tensor.action is Action.COPY else ref.nbytes // ref.num_elements


def chunks(
    shard: Shard[TensorPlan], variants: Sequence[Variant], memory: MemoryPlan, outputs: int, device_type: str
) -> Iterator[Chunk]:
    """Yield a shard's chunks in order.

    Args:
        shard: The shard.
        variants: How far each output goes.
        memory: How memory is divided.
        outputs: As how many outputs the bytes in flight count.
        device_type: ``cpu`` or ``cuda``.
    """
    offset = len(shard.header)
    for tensor in shard.tensors:
        width = DTYPE_BITS[tensor.dtype] // 8
        for segment in tensor.segments:
            if tensor.action is Action.COPY:
                size = memory.chunk
                for start in range(0, tensor.source.nbytes, size):
                    stop = min(start + size, tensor.source.nbytes)
                    yield Chunk(tensor, segment, start, stop, (0,), stop - start, offset, stop - start)
                    offset += stop - start
                continue
            mixtures = [tensor.mixture(segment, v.strength.of(tensor.name)) for v in variants]
            origins = tuple(sorted({i for m in mixtures for i in m}))
            tile = segment.tile(TILE_ELEMENTS[device_type])
            size = tile * memory.tiles(tensor, segment, tile, outputs)
            for start in range(segment.start, segment.stop, size):
                stop = min(start + size, segment.stop)
                cost = chunk_bytes(tensor, segment, stop - start, outputs)
                nbytes = (stop - start) * width
                yield Chunk(tensor, segment, start, stop, origins, cost, offset, nbytes)
                offset += nbytes
