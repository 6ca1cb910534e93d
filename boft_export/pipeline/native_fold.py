"""Folding by the compiled kernel, and the programs it folds by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from boft_export import native
from boft_export.adapters import View
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.kept import Kept
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.measure import Measure
from boft_export.planning import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Each step of a segment, and how far it goes.
Steps = Sequence[tuple[Step, float]]
# Elements in a row of what is only converted: few enough for the kernel's lanes to be filled with rows.
_ROW = 1024


@dataclass(frozen=True)
class _Prepared:
    """Steps of one view, as one program.

    Attributes:
        program: All their rotations.
        scales: Each step's own; None for none.
    """

    program: native.Program
    scales: Sequence[NDArray[np.float64] | None]


class NativeFold:
    """Folds by the compiled kernel, with programs prepared once each, the last few kept.

    Args:
        layers: Gives the operators.
        path: On which they are.
        kept: How many programs to keep.
    """

    def __init__(self, layers: LayerCache, path: InterpolationPath, kept: int) -> None:
        self._layers = layers
        self._path = path
        self._prepared: Kept[Any, _Prepared] = Kept(kept)
        self._rows = native.Program((), _ROW)

    def fold(
        self,
        source: NDArray[np.uint8],
        dtypes: tuple[str, str],
        steps: Steps,
        start: int,
        tile: int,
        out: NDArray[np.uint8],
    ) -> list[Measure]:
        """Fold a run of a tensor's elements into ``out`` and return what was done to each tile.

        Args:
            source: The elements' bytes.
            dtypes: Their dtype and that of the output.
            steps: What to do; may be nothing but converting.
            start: The element of the tensor at which they begin; a whole number of tiles into its segment.
            tile: Elements in a tile.
            out: Where the result's bytes go.
        """
        if not steps:
            return self._convert(source, dtypes, tile, out)
        step, alpha = steps[0]
        prepared = self._prepare(steps)
        weight = alpha if self._path is InterpolationPath.LINEAR else 1.0
        if step.view is View.INPUT:
            columns = step.layer.num_features
            rows = len(source) // (columns * _width(dtypes[0]))
            sums = native.fold_rows(
                prepared.program, source, dtypes[0], out, dtypes[1], scale=_scale(steps, prepared.scales, start, rows),
                weight=weight, tile_rows=tile // columns,
            )  # fmt: skip
        else:
            columns = step.layer.num_outputs or 1
            sums = native.fold_columns(
                prepared.program, source, dtypes[0], out, dtypes[1], columns=columns,
                first=(start - step.start) // columns, scale=prepared.scales[0], weight=weight,
                tile_rows=tile // columns,
            )  # fmt: skip
        return _measures(sums)

    def _convert(
        self, source: NDArray[np.uint8], dtypes: tuple[str, str], tile: int, out: NDArray[np.uint8]
    ) -> list[Measure]:
        """Convert a row at a time, and what is left at the end of a tensor as a shorter one."""
        count = len(source) // _width(dtypes[0])
        columns = math.gcd(tile, _ROW)
        whole = count // columns * columns
        measures: list[Measure] = []
        for first, last in ((0, whole), (whole, count)):
            if first == last:
                continue
            here, there = (
                buffer[first * width : last * width]
                for buffer, width in zip((source, out), map(_width, dtypes), strict=True)
            )
            row = min(columns, last - first)
            program = self._rows if row == _ROW else native.Program((), row)
            found = _measures(native.fold_rows(program, here, dtypes[0], there, dtypes[1], tile_rows=tile // columns))
            if first % tile:
                # The last tile's first rows are whole ones.
                measures[-1] += found.pop(0)
            measures += found
        return measures

    def _prepare(self, steps: Steps) -> _Prepared:
        # On the straight way from base to tuned, the rotation is the tuned one's.
        linear = self._path is InterpolationPath.LINEAR
        key = tuple((s.adapter, s.layer.module, 1.0 if linear else alpha) for s, alpha in steps)
        return self._prepared.get(key, 1, lambda: self._build(steps))

    def _build(self, steps: Steps) -> _Prepared:
        operators = [self._layers.get(step, alpha, None) for step, alpha in steps]
        stages = [native.Stage(f.blocks, f.index) for o in operators for f in o.rotation.factors]
        program = native.Program(stages, steps[0][0].layer.num_features)
        return _Prepared(program, [o.scale for o in operators])


def _scale(
    steps: Steps, scales: Sequence[NDArray[np.float64] | None], start: int, rows: int
) -> NDArray[np.float64] | None:
    """Return the scales of ``rows`` rows from element ``start`` on, of all steps; None for none."""
    found = None
    for (step, _), scale in zip(steps, scales, strict=True):
        if scale is not None:
            # A layer may be but a part of the tensor, and each step's another.
            first = (start - step.start) // step.layer.num_features
            part = scale[first : first + rows]
            found = part if found is None else found * part
    return found


def _measures(sums: NDArray[np.float64]) -> list[Measure]:
    return [Measure.of_sums(s) for s in sums.tolist()]


def _width(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8
