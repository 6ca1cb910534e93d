"""Patched graphs compared with the model: those that other programs made need not run as ours do."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import CheckFailedError, Level, Notice, UsageError
from boft_export.models.loading import CannotTellError
from boft_export.onnx.limits import LIMITS, graph_kind
from boft_export.onnx.patch import BaseGraphs
from boft_export.onnx.session import check_runs
from boft_export.onnx.skeleton import build_skeleton
from boft_export.onnx.tasks import Task
from boft_export.onnx.verify import Verification, verify
from boft_export.pipeline.engine import Engine
from boft_export.planning import FoldPlan, make_plan
from boft_export.planning.strength import Course, Interpolation


def verify_patched(
    base: BaseGraphs,
    plan: FoldPlan,
    task: Task,
    folder: Path,
    course: Course,
    engine: Engine,
    *,
    scratch: Path,
    device: str = "cpu",
) -> Verification:
    """Compare patched graphs with the model; arguments as of ``verify``.

    What can't be compared is said: what has other inputs or outputs, or takes fewer shapes, as the base's graph did.

    Raises:
        CheckFailedError: If they differ by more than rounding.
    """
    try:
        for name in base.files:
            check_runs(graph_kind(folder / name))
        reason = _unlike(base, plan, task) if not base.are_ours else None
        if reason is None:
            return verify(plan, task, folder, course, engine, scratch=scratch, device=device)
    except UsageError as error:
        reason = error.message
    except CheckFailedError as error:
        if base.are_ours or not _fails_as_well(base, plan, task, engine, scratch, device):
            raise
        if error.__cause__ is None:
            raise CheckFailedError(
                f"{error.message} The base's graph differs from the base as well.",
                hint="Export the base anew: inputs that it is traced with should be of several lengths, and padded.",
            ) from error
        # It ran into something that it has no way to compute.
        reason = error.message
    except CannotTellError as error:
        if base.are_ours:
            raise
        reason = error.message
    return _not_verified(f"the graph was not compared with the model: for {task.name}, {reason}")


def _not_verified(message: str) -> Verification:
    hint = "Try it on inputs of your own, or name another task with --task."
    return Verification((), LIMITS["float32"], (Notice(Level.WARNING, "not-verified", "", message, hint),))


def _unlike(base: BaseGraphs, plan: FoldPlan, task: Task) -> str | None:
    """Return how graphs differ from the task's in what goes in and comes out; None if they can be run as those are."""
    for graph in task.graphs(build_skeleton(plan, task, torch.float32).model):
        found = base.files.get(f"{graph.name}.onnx")
        if found is None:
            return f"there is no {graph.name}.onnx"
        if further := [n for n in found.inputs if n not in graph.sample]:
            return f"{graph.name}.onnx wants {', '.join(further[:3])}"
        if lacking := [n for n in graph.outputs if n not in found.outputs]:
            return f"{graph.name}.onnx does not give {', '.join(lacking[:3])}"
    return None


def _fails_as_well(base: BaseGraphs, plan: FoldPlan, task: Task, engine: Engine, scratch: Path, device: str) -> bool:
    """Tell whether the base's graphs are no more like the base's model."""
    alone = make_plan(plan.base, (), dtype=base.dtype)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for path, name in base.outputs.items():
            place = Path(folder) / name
            with file_system_errors(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(path.resolve(), place)
                except OSError:
                    shutil.copy(path, place)
        try:
            verify(alone, task, Path(folder), Interpolation().course(alone), engine, scratch=scratch, device=device)
        except CheckFailedError:
            return True
    return False
