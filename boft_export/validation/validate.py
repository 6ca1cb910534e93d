"""Validating: an adapter by itself, with its base, a merge of the two, and what the merged model computes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from boft_export.checkpoint import DTYPE_OF_NAME, Checkpoint
from boft_export.checkpoint.places import AnyPath, local_path
from boft_export.errors import (
    DamagedFileError,
    InputError,
    Level,
    Notice,
    UsageError,
)
from boft_export.models.inputs import FunctionalInputs
from boft_export.pipeline.devices import Device, resolve_devices
from boft_export.pipeline.engine import COMPUTE_DTYPES, Engine
from boft_export.pipeline.hashing import InputHashes
from boft_export.pipeline.layers import inspect_values
from boft_export.pipeline.options import Progress, RunOptions
from boft_export.pipeline.prepare import fit_memory
from boft_export.pipeline.recorded import MANIFEST_NAME, Recorded, read_manifest
from boft_export.planning import FoldPlan, SourcedAdapter, make_plan
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.names import matched_names
from boft_export.planning.strength import Course, Interpolation
from boft_export.validation.folder_checks import check_config, check_manifest, check_names, check_side_files
from boft_export.validation.functional import FunctionalLimits, check_functional
from boft_export.validation.layer_checks import check_layers, check_required
from boft_export.validation.merge_checks import check_layout, check_tensors, fitting
from boft_export.validation.model import Check, FunctionalFacts, LayerFacts, Outcome, TensorFacts, Validation
from boft_export.validation.plain_checks import check_without_adapter
from boft_export.validation.policy import Policy
from boft_export.validation.replay import judged_plan, replay

# Bytes of the merged checkpoint that are in memory beside what a merge has there.
_COMPARED = 24 << 20


@dataclass
class _Found:
    """What was found so far."""

    checks: list[Check] = field(default_factory=list)
    layers: list[LayerFacts] = field(default_factory=list)
    tensors: list[TensorFacts] = field(default_factory=list)
    functional: FunctionalFacts | None = None


def validate(
    adapters: Ref | Sequence[Ref] = (),
    *,
    base: Ref | None = None,
    merged: Ref | None = None,
    onnx: Ref | None = None,
    functional: FunctionalInputs | None = None,
    policy: Policy | None = None,
    device: str = "auto",
    max_memory: str | int | None = None,
    jobs: int | None = None,
    sources: Sources | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure an adapter, and a merge of it, and judge both.

    By itself, an adapter's rotations and scales are judged. With its base, whether every layer fits. With a merged
    checkpoint, every tensor is merged again in float64 and compared; without an adapter, whether each changed tensor is
    a rotation of the base's. What is wrong with the adapter or the merge is in the result; what keeps them from being
    judged is raised.

    Args:
        adapters: One adapter or several, in the order in which they were merged; none to judge a merge by its base.
        base: The base checkpoint; None for the one the adapter names, where a merge is to be judged.
        merged: The merged checkpoint.
        onnx: A folder with ONNX graphs of base and adapters, to be run beside them.
        functional: Run the merged model beside base and adapter, on these inputs.
        policy: Thresholds and what else is asked for.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_memory: Bytes that the whole process may take, as ``700MiB``, but for ``functional``, which loads models.
        jobs: Threads that compute.
        sources: Where inputs come from.
        progress: Called with bytes compared, bytes in all, and the tensor's name.

    Raises:
        UsageError: If an argument can't be understood, or there is nothing to judge.
        InputError: If the adapter or the base is damaged or is none.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory does not suffice.
    """
    refs = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    _check_request(refs, base, merged, onnx, functional, jobs)
    asked, places = policy or Policy(), sources or Sources()
    means = _Means(device, max_memory, jobs, progress)
    found = _Found()
    opened, checkpoint = _open(refs, base, places, needed=merged is not None or onnx is not None)
    readable = _check_adapters(opened, asked, found)
    plan = None
    if checkpoint is not None and opened and readable:
        plan = _check_fit(checkpoint, opened, found)
    other = _open_merged(merged, places, found) if merged is not None else None
    if other is not None and plan is not None:
        whole = _check_merge(plan, other, asked, means, found)
        if functional is not None and not whole:
            message = "it goes only part of the way, which no adapter applied on the fly does"
            found.checks.append(Check("functional", "", Outcome.INCONCLUSIVE, message))
        elif functional is not None:
            limits = asked.thresholds
            bounds = FunctionalLimits(limits.functional_factor, limits.max_kl, limits.min_top1, limits.min_cosine)
            folder = local_path(other.root, "running a model")
            facts, checks = check_functional(plan, folder, functional, bounds, device=device)
            found.functional = facts
            found.checks += checks
    elif other is not None and not refs and checkpoint is not None:
        _check_by_base(checkpoint, other, asked, means, found)
    if onnx is not None and checkpoint is not None and (plan is not None or not refs):
        _check_onnx(checkpoint, opened, Path(onnx), asked, means, found)
    return Validation(
        adapters=tuple(a.name for a in opened),
        base=checkpoint.name if checkpoint is not None else None,
        merged=Path(merged).name or str(merged) if merged is not None else None,
        checks=tuple(asked.let_pass(c) for c in found.checks),
        layers=tuple(found.layers),
        tensors=tuple(found.tensors),
        functional=found.functional,
        fail_on=asked.fail_on,
        onnx=Path(onnx).name or str(onnx) if onnx is not None else None,
    )


@dataclass(frozen=True)
class _Means:
    """How a merge is replayed."""

    device: str
    max_memory: str | int | None
    jobs: int | None
    progress: Progress | None


def _check_request(
    refs: Sequence[Ref],
    base: Ref | None,
    merged: Ref | None,
    onnx: Ref | None,
    functional: FunctionalInputs | None,
    jobs: int | None,
) -> None:
    if not refs and (base is None or (merged is None and onnx is None)):
        raise UsageError(
            "there is nothing to judge: no adapter was given.",
            hint="Give an adapter, or without one --base and with it --merged or --onnx.",
        )
    if merged is not None and onnx is not None:
        raise UsageError("--merged and --onnx are both given.", hint="Judge one after the other.")
    if onnx is not None and not Path(onnx).is_dir():
        raise UsageError(f"{onnx} is no folder.", hint="Give the folder with the graphs as --onnx.")
    if jobs is not None and jobs < 1:
        raise UsageError(f"{jobs} jobs can't do anything.", hint="Give --jobs 1 or more.")
    if functional is not None and (merged is None or not refs):
        raise UsageError("--functional compares a merged model with base and adapter.", hint="Give --merged as well.")


def _open(
    refs: Sequence[Ref], base: Ref | None, sources: Sources, *, needed: bool
) -> tuple[list[SourcedAdapter], Checkpoint | None]:
    """Open what is judged, and what it is judged by."""
    if not refs:
        return [], sources.base(base) if base is not None else None
    opened = [sources.adapter(r) for r in refs]
    if base is None and not needed:
        return opened, None
    if base is None and opened[0].adapter.base_model is None:
        raise UsageError(f"{opened[0].name} does not name its base.", hint="Give it with --base.")
    checkpoint, opened = sources.pair(base, refs)
    return opened, checkpoint


def _check_adapters(opened: Sequence[SourcedAdapter], policy: Policy, found: _Found) -> bool:
    """Judge the adapters by themselves; tell whether they can be judged any further."""
    readable = True
    for number, source in enumerate(opened):
        notices = list(source.adapter.notices)
        if not any(n.level is Level.ERROR for n in notices):
            notices += inspect_values(source)[0]
        found.checks += _of_notices("adapter", notices)
        if any(n.level is Level.ERROR for n in notices):
            readable = False
            continue
        count = len(source.adapter.layers)
        message = f"{source.adapter.format}: {count} rotated layers, {len(source.adapter.replacements)} whole tensors"
        found.checks.append(Check("adapter", source.name, Outcome.PASS, message))
        for facts, checks in check_layers(number, source, policy.thresholds):
            found.checks += checks
            found.layers += [facts] if facts is not None else []
    modules = [layer.module for s in opened for layer in s.adapter.layers]
    found.checks += check_required(policy.required_layers, modules)
    return readable and not any(c.finding == "no-rotation" for c in found.checks)


def _of_notices(check: str, notices: Sequence[Notice]) -> list[Check]:
    """Return warnings and errors as checks that failed."""
    return [
        Check(check, n.subject, Outcome.FAIL, n.message, n.level, n.code, n.hint)
        for n in notices
        if n.level is not Level.INFO and n.code != "zero-scale"
    ]


def _check_fit(base: Checkpoint, opened: Sequence[SourcedAdapter], found: _Found) -> FoldPlan | None:
    """Judge whether the adapters fit the base; return the plan of the merge where they do."""
    plan = make_plan(base, opened)
    told = {n for s in opened for n in s.adapter.notices}
    notices = [n for n in plan.notices if n not in told]
    found.checks += _of_notices("fit", notices)
    if any(n.level is Level.ERROR for n in notices):
        return None
    expected = sum(len(s.adapter.layers) for s in opened)
    applied = sum(len(t.steps) for t in plan.tensors)
    message = f"{applied} of {expected} layers fit the base"
    found.checks.append(Check("fit", base.name, Outcome.PASS, message, measured={"layers": applied}))
    return plan


def _open_merged(merged: Ref, sources: Sources, found: _Found) -> Checkpoint | None:
    """Open the merged checkpoint; that it is damaged or none is a finding."""
    try:
        return Sources(offline=sources.offline).base(merged)
    except InputError as error:
        finding = "damaged-file" if isinstance(error, DamagedFileError) else "no-checkpoint"
        # What to do then is said of a base.
        hint = error.hint if finding == "damaged-file" else "Give the folder of a merged checkpoint as --merged."
        found.checks.append(Check("files", str(merged), Outcome.FAIL, error.message, finding=finding, hint=hint))
        return None


def _check_merge(plan: FoldPlan, merged: Checkpoint, policy: Policy, means: _Means, found: _Found) -> bool:
    """Judge a merged checkpoint against the merge of base and adapters; tell whether it goes all the way."""
    stored, rules = matched_names([t.name for t in plan.tensors], merged.tensors)
    found.checks += check_names(rules, merged)
    # Without its own tensor, a head is what it is tied to, if it was tied before.
    tied = merged.config.get("tie_word_embeddings") is True and plan.base.config.get("tie_word_embeddings") is not False
    found.checks += [
        *check_layout(plan, stored, tied=tied),
        *check_config(plan.base, plan.edits, merged),
        *check_side_files([f.name for f in plan.side_files if f.source is not None], merged),
    ]
    recorded = _read_manifest(merged.root, found)
    course, compute, checks = _as_recorded(plan, recorded)
    found.checks += checks
    whole = course.variants[0].strength.is_full
    judged = judged_plan(plan, stored := fitting(plan, stored))
    hashes = InputHashes({f.name: f.path for f in merged.files} if recorded is not None else {})
    devices = _devices(means)
    options = RunOptions(max_memory=means.max_memory, jobs=means.jobs)
    ready = fit_memory(judged, course, "", options, devices[0].type, beside=_COMPARED)
    engine = Engine(devices, compute, ready.jobs, ready.memory)
    try:
        replayed = replay(judged, course, stored, engine, hashes, means.progress)
    except DamagedFileError as error:
        # The base's headers were sound, and so were the merged checkpoint's: one of them was cut short since.
        found.checks.append(Check("files", "", Outcome.FAIL, error.message, finding="damaged-file", hint=error.hint))
        return whole
    if recorded is not None:
        found.checks += check_manifest(recorded, plan, replayed.inputs, replayed.files)
    checks, tensors = check_tensors(judged, course, replayed.comparisons, policy.thresholds)
    found.checks += checks
    found.tensors += tensors
    return whole


def _read_manifest(folder: AnyPath, found: _Found) -> Recorded | None:
    try:
        return read_manifest(folder)
    except InputError as error:
        found.checks.append(
            Check("manifest", MANIFEST_NAME, Outcome.FAIL, error.message, finding="damaged-manifest", hint=error.hint)
        )
        return None


def _check_by_base(base: Checkpoint, merged: Checkpoint, policy: Policy, means: _Means, found: _Found) -> None:
    """Judge a merged checkpoint by its base alone."""
    recorded = _read_manifest(merged.root, found)
    try:
        checks, tensors = check_without_adapter(
            base, merged, policy, max_memory=means.max_memory, jobs=means.jobs, progress=means.progress
        )
        expected = [f for f in base.side_files if f.name != "README.md"]
        checks += [*check_config(base, (), merged), *check_side_files(expected, merged)]
        if recorded is not None:
            inputs = InputHashes({f"base/{f.name}": f.path for f in base.files}).digests()
            files = InputHashes({f.name: f.path for f in merged.files}).digests()
            checks += check_manifest(recorded, None, inputs, files)
    except DamagedFileError as error:
        found.checks.append(Check("files", "", Outcome.FAIL, error.message, finding="damaged-file", hint=error.hint))
        return
    found.checks += checks
    found.tensors += tensors


def _check_onnx(
    base: Checkpoint, opened: Sequence[SourcedAdapter], folder: Path, policy: Policy, means: _Means, found: _Found
) -> None:
    """Judge a folder's graphs by base and adapters."""
    try:
        from boft_export.validation.onnx_checks import check_graphs
    except ImportError as error:
        raise UsageError(
            f"graphs can't be judged without ONNX's libraries: {error}.", hint='pip install "boft-export[onnx]"'
        ) from error
    recorded = _read_manifest(folder, found)
    name = recorded.dtype if recorded is not None else "float32"
    plan = make_plan(base, opened, dtype=DTYPE_OF_NAME.get(name))
    course, compute, checks = _as_recorded(plan, recorded, ("onnx",))
    found.checks += checks
    devices = _devices(means)
    options = RunOptions(max_memory=means.max_memory, jobs=means.jobs)
    ready = fit_memory(plan, course, "", options, devices[0].type)
    engine = Engine(devices, compute, ready.jobs, ready.memory)
    found.checks += check_graphs(plan, folder, recorded, course, engine, policy.thresholds, means.device)


def _devices(means: _Means) -> tuple[Device, ...]:
    try:
        return resolve_devices(means.device)
    except ValueError as error:
        raise UsageError(f"{error}.") from error


def _as_recorded(
    plan: FoldPlan, recorded: Recorded | None, commands: tuple[str, ...] = ("merge", "interpolate")
) -> tuple[Course, str, list[Check]]:
    """Return how far the merge went, and in which arithmetic, by its manifest; all the way in float64 without one."""
    everything = Interpolation()
    if recorded is None:
        return everything.course(plan), "float64", []
    if recorded.command not in commands or recorded.compute_dtype not in COMPUTE_DTYPES:
        message = f"it was written by {recorded.command} in {recorded.compute_dtype}, not by {' or '.join(commands)}"
        check = Check("manifest", MANIFEST_NAME, Outcome.FAIL, message, finding="no-merge")
        return everything.course(plan), "float64", [check]
    compute = recorded.compute_dtype
    try:
        course = recorded.interpolation.course(plan)
    except (UsageError, InputError) as error:
        message = f"what its manifest says does not fit this adapter: {error.message}"
        check = Check("manifest", MANIFEST_NAME, Outcome.FAIL, message, finding="other-adapter")
        return everything.course(plan), compute, [check]
    strength = course.variants[0].strength
    if strength.is_full:
        return course, compute, []
    message = f"it is at alpha {strength.label} of the {course.path} path, by its manifest, and judged as such"
    hint = "If that is meant, allow it in a policy: allowed_warnings: [part-way]."
    return course, compute, [Check("manifest", MANIFEST_NAME, Outcome.FAIL, message, Level.WARNING, "part-way", hint)]
