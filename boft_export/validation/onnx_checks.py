"""Judging ONNX graphs: the files that the manifest names, and their outputs beside those of base and adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from boft_export.checkpoint.folder import parse_json_object, read_text
from boft_export.checkpoint.places import local_path
from boft_export.errors import CheckFailedError, InputError, UsageError
from boft_export.models.loading import quiet_transformers
from boft_export.onnx.limits import LIMITS, Limits
from boft_export.onnx.session import check_installed
from boft_export.onnx.tasks import Task, find_task
from boft_export.onnx.verify import Agreement, compare
from boft_export.pipeline.engine import Engine
from boft_export.pipeline.hashing import InputHashes, file_digest
from boft_export.pipeline.recorded import Recorded
from boft_export.planning import FoldPlan
from boft_export.planning.config_edits import apply_edits
from boft_export.planning.strength import Course
from boft_export.validation.folder_checks import check_manifest
from boft_export.validation.model import Check, Outcome
from boft_export.validation.policy import Thresholds

_CHECK = "onnx"


def check_graphs(
    plan: FoldPlan,
    folder: Path,
    recorded: Recorded | None,
    course: Course,
    engine: Engine,
    thresholds: Thresholds,
    device: str,
) -> list[Check]:
    """Judge a folder's graphs.

    Args:
        plan: What was exported, in the graph's dtype.
        folder: Where the graphs are.
        recorded: What the manifest says; None where there is none.
        course: How far the adapters go.
        engine: How weights are folded where only that tells what they must be.
        thresholds: Limits that were asked for.
        device: Where the graphs run.

    Raises:
        UsageError: If ONNX Runtime or transformers is not installed.
    """
    check_installed()
    graphs = _graphs(folder)
    if not graphs:
        message = "there is no ONNX graph in it"
        return [Check("files", folder.name, Outcome.FAIL, message, finding="no-graph", hint="Give what onnx wrote.")]
    checks = _check_files(plan, folder, recorded, graphs) if recorded is not None else []
    if any(c.finding == "missing-file" for c in checks):
        return checks
    try:
        task = _task(plan, folder, recorded)
        # What is not float32 in the base is on disk meanwhile.
        with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
            limits = {kind: _asked(held, thresholds) for kind, held in LIMITS.items()}
            found = compare(
                plan, task, graphs[0].parent, course, engine, scratch=Path(scratch), device=device, limits=limits
            )
    except CheckFailedError as error:
        return [*checks, Check(_CHECK, "", Outcome.FAIL, error.message, finding="onnx-broken", hint=error.hint)]
    except (InputError, UsageError) as error:
        return [*checks, Check(_CHECK, "", Outcome.INCONCLUSIVE, error.message, hint=error.hint)]
    checks += [_judge(a, found.limits) for a in found.agreements]
    checks += [Check(_CHECK, "", Outcome.INCONCLUSIVE, n.message, hint=n.hint) for n in found.notices]
    return checks


def _graphs(folder: Path) -> list[Path]:
    """Return the graphs, which optimum and others keep in a folder of their own."""
    return sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx")) or sorted(folder.glob("*/*.onnx"))


def _check_files(plan: FoldPlan, folder: Path, recorded: Recorded, graphs: Sequence[Path]) -> list[Check]:
    """Compare files and inputs with those that the manifest names."""
    there = {str(p.relative_to(folder)): p for g in graphs[:1] for p in g.parent.glob("*.onnx*")}
    there |= {name: folder / name for name in recorded.files if (folder / name).is_file()}
    files = {name: file_digest(path) for name, path in there.items()}
    return check_manifest(recorded, plan, InputHashes(plan.input_files()).digests(), files)


def _task(plan: FoldPlan, folder: Path, recorded: Recorded | None) -> Task:
    """Return what the graphs are for: by the manifest, the config beside them, or the base's.

    Raises:
        InputError: If none of them tells.
        UsageError: If there is no such task.
    """
    beside = folder / "config.json"
    config: Mapping[str, Any]
    if beside.is_file():
        config = parse_json_object(read_text(beside), beside)
    else:
        text = apply_edits(plan.base.config, plan.edits) if plan.edits else plan.base.config_text
        config = parse_json_object(text or "{}", beside)
    return find_task(config, recorded.task if recorded is not None else None, local_path(plan.base.root, "ONNX export"))


def _asked(held: Limits, thresholds: Thresholds) -> Limits:
    """Return limits with those in their place that were asked for."""
    wanted = {
        "largest": thresholds.max_difference,
        "cosine": thresholds.min_cosine,
        "top1": thresholds.min_top1,
    }
    asked = {name: value for name, value in wanted.items() if value is not None}
    return replace(held, **asked, roundings=0.0 if "largest" in asked else held.roundings)


def _judge(found: Agreement, held: Limits) -> Check:
    """Return an output's check."""
    measured = {
        "relative_difference": found.relative_difference,
        "mean_difference": found.mean_difference,
        "smallest_cosine": found.smallest_cosine,
        "mean_cosine": found.mean_cosine,
        "top1_agreement": found.top1_agreement,
    }
    free = Limits()
    bounds = {
        name: limit
        for name, limit, none in (
            ("relative_difference", found.allowed(held), free.largest),
            ("smallest_cosine", held.cosine, free.cosine),
            ("mean_cosine", held.mean_cosine, free.mean_cosine),
            ("top1_agreement", held.top1, free.top1),
        )
        if limit != none
    }
    if (told := found.beyond(held)) is not None:
        hint = "The graph is not base and adapter. Export again."
        return Check(_CHECK, found.output, Outcome.FAIL, f"it {told}", finding="onnx-differs", hint=hint,
                     measured=measured, limits=bounds)  # fmt: skip
    applied = "the base" if found.reference == "base" else f"base and adapter ({found.reference})"
    ran = ", ".join(found.providers)
    message = f"{found.kind} on {ran} is {applied}, to {found.relative_difference:.1e} of the largest"
    return Check(_CHECK, found.output, Outcome.PASS, message, measured=measured, limits=bounds)
