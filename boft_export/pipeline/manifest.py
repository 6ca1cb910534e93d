"""``boft_export.json``: what went into a merged checkpoint, what was done, and what was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from boft_export.pipeline.engine import OutputResult, TensorResult
from boft_export.pipeline.recorded import SCHEMA_VERSION, RecordedFile
from boft_export.planning import Action, FoldPlan, Step
from boft_export.planning.output import UNDO_FOLDER
from boft_export.planning.strength import Strength
from boft_export.version import __version__


def manifest(
    command: str,
    plan: FoldPlan,
    inputs: Mapping[str, str],
    output: OutputResult,
    files: Mapping[str, RecordedFile],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return an output's manifest: the same for every run over the same inputs and settings, with no paths or times.

    Args:
        command: The verb.
        plan: What was planned, with all notices.
        inputs: SHA-256 of each input file.
        output: What was done.
        files: The files of weights that were written.
        settings: What was asked for.
    """

    def hashes(prefix: str) -> dict[str, str]:
        return {n.removeprefix(prefix): h for n, h in inputs.items() if n.startswith(prefix)}

    base = {"name": plan.base.name, "revision": plan.base.revision, "sha256": hashes("base/")}
    adapters = [
        {
            "name": a.name,
            "revision": a.revision,
            "format": a.adapter.format,
            "base_model": a.adapter.base_name,
            "sha256": hashes(f"adapter-{i}/"),
            "renames": list(plan.renames[i]),
            "dropped": dict(a.adapter.dropped),
        }
        for i, a in enumerate(plan.adapters)
    ]
    undo = dict(output.undo)
    for side in plan.side_files:
        if side.name.parts[0] == UNDO_FOLDER and side.text is not None:
            data = side.text.encode()
            undo[str(side.name)] = RecordedFile(len(data), hashlib.sha256(data).hexdigest())
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "boft-export", "version": __version__},
        "command": command,
        "base": base,
        "adapters": adapters,
        "settings": dict(settings),
        "config_edits": [{"path": list(e.path), "value": e.value, "reason": e.reason} for e in plan.edits],
        "files": _file_records(files),
        **({"undo": _file_records(undo)} if undo else {}),
        "tensors": {r.plan.name: tensor_record(r, output.variant.strength) for r in output.tensors},
        "notices": [
            {"level": n.level.value, "code": n.code, "subject": n.subject, "message": n.message} for n in plan.notices
        ],
    }


def _file_records(files: Mapping[str, RecordedFile]) -> dict[str, Any]:
    return {name: {"bytes": f.nbytes, "sha256": f.sha256} for name, f in files.items()}


def tensor_record(result: TensorResult, strength: Strength) -> dict[str, Any]:
    """Return what the manifest says of one tensor."""
    plan = result.plan
    alphas = strength.of(plan.name)
    record: dict[str, Any] = {"action": plan.action.value, "dtype": plan.dtype, "shape": list(plan.shape)}
    if plan.source.name != plan.name or plan.source is not plan.base:
        record["source"] = plan.source.name
    # What an adapter replaces or adds was measured against its own values, which says nothing of the base's.
    if result.measure is not None and plan.action in (Action.FOLD, Action.CONVERT):
        record["changed_elements"] = result.measure.changed
        record["relative_change"] = result.measure.relative_change
        record["rounding_loss"] = result.measure.rounding_loss
        if result.measure.returned is not None:
            record["returned"] = result.measure.returned / result.measure.elements
        if result.measure.tried:
            record["expected"] = result.measure.kept / result.measure.tried
    if plan.steps:
        record["orthogonality_residual"] = result.residual
        record["steps"] = [_step(s, alphas[s.adapter]) for s in plan.steps]
    return record


def _step(step: Step, alpha: float) -> dict[str, Any]:
    layer = step.layer
    return {
        "adapter": step.adapter,
        "alpha": alpha,
        "module": layer.module,
        "num_factors": layer.num_factors,
        "num_blocks": layer.num_blocks,
        "block_size": layer.block_size,
        "parametrization": layer.parametrization.value,
        "view": step.view.value,
    }


def dump(value: Mapping[str, Any]) -> str:
    """Return a manifest's text."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
