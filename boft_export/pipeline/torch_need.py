"""Whether a run loads torch: most of a small run's memory."""

from __future__ import annotations

import sys

from boft_export import native
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.recipe import recipe
from boft_export.planning import Action, FoldPlan
from boft_export.planning.strength import Course


def native_folds(device_type: str, compute: str) -> bool:
    """Tell whether folding on a kind of device, in a dtype, is for the compiled kernel where there is one."""
    return device_type == "cpu" and compute == "float64"


def needs_torch(plan: FoldPlan, course: Course, device_type: str, compute: str) -> bool:
    """Tell whether writing what a plan says loads torch, or it is there already.

    Args:
        plan: What will be done.
        course: How far each output goes.
        device_type: ``cpu`` or ``cuda``.
        compute: The dtype to fold in.

    Raises:
        UsageError: If the environment names a kernel that does not run here.
    """
    if "torch" in sys.modules or not native_folds(device_type, compute) or native.instruction_set() is None:
        return True
    bends = course.path is not InterpolationPath.LINEAR
    if bends and any(alpha != 1 for alphas in course.alphas_of_layers(plan).values() for alpha in alphas):
        return True
    recipes = (
        recipe(tensor, segment, variant.strength.of(tensor.name))
        for variant in course.variants
        for tensor in plan.tensors
        if tensor.action is not Action.COPY
        for segment in tensor.segments
    )
    return not all(made.stays or made.suits_kernel(course.path) for made in recipes)
