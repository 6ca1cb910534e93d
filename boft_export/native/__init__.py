"""Folding rotations into weights in one pass in cache, by a compiled kernel where there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from boft_export.errors import UsageError

try:
    from boft_export.native import _fold
except ImportError:  # built without a compiler: torch serves
    _fold = None  # type: ignore[assignment]

Buffer = memoryview | bytes | bytearray | NDArray[np.generic]

_VARIABLE = "BOFT_EXPORT_KERNEL"
_TORCH, _PLAIN = "torch", "plain"
# The kernel's number of each dtype, and bytes of an element.
_DTYPES = {"BF16": (0, 2), "F16": (1, 2), "F32": (2, 4), "F64": (3, 8)}
# How many outputs of a block lie side by side in a prepared matrix.
_CHUNK = 8

DTYPES = frozenset(_DTYPES)
_KERNELS: list[str] = [] if _fold is None else _fold.kernels()


def instruction_set() -> str | None:
    """Return the kernel in use: ``avx512``, ``avx2``, ``neon`` or ``plain``; None where torch is to be used.

    That is the best one that the processor runs, or the one that the environment variable BOFT_EXPORT_KERNEL names.

    Raises:
        UsageError: If the variable names a kernel that does not run here.
    """
    name = os.environ.get(_VARIABLE) or (_KERNELS[0] if _KERNELS else _TORCH)
    if name == _TORCH:
        return None
    if name not in _KERNELS:
        raise UsageError(
            f"{_VARIABLE}: no kernel {name!r} runs here; expected one of {', '.join([*_KERNELS, _TORCH])}",
            hint=f"Unset {_VARIABLE} to use the best one.",
        )
    return name


def arithmetic() -> str:
    """Return what decides a sum's last bit: ``fma``, ``plain``, or ``torch``.

    Raises:
        UsageError: As ``instruction_set``.
    """
    name = instruction_set()
    return _TORCH if name is None else name if name == _PLAIN else "fma"


@dataclass(frozen=True)
class Stage:
    """An n-by-n matrix M that mixes features only within small blocks: M[index[d], index[d]] = blocks[d].

    Attributes:
        blocks: Dense blocks, shape (B, k, k), float64.
        index: The features of each block, shape (B, k), int64; a partition of range(n), so n = B k.
    """

    blocks: NDArray[np.float64]
    index: NDArray[np.int64]


class Program:
    """A product R of stages, prepared for the kernel once; several threads may use it at once.

    Args:
        stages: The stages, the one that is applied first first. None of them: elements are converted and scaled alone.
        num_features: The size n of R.

    Attributes:
        num_features: The size n of R.
        nbytes: Bytes of memory that it takes.

    Raises:
        ValueError: If a stage's index is not a partition of the features, or its blocks don't fit it.
    """

    def __init__(self, stages: Sequence[Stage], num_features: int) -> None:
        n = self.num_features = num_features
        for stage in stages:
            _check(stage, n)
        # No block reaches over a border between two groups.
        reached = np.zeros(n + 1, np.int64)
        for stage in stages:
            np.add.at(reached, stage.index.min(1) + 1, 1)
            np.add.at(reached, stage.index.max(1) + 1, -1)
        # numpy's own indices are narrower on some processors than what the kernel reads.
        self._borders = np.flatnonzero(np.cumsum(reached) == 0).astype(np.int64)
        firsts, index, matrices = [], [], []
        for stage in stages:
            lowest = stage.index.min(1)
            order = np.argsort(lowest)
            firsts.append(np.searchsorted(lowest[order], self._borders).astype(np.int64))
            index.append(stage.index[order].astype(np.int32).ravel())
            matrices.append(_packed(np.asarray(stage.blocks, np.float64)[order]))
        self._sizes = np.array([stage.index.shape[1] for stage in stages], np.int64)
        self._firsts = np.concatenate([*firsts, np.zeros(0, np.int64)])
        self._index = np.concatenate([*index, np.zeros(0, np.int32)])
        self._matrices = np.concatenate([*matrices, np.zeros(0)])

    @property
    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return self._borders, self._firsts, self._sizes, self._index, self._matrices

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the program takes."""
        return sum(a.nbytes for a in self._arrays)


def _check(stage: Stage, n: int) -> None:
    count, k = stage.index.shape
    if stage.blocks.shape != (count, k, k):
        raise ValueError(f"a stage's index is {count} x {k}, its blocks are {stage.blocks.shape}")
    if count * k != n or not np.array_equal(np.sort(stage.index, axis=None), np.arange(n)):
        raise ValueError(f"a stage's index is not a partition of {n} features")


def _packed(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return blocks as the kernel reads them: for each few outputs, all inputs, and for each of those the outputs."""
    chunks = [blocks[:, i : i + _CHUNK].transpose(0, 2, 1) for i in range(0, blocks.shape[1], _CHUNK)]
    return np.concatenate([c.reshape(len(blocks), -1) for c in chunks], axis=1).ravel()


def fold_rows(
    program: Program,
    source: Buffer,
    source_dtype: str,
    out: Buffer,
    out_dtype: str,
    *,
    scale: NDArray[np.float64] | None = None,
    weight: float = 1.0,
    tile_rows: int,
) -> NDArray[np.float64]:
    """Rotate rows x of n features: each becomes y = s R x, or (1 - weight) x + weight y, rounded once to ``out_dtype``.

    Sums are taken in float64 in the order of the inputs, with FMA where the processor has it.

    Args:
        program: R.
        source: The rows' bytes.
        source_dtype: Their dtype, as safetensors names it; one of DTYPES.
        out: Where results are written, as many elements. It may be ``source`` itself where elements have the same size.
        out_dtype: Their dtype.
        scale: s of each row, shape (r,); None for 1.
        weight: How far to go.
        tile_rows: Rows of a tile; the last one may have fewer.

    Returns:
        For each tile, shape (tiles, 7): elements; how many differ from the source's; the sums of squares of the source,
        of exact result minus source, and of rounded minus exact result; how many are not finite though the source's
        are; how many of the source's are not finite, which are left out of all that. They don't depend on how a tensor
        is cut between tiles.

    Raises:
        ValueError: If a buffer's size does not fit, or a dtype is none of DTYPES.
    """
    n = program.num_features
    return _run(program, source, source_dtype, out, out_dtype, scale, weight, tile_rows, by_columns=False, columns=n)


def fold_columns(
    program: Program,
    source: Buffer,
    source_dtype: str,
    out: Buffer,
    out_dtype: str,
    *,
    columns: int,
    first: int,
    scale: NDArray[np.float64] | None = None,
    weight: float = 1.0,
    tile_rows: int,
) -> NDArray[np.float64]:
    """Rotate the columns of a part of a matrix X with n rows: it becomes R X, column c times s[c].

    As ``fold_rows``, but for these arguments:

    Args:
        program: R.
        source: Bytes of the rows from ``first`` on.
        source_dtype: As for ``fold_rows``.
        out: As for ``fold_rows``.
        out_dtype: As for ``fold_rows``.
        columns: How many elements a row has.
        first: The first row that is in ``source``. The rows must be whole groups of features that R couples.
        scale: s of each column, shape (columns,); None for 1.
        weight: As for ``fold_rows``.
        tile_rows: Rows of a tile, counted from ``first``.

    Returns:
        As ``fold_rows``.

    Raises:
        ValueError: As ``fold_rows``, and if a group is only partly in the buffer.
    """
    return _run(
        program, source, source_dtype, out, out_dtype, scale, weight, tile_rows,
        by_columns=True, columns=columns, first=first,
    )  # fmt: skip


def _nbytes(buffer: Buffer) -> int:
    return memoryview(buffer).nbytes  # type: ignore[arg-type]  # arrays are buffers, which Python 3.11 can't say


def _run(
    program: Program,
    source: Buffer,
    source_dtype: str,
    out: Buffer,
    out_dtype: str,
    scale: NDArray[np.float64] | None,
    weight: float,
    tile_rows: int,
    *,
    by_columns: bool,
    columns: int,
    first: int = 0,
) -> NDArray[np.float64]:
    kernel = instruction_set()
    if kernel is None:
        raise ValueError("the fold kernel is not there, or BOFT_EXPORT_KERNEL=torch turned it off")
    for dtype in (source_dtype, out_dtype):
        if dtype not in DTYPES:
            raise ValueError(f"the fold kernel knows no dtype {dtype!r}; expected one of {', '.join(sorted(DTYPES))}")
    (read, size), (written, out_size) = _DTYPES[source_dtype], _DTYPES[out_dtype]
    count, rest = divmod(_nbytes(source), size)
    if columns < 1 or tile_rows < 1 or rest or count % columns:
        raise ValueError(
            f"{_nbytes(source)} bytes of {source_dtype} are not whole rows of {columns}, or tiles not whole"
        )
    if _nbytes(out) != count * out_size:
        raise ValueError(f"the output has {_nbytes(out)} bytes, expected {count * out_size}")
    rows = count // columns
    if by_columns:
        borders = program._borders  # noqa: SLF001  # of this module
        if not np.isin([first, first + rows], borders).all():
            raise ValueError(f"features {first} to {first + rows} cut a group of coupled features in two")
    if scale is not None:
        scale = np.ascontiguousarray(scale, np.float64)
        if scale.shape != ((columns if by_columns else rows),):
            raise ValueError(f"the scale's shape is {scale.shape}, expected ({columns if by_columns else rows},)")
    tiles = np.zeros((-(-rows // tile_rows), 7))
    _fold.fold(
        _KERNELS.index(kernel), by_columns, *program._arrays, source, read, out, written, scale, tiles,  # noqa: SLF001  # of this module
        weight, columns, first, tile_rows,
    )  # fmt: skip
    return tiles
