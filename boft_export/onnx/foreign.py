"""Patched graphs compared with the model: those that other programs made need not run as ours do."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from boft_export.checkpoint.staging import file_system_errors
from boft_export.errors import CheckFailedError, Level, Notice
from boft_export.models.loading import CannotTellError
from boft_export.onnx.limits import LIMITS
from boft_export.onnx.patch import BaseGraphs
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

    What can't be compared is said, and so is where the base's own graph is as far from the base's model: then it is the
    graph that computes otherwise, as before.

    Raises:
        CheckFailedError: If they differ by more than rounding, and the base's graphs don't.
    """
    if base.are_ours:
        return verify(plan, task, folder, course, engine, scratch=scratch, device=device)
    try:
        reason = _unlike(base, plan, task)
        if reason is None:
            return verify(plan, task, folder, course, engine, scratch=scratch, device=device)
    except CheckFailedError as error:
        if not _fails_as_well(base, plan, task, engine, scratch, device):
            raise
        reason = f"with the base's graph, too, {error.message}"
    except CannotTellError as error:
        reason = error.message
    message = f"the graph was not compared with the model: for {task.name}, {reason}"
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
