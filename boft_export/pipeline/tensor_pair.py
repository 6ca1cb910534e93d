"""Two tensors of one shape, seen as matrices and read in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from boft_export.checkpoint import TensorRef
from boft_export.linalg.gram import EXACT_ROWS, SKETCH_ROWS
from boft_export.pipeline.torch_io import TORCH_DTYPES, as_bytes, read_bytes

# What a block of the wider tensor is read as at once, and what is computed at once: in a core's cache, in float64.
BLOCK_BYTES = 4 << 20
_TILE_ELEMENTS = 1 << 17
# Rows of a tile and of a block, at least: the sketch of a tile is as wide as its rows, and is touched once for each.
_TILE_ROWS = 16
_BLOCK_ROWS = 64
# Longer rows, where there are many, are not tested for a rotation.
_WIDEST = 1 << 17
# float64 copies of a tile that are alive at once, with what is made of them.
_TILES_ALIVE = 8


@dataclass(frozen=True)
class Block:
    """Some columns of some rows.

    Attributes:
        row: The first of its rows.
        rows: How many.
        column: The first of its columns.
        columns: How many.
    """

    row: int
    rows: int
    column: int
    columns: int


class TensorPair:
    """Two tensors of float dtypes and of one shape, not empty, seen as matrices (out, everything else).

    Attributes:
        rows: The rows of both; a vector is one.
        width: Their length.
        few: Whether rows are so few that a block has all of them, and some columns; else it has whole rows, unless
            they are too long.
        whole: Whether blocks are whole, by rows or by columns: all but those of many rows that are too long.
    """

    def __init__(self, a: TensorRef, b: TensorRef) -> None:
        self.a, self.b = a, b
        self.rows = b.shape[0] if len(b.shape) > 1 else 1
        self.width = b.num_elements // self.rows
        self.few = self.rows <= EXACT_ROWS
        self.whole = self.few or self.width <= _WIDEST

    def blocks(self) -> Iterator[Block]:
        """Yield blocks in order: whole rows of many, pieces of all rows of few, pieces of rows that are too long."""
        elements = BLOCK_BYTES // max(t.nbytes // t.num_elements for t in (self.a, self.b))
        if self.few:
            rows, columns = self.rows, min(self.width, max(1, elements // self.rows))
        elif self.whole:
            rows, columns = max(_BLOCK_ROWS, elements // self.width), self.width
        else:
            rows, columns = 1, min(self.width, elements)
        for row in range(0, self.rows, rows):
            for column in range(0, self.width, columns):
                yield Block(row, min(rows, self.rows - row), column, min(columns, self.width - column))

    def tiles(self, block: Block) -> Iterator[tuple[slice, slice]]:
        """Yield the rows and columns, within a block, of what is computed at once; whole rows if the block has them."""
        if self.few or not self.whole:
            rows, columns = block.rows, max(1, _TILE_ELEMENTS // block.rows)
        else:
            rows, columns = max(_TILE_ROWS, _TILE_ELEMENTS // block.columns), block.columns
        for row in range(0, block.rows, rows):
            for column in range(0, block.columns, columns):
                yield slice(row, row + rows), slice(column, column + columns)

    def read(self, ref: TensorRef, block: Block) -> Tensor:
        """Return a block of a tensor, shape (rows, columns), in its own dtype."""
        size = ref.nbytes // ref.num_elements
        start = (block.row * self.width + block.column) * size
        if block.columns == self.width or block.rows == 1:
            data = read_bytes(ref, start, start + block.rows * block.columns * size)
        else:
            data = torch.empty(block.rows, block.columns * size, dtype=torch.uint8)
            for i, row in enumerate(data):
                ref.read_into(as_bytes(row), start + i * self.width * size)
        return data.view(-1).view(TORCH_DTYPES[ref.dtype]).view(block.rows, block.columns)

    def memory(self, jobs: int) -> int:
        """Return the bytes that comparing them takes at most, with ``jobs`` threads."""
        block = next(self.blocks())
        read = block.rows * block.columns * sum(t.nbytes // t.num_elements for t in (self.a, self.b))
        by_rows = self.whole and not self.few
        tile = min(block.rows * block.columns, max(_TILE_ELEMENTS, _TILE_ROWS * block.columns * by_rows))
        # Those of each block that is worked at or waits.
        sums = 2 * 8 * SKETCH_ROWS * self.width * by_rows
        return jobs * (read + tile * 8 * _TILES_ALIVE) + (2 * jobs + 2) * sums + 5 * 8 * self.rows
