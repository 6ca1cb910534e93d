"""Folding by the compiled kernel: which folds it can do, and the programs it does them by."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from boft_export import native
from boft_export.adapters import View
from boft_export.checkpoint.dtypes import DTYPE_BITS
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.layers import LayerCache
from boft_export.pipeline.measure import Measure
from boft_export.planning import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Each step of a segment, and how far it goes.
Steps = Sequence[tuple[Step, float]]


@dataclass(frozen=True)
class _Prepared:
    """Steps of one view, as one program.

    Attributes:
        scale: One for each output; None for none.
        weight: How much of the result counts; the rest is the source.
    """

    program: native.Program
    scale: NDArray[np.float64] | None
    weight: float


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
        self._kept = kept
        self._prepared: OrderedDict[tuple[tuple[int, str, float], ...], _Prepared] = OrderedDict()
        self._lock = threading.Lock()

    def can(self, steps: Steps, dtypes: tuple[str, str]) -> bool:
        """Tell whether the kernel folds ``steps``, with values of ``dtypes`` in and out."""
        # What isn't rounded shows in which order it was summed, and undoing is torch's.
        if not native.DTYPES.issuperset(dtypes) or dtypes[1] == "F64":
            return False
        if len(steps) == 1:
            return True
        rotated = self._path is not InterpolationPath.LINEAR or all(alpha == 1 for _, alpha in steps)
        return rotated and all(step.view is View.INPUT for step, _ in steps)

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
        step = steps[0][0]
        prepared = self._prepare(steps)
        scale = prepared.scale
        if step.view is View.INPUT:
            columns = step.layer.num_features
            first = (start - step.start) // columns
            rows = len(source) // (columns * _width(dtypes[0]))
            sums = native.fold_rows(
                prepared.program, source, dtypes[0], out, dtypes[1],
                scale=None if scale is None else scale[first : first + rows],
                weight=prepared.weight, tile_rows=tile // columns,
            )  # fmt: skip
        else:
            columns = step.layer.num_outputs or 1
            sums = native.fold_columns(
                prepared.program, source, dtypes[0], out, dtypes[1], columns=columns,
                first=(start - step.start) // columns, scale=scale, weight=prepared.weight, tile_rows=tile // columns,
            )  # fmt: skip
        return [Measure.of_sums(s) for s in sums.tolist()]

    def _convert(
        self, source: NDArray[np.uint8], dtypes: tuple[str, str], tile: int, out: NDArray[np.uint8]
    ) -> list[Measure]:
        count = len(source) // _width(dtypes[0])
        measures = []
        for first in range(0, count, tile):
            last = min(first + tile, count)
            here, there = (
                buffer[first * width : last * width]
                for buffer, width in zip((source, out), map(_width, dtypes), strict=True)
            )
            sums = native.fold_rows(
                native.Program((), last - first), here, dtypes[0], there, dtypes[1], scale=None, tile_rows=1
            )
            measures += [Measure.of_sums(s) for s in sums.tolist()]
        return measures

    def _prepare(self, steps: Steps) -> _Prepared:
        key = tuple((s.adapter, s.layer.module, alpha) for s, alpha in steps)
        with self._lock:
            if (found := self._prepared.get(key)) is not None:
                return found
        operators = [self._layers.get(step, alpha, None) for step, alpha in steps]
        factors = [f for o in operators for f in o.rotation.factors]
        scales = [o.scale for o in operators if o.scale is not None]
        prepared = _Prepared(
            native.Program([native.Stage(f.blocks, f.index) for f in factors], steps[0][0].layer.num_features),
            np.prod(scales, axis=0) if scales else None,
            operators[0].weight,
        )
        with self._lock:
            self._prepared[key] = prepared
            while len(self._prepared) > self._kept:
                self._prepared.popitem(last=False)
        return prepared


def _width(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8
