"""What a rotation can't change, looked at without the adapter: the angles between a layer's neurons."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.linalg.energy import hyperspherical_energy
from boft_export.linalg.gram import ExactGram, Rounding
from boft_export.linalg.path import InterpolationPath
from boft_export.planning import FoldPlan
from boft_export.planning.strength import Course
from boft_export.validation.model import Check, Number, Outcome
from boft_export.validation.replay import Comparison
from boft_export.validation.suspects import SAMPLE, Run, Suspect


def check_invariant(plan: FoldPlan, course: Course, comparison: Comparison, factor: float) -> Check | None:
    """Check W' W'^T = diag(s) W W^T diag(s) on a sample of a rotated tensor's rows, with s from their lengths.

    It shares no code with the rotation, so that it holds the replay itself to account.

    Args:
        plan: What was replayed.
        course: How far it went.
        comparison: A tensor that is as it must be.
        factor: How many times what rounding explains the Gram matrix may be off by.

    Returns:
        The check; None where R is none, by design, or there is only one row.

    Raises:
        AccessError: If a file can't be read.
    """
    steps = comparison.plan.steps
    by_design = all(s.layer.is_orthogonal for s in steps) and course.path is not InterpolationPath.LINEAR
    if not by_design or (steps[0].view is not View.INPUT and comparison.stored.num_elements > SAMPLE):
        return None
    suspect = Suspect(plan, course, comparison)
    parts: dict[int, list[Run]] = defaultdict(list)
    for run in suspect.sample():
        parts[run.segment.start].append(run)
    worst: tuple[float, float, float, float | None] | None = None
    for runs in parts.values():
        old = _neurons(runs, [suspect.before(r) for r in runs])
        new = _neurons(runs, [suspect.stored(r).double() for r in runs])
        if not (math.isfinite(float(old.square().sum())) and math.isfinite(float(new.square().sum()))):
            # Infinities, as in a mask, and squares that overflow have no angles.
            continue
        gram = ExactGram(len(old), old.shape[1], Rounding.of(suspect.dtype))
        gram.add(old, new)
        found = gram.result()
        if not found.conditions:
            continue
        energies = hyperspherical_energy(old), hyperspherical_energy(new)
        ratio = energies[1] / energies[0] if energies[0] and energies[1] else None
        # What was computed in a narrower arithmetic is off by its errors in R, too.
        limit = factor * found.limit * (suspect.amplification(runs[0].segment) if comparison.wrong else 1.0)
        if worst is None or found.residual / limit > worst[0]:
            worst = found.residual / limit, found.residual, limit, ratio
    if worst is None:
        return None
    exceeded, residual, limit, ratio = worst
    measured: dict[str, Number] = {"residual": residual, "energy_ratio": ratio}
    bound: dict[str, Number] = {"residual": limit}
    message = f"the angles between its rows are the base's: their Gram matrix is off by {residual:.1e}"
    if not exceeded <= 1:
        message = f"the angles between its rows are not the base's: their Gram matrix is off by {residual:.1e}"
        return Check(
            "invariant", comparison.plan.name, Outcome.FAIL, message, finding="angles-changed", measured=measured,
            limits=bound,
        )  # fmt: skip
    return Check("invariant", comparison.plan.name, Outcome.PASS, message, measured=measured, limits=bound)


def _neurons(runs: Sequence[Run], values: Sequence[Tensor]) -> Tensor:
    """Return the neurons that runs hold, one in each row."""
    step = runs[0].segment.steps[0]
    if step.view is View.INPUT:
        return torch.cat([v.view(-1, step.layer.num_features) for v in values])
    # Seen as (n, out), neurons are columns, and each run has some of their elements.
    return torch.cat([v.view(-1, step.layer.num_outputs or 1) for v in values]).T.contiguous()
