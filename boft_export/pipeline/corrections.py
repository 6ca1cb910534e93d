"""What undoing a fold misses of the base, block by block: found while merging, put right while unmerging.

A block is four parts, each compressed: which elements are some steps of their dtype off; by how many steps; which
elements are kept whole; and their bits. Whole are those that are far off, and those so near to the middle between two
numbers that another machine, which sums in another order, could round them otherwise.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from boft_export.errors import DamagedFileError
from boft_export.linalg.bits import as_integers, from_order, to_order
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.undo import Block, UndoTensor

# Elements of a block, about.
_BLOCK = 1 << 17
_HEAD = struct.Struct("<4I")
_FARTHEST = 127
# How far two machines' results may lie apart, in units of the largest element's last place.
_APART = 128


def corrections(base: Tensor, undone: Tensor, given: Tensor, start: int) -> Iterator[Block]:
    """Yield blocks of corrections for a tile, where it needs any.

    Args:
        base: The base's elements, flat, on the CPU.
        undone: What undoing gives, flat, not yet rounded.
        given: The same, rounded to the base's dtype, on the CPU.
        start: The tile's first element in the tensor.
    """
    noise = undone.nan_to_num(0.0, 0.0, 0.0).abs().amax() * (torch.finfo(undone.dtype).eps * _APART)
    # The middle lies on the side to which a value was not rounded; below a power of two it is at half the distance.
    aside = undone + torch.copysign(2 * noise, undone - given.to(undone.device, undone.dtype))
    whole = as_integers(round_once(aside, base.dtype).cpu()) != as_integers(given)
    whole |= ~torch.isfinite(given)
    if base.element_size() >= undone.element_size():
        whole[:] = True
    places = ((as_integers(base) != as_integers(given)) & ~whole).nonzero().flatten()
    distance = to_order(base[places]) - to_order(given[places])
    near = distance.abs() <= _FARTHEST
    whole[places[~near]] = True
    steps = torch.zeros(base.numel(), dtype=torch.int8)
    steps[places[near]] = distance[near].to(torch.int8)
    count = max(1, round(base.numel() / _BLOCK))
    for parts in zip(*(x.tensor_split(count) for x in (base, steps, whole)), strict=True):
        size = parts[0].numel()
        if any(p.any() for p in parts[1:]):
            yield Block(start, size, _pack(*parts))
        start += size


def put_right(tensor: UndoTensor, start: int, given: Tensor) -> Tensor:
    """Return the base's elements from ``start`` on, from what undoing gives for them, flat, on the CPU.

    Raises:
        DamagedFileError: If a block is not sound.
        AccessError: If the file can't be read.
    """
    given = given.clone()
    for first, count, block in tensor.read(start, start + given.numel()):
        a, b = max(first, start), min(first + count, start + given.numel())
        part = given[a - start : b - start]
        try:
            _apply(block, count, part, slice(a - first, b - first))
        except (zlib.error, ValueError, IndexError, RuntimeError, struct.error) as error:
            raise DamagedFileError(f"{tensor.path}: a block of {tensor.name} can't be read: {error}.") from error
    return given


def _pack(base: Tensor, steps: Tensor, whole: Tensor) -> bytes:
    moved = steps != 0
    parts = (
        np.packbits(moved.numpy()),
        steps[moved].numpy(),
        np.packbits(whole.numpy()),
        as_integers(base[whole]).numpy(),
    )
    packed = [_compress(p.tobytes()) if p.any() else b"" for p in parts]
    return _HEAD.pack(*(len(p) for p in packed)) + b"".join(packed)


def _compress(data: bytes) -> bytes:
    # Noise with runs of zeros: to look for other repetitions takes ten times as long and makes it larger.
    coder = zlib.compressobj(strategy=zlib.Z_RLE)
    return coder.compress(data) + coder.flush()


def _apply(block: bytes, count: int, part: Tensor, within: slice) -> None:
    """Put right the elements ``within`` a block of ``count``, in place."""
    sizes = _HEAD.unpack_from(block)
    if _HEAD.size + sum(sizes) != len(block):
        raise ValueError("its parts don't fill it")
    ends = np.cumsum((_HEAD.size, *sizes))
    pieces = [block[a:b] for a, b in pairwise(ends)]

    def unpack(piece: bytes, size: int) -> np.ndarray:
        if not piece:
            return np.zeros(size, np.uint8)
        decoder = zlib.decompressobj()
        data = decoder.decompress(piece, size + 1)
        if len(data) != size:
            raise ValueError("a part has another size than it should have")
        return np.frombuffer(bytearray(data), np.uint8)

    def mask(piece: bytes) -> np.ndarray:
        return np.unpackbits(unpack(piece, -(-count // 8)), count=count).astype(bool)

    integer = as_integers(part).numpy().dtype
    moved, whole = mask(pieces[0]), mask(pieces[2])
    steps = np.zeros(count, np.int8)
    steps[moved] = unpack(pieces[1], int(moved.sum())).view(np.int8)
    bits = np.zeros(count, integer)
    bits[whole] = unpack(pieces[3], int(whole.sum()) * integer.itemsize).view(integer)
    right = from_order(to_order(part) + torch.from_numpy(steps[within]).long(), part.dtype)
    part.copy_(torch.where(torch.from_numpy(whole[within]), torch.from_numpy(bits[within]).view(part.dtype), right))
