"""What a run of a tensor's elements becomes in one output, and whether the compiled kernel can make it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from boft_export import native
from boft_export.adapters import View
from boft_export.checkpoint import FLOAT_DTYPES
from boft_export.linalg.path import InterpolationPath
from boft_export.planning import Segment, Step, TensorPlan


@dataclass(frozen=True)
class Recipe:
    """How elements of a tensor are made.

    Attributes:
        mixture: The origins whose values are added up, by number, and the weight of each.
        steps: What is then done to them, and how far each step goes.
        dtypes: Of the first origin, and of the output.
        untouched: They stay the base's own.
    """

    mixture: Mapping[int, float]
    steps: Sequence[tuple[Step, float]]
    dtypes: tuple[str, str]
    untouched: bool

    @property
    def stays(self) -> bool:
        """Whether the bytes of the first origin are taken over."""
        return self.untouched or self.dtypes[0] not in FLOAT_DTYPES

    def suits_kernel(self, path: InterpolationPath) -> bool:
        """Tell whether the compiled kernel, where there is one, can do it."""
        # What isn't rounded shows in which order it was summed, and undoing is torch's.
        if len(self.mixture) > 1 or not native.DTYPES.issuperset(self.dtypes) or self.dtypes[1] == "F64":
            return False
        if len(self.steps) == 1:
            return True
        rotated = path is not InterpolationPath.LINEAR or all(alpha == 1 for _, alpha in self.steps)
        return rotated and all(step.view is View.INPUT for step, _ in self.steps)


def recipe(tensor: TensorPlan, segment: Segment, alphas: Sequence[float]) -> Recipe:
    """Return how a segment of a tensor is made where the adapters go as far as ``alphas``."""
    mixture = tensor.mixture(segment, alphas)
    steps = [(s, alphas[s.adapter]) for s in segment.steps if alphas[s.adapter]]
    ref = tensor.origins[next(iter(mixture))].ref
    untouched = not steps and len(mixture) == 1 and ref is tensor.base and ref.dtype == tensor.dtype
    return Recipe(mixture, steps, (ref.dtype, tensor.dtype), untouched)
