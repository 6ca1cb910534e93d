"""Reading parts of a tensor that isn't what it must be: its values before the merge, after it, and as stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.checkpoint import TensorRef
from boft_export.linalg.planner import SMALLEST_STAGE
from boft_export.pipeline.fold import unrounded
from boft_export.pipeline.layers import LayerOperator, build_layer
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes
from boft_export.planning import FoldPlan, Segment, Step
from boft_export.planning.strength import Course
from boft_export.validation.replay import Comparison

# Elements that are looked at as a sample of a tensor, and to be computed at once.
SAMPLE = 1 << 18
_RUN = 1 << 19
# Units of a sample that are evenly spread, and as many again that hold wrong elements.
_SPREAD = 32
_CPU = torch.device("cpu")

Steps = Sequence[tuple[Step, LayerOperator]]


@dataclass(frozen=True)
class Run:
    """A run of a tensor's elements that can be merged on its own.

    Attributes:
        segment: The segment it lies in.
        start: Its first element in the tensor.
        stop: The element after its last.
    """

    segment: Segment
    start: int
    stop: int


def read_run(ref: TensorRef, start: int, stop: int) -> Tensor:
    """Return some of a tensor's elements, flat, in their own dtype."""
    width = ref.nbytes // ref.num_elements
    return read_bytes(ref, start * width, stop * width).view(TORCH_DTYPES[ref.dtype])


class Suspect:
    """A tensor that isn't what it must be.

    Args:
        plan: The merge that is replayed.
        course: How far it went.
        comparison: What was found of the tensor.
    """

    def __init__(self, plan: FoldPlan, course: Course, comparison: Comparison) -> None:
        self.plan = plan
        self.comparison = comparison
        self.tensor = comparison.plan
        self._path = course.path
        self.alphas = course.variants[0].strength.of(self.tensor.name)
        self._operators: dict[tuple[int, str], LayerOperator] = {}
        self._fused: dict[tuple[int, str], LayerOperator] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype it is stored in."""
        return TORCH_DTYPES[self.tensor.dtype]

    def operator(self, step: Step) -> LayerOperator:
        """Return what a step does, factor by factor."""
        key = step.adapter, step.layer.module
        if key not in self._operators:
            built = build_layer(self.plan.adapters[step.adapter], step.layer)
            self._operators[key] = built.at(self.alphas[step.adapter], self._path)
        return self._operators[key]

    def steps(self, segment: Segment) -> list[tuple[Step, LayerOperator]]:
        """Return the steps of a segment as they must be."""
        return [(s, self.operator(s)) for s in segment.steps if self.alphas[s.adapter]]

    def fused_steps(self, segment: Segment) -> list[tuple[Step, LayerOperator]]:
        """Return the steps of a segment in the dense stages that cost least to apply, for all of a tensor."""
        fused = []
        for step, operator in self.steps(segment):
            key = step.adapter, step.layer.module
            if key not in self._fused:
                smallest = SMALLEST_STAGE if step.view is View.INPUT else 1
                self._fused[key] = replace(operator, rotation=operator.rotation.fused(smallest))
            fused.append((step, self._fused[key]))
        return fused

    def amplification(self, segment: Segment) -> float:
        """Return how many unit roundoffs forming and applying a segment's rotations may add up to, at least 1.

        A Cayley transform of a block of size b is off by about sqrt(b) (1 + |S|) of them, and there are m in a row.
        """
        total = 0.0
        for _, operator in self.steps(segment):
            for factor in operator.rotation.factors:
                size = 0.0 if factor.generator is None else float(torch.linalg.matrix_norm(factor.generator, 2).max())
                total += math.sqrt(factor.block_size) * (1 + size)
        return max(1.0, total / 4)

    def release(self) -> None:
        """Forget the operators: each tensor has its own, and they may be large."""
        self._operators.clear()
        self._fused.clear()

    def before(self, run: Run, origin: int | None = None) -> Tensor:
        """Return a run's values before any rotation, float64, flat; of one origin alone where it is named."""
        weights = self.tensor.mixture(run.segment, self.alphas) if origin is None else {origin: 1.0}
        total = torch.zeros(run.stop - run.start, dtype=torch.float64)
        for number, weight in weights.items():
            total.add_(read_run(self.tensor.origins[number].ref, run.start, run.stop), alpha=weight)
        return total

    def after(self, run: Run, x: Tensor, steps: Steps) -> Tensor:
        """Return what ``steps`` make of a run's values ``x``, float64, flat, not rounded."""
        return unrounded([(x, 1.0)], steps, run.start, compute=torch.float64, device=_CPU)[1]

    def stored(self, run: Run) -> Tensor:
        """Return a run's values as they are stored, flat, in their own dtype."""
        return read_run(self.comparison.stored, run.start, run.stop)

    def length(self, run: Run, values: Tensor) -> Tensor:
        """Return for each element the length of the vector that it is computed from, and belongs to; flat."""
        step = run.segment.steps[0]
        across = step.view is View.INPUT
        matrix = values.view(-1, step.layer.num_features if across else step.layer.num_outputs or 1)
        lengths: Tensor = torch.linalg.vector_norm(matrix, dim=int(across), keepdim=True)
        return lengths.expand_as(matrix).reshape(-1)

    def runs_of_places(self, size: int = _RUN) -> list[Run]:
        """Return runs that together hold all wrong elements; the whole tensor where not all of them are known."""
        found: list[Run] = []
        places = self.comparison.places
        for segment in self.tensor.segments:
            if not segment.steps:
                continue
            unit = segment.tile(1)
            if self.comparison.all_places_known:
                inside = places[(places >= segment.start) & (places < segment.stop)]
                units = torch.unique((inside - segment.start) // unit).tolist()
            else:
                units = list(range(-(-(segment.stop - segment.start) // unit)))
            found += _merged(segment, unit, units, size)
        return found

    def sample(self) -> list[Run]:
        """Return runs evenly spread over what is rotated, and some that hold wrong elements."""
        found: list[Run] = []
        rotated = [s for s in self.tensor.segments if s.steps]
        for segment in rotated:
            unit = segment.tile(1)
            count = -(-(segment.stop - segment.start) // unit)
            most = max(1, min(_SPREAD, SAMPLE // (2 * unit * len(rotated))))
            inside = self.comparison.places
            inside = inside[(inside >= segment.start) & (inside < segment.stop)]
            wrong = torch.unique((inside - segment.start) // unit)
            chosen = {i * count // min(most, count) for i in range(min(most, count))}
            chosen |= {int(wrong[i * len(wrong) // min(most, len(wrong))]) for i in range(min(most, len(wrong)))}
            found += _merged(segment, unit, sorted(chosen), unit)
        return found


def _merged(segment: Segment, unit: int, units: Sequence[int], size: int) -> list[Run]:
    """Return runs of neighbouring units, each of ``size`` elements or one unit."""
    most = max(1, size // unit)
    runs: list[list[int]] = []
    for i in units:
        if runs and i == runs[-1][1] and i - runs[-1][0] < most:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return [Run(segment, segment.start + a * unit, min(segment.start + b * unit, segment.stop)) for a, b in runs]
