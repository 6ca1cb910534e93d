"""The model that a graph must equal, in PyTorch, with weights that stay on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from boft_export.models.loading import CannotTellError, load_plan, load_state
from boft_export.models.mapped import MappedWeights
from boft_export.models.reference import load_reference
from boft_export.onnx.weights import used_plan
from boft_export.pipeline.engine import Engine, replay_plan
from boft_export.pipeline.torch_io import TORCH_DTYPES
from boft_export.planning import Action, FoldPlan
from boft_export.planning.strength import Course

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Expected:
    """What a graph is compared with.

    Attributes:
        model: The model, in float32.
        kind: How the adapters were applied: ``peft``, ``hooks``, ``hooks and rotated kernels``, or ``folded weights``;
            ``base`` where there are none.
    """

    model: nn.Module
    kind: str


def load_expected(
    plan: FoldPlan, course: Course, engine: Engine, weights: MappedWeights, kind: type[PreTrainedModel] | None
) -> Expected:
    """Load the base with its adapters applied on the fly, which shares no code with the fold.

    What only a fold can make, such as a point between base and tuned, is folded once more, apart from what the graph
    has.

    Raises:
        CannotTellError: If transformers can't load it.
    """
    if not plan.adapters:
        return Expected(load_plan(plan, _CPU, tuned=False, read=weights.read, kind=kind).model, "base")
    if course.variants[0].strength.is_full:
        try:
            found = load_reference(plan, _CPU, read=weights.read, kind=kind)
        except CannotTellError:
            # The fold knows every format.
            pass
        else:
            return Expected(found.model, found.kind)
    state = _folded(plan, course, engine, weights)
    return Expected(load_state(plan, plan.edits, state, _CPU, kind).model, "folded weights")


def _folded(plan: FoldPlan, course: Course, engine: Engine, weights: MappedWeights) -> dict[str, Tensor]:
    """Return a plan's tensors folded, in scratch space."""
    changed = {t.name: t for t in plan.tensors if t.action not in (Action.COPY, Action.CONVERT)}
    state = {t.name: weights.read(t.source) for t in plan.tensors if t.name not in changed}
    done = dict.fromkeys(changed, 0)
    with replay_plan(used_plan(plan, changed), course, engine) as replay:
        for tensor, data, _ in replay.pieces:
            if tensor.name not in state:
                state[tensor.name] = weights.room(tensor.shape)
            run = torch.frombuffer(data, dtype=TORCH_DTYPES[tensor.dtype])
            start = done[tensor.name]
            state[tensor.name].view(-1)[start : start + len(run)] = run
            done[tensor.name] += len(run)
    return state
