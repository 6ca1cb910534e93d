"""Unmerging: from a merged checkpoint and its adapters back to the base, as far as rounding has left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from boft_export.checkpoint import TensorRef
from boft_export.checkpoint.places import AnyPath
from boft_export.errors import CheckFailedError, DamagedFileError, InputError, Level, Notice, raise_for_errors
from boft_export.linalg.bits import as_integers
from boft_export.linalg.interpolation import interpolate_scale
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.engine import OutputResult, RunResult, TensorResult
from boft_export.pipeline.hashing import file_digest
from boft_export.pipeline.options import Progress, RunOptions
from boft_export.pipeline.restored_card import restored_card
from boft_export.pipeline.run import Verb, carry_out, devices_for
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes, read_tensor
from boft_export.pipeline.unmerge_plan import Brought, UnmergePlan, prepare_unmerge
from boft_export.planning import FoldPlan
from boft_export.planning.inputs import Ref, Sources
from boft_export.planning.output import UNDO_FOLDER

_COMPARED = 1 << 20
# Of what the dtype can hold, two thirds and more come back.
_HARDLY = 0.3


@dataclass(frozen=True)
class UnmergeResult:
    """A finished unmerge.

    Attributes:
        output: The folder.
        plan: What was planned, with all notices; the adapters in the order in which they were undone.
        tensors: What was done to each tensor, and measured.
        expected: The share of the rotated elements that are likely the base's, bit for bit: so many survived a merge
            and an unmerge that were tried on neighbouring values. None where nothing was rotated.
        exact: The merge's record was there and says what every element was; ``identical`` tells whether that was
            compared with the base's SHA-256.
        returned: The share of which merging again gives what is in the merged checkpoint, bit for bit.
        identical: The weight files are the base's, by the SHA-256 that the merge noted; None where it noted none of
            these names.
        resumed: Weight files taken over from a killed run.
        manifest: The content of the folder's ``boft_export.json``.
    """

    output: AnyPath
    plan: FoldPlan
    tensors: tuple[TensorResult, ...]
    expected: float | None
    exact: bool
    returned: float | None
    identical: bool | None
    resumed: tuple[str, ...]
    manifest: dict[str, Any]


def unmerge(
    merged: Ref,
    adapters: Ref | Sequence[Ref],
    output: Ref,
    *,
    base: Ref | None = None,
    keep_replaced: bool = False,
    dtype: str | None = None,
    compute_dtype: str = "float64",
    device: str = "auto",
    max_shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    jobs: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    sources: Sources | None = None,
    progress: Progress | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> UnmergeResult:
    """Undo a merge and write what was before it, all or nothing: W = diag(1/s) W' R, rounded once.

    What the merge rounded away is lost: some elements come back as a neighbour of what they were. Of a merge that was
    made ``reversible`` a record tells all of that, and the base's bytes come back.

    Args:
        merged: The merged checkpoint: a local path or a Hub id.
        adapters: The adapters it holds, in the order in which they were applied; or only the last ones.
        output: The folder to write; it appears only when it is complete.
        base: Where to take the tensors from that an adapter replaced, and nothing else but the config.
        keep_replaced: Leave them as they are.
        dtype: The output's dtype: ``float32``, ``float16``, ``bfloat16``; None keeps the merged checkpoint's.
        compute_dtype: ``float64``, after which each element is rounded once, or ``float32``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``cuda:all``.
        max_shard_size: The largest file of the output, as ``5GB``; None keeps the merged checkpoint's files.
        max_memory: Bytes that the whole process may take, as ``700MiB``.
        jobs: Threads that read, fold and write; by default one for each core.
        resume: Go on with a killed run.
        overwrite: Replace ``output`` where it exists, in one step at the end.
        sources: Where inputs come from.
        progress: Called with bytes written, bytes in all, and the tensor's name.
        engine: ``local``, or ``ray`` for the workers of a Ray cluster, a weight file each.
        ray_address: ``auto``, ``host:port`` or ``ray://host:port``; None for a cluster on this machine.

    Raises:
        CheckFailedError: If what comes out by a record is not the base.
        UsageError: If an argument can't be understood, or ``output`` may not be written.
        InputError: If the checkpoint does not hold these adapters, a scale is 0, or what was replaced can't be brought
            back.
        AccessError: If the Hub or the file system fails.
        ResourceError: If memory or disk does not suffice.
    """
    options = RunOptions(
        dtype=dtype,
        compute_dtype=compute_dtype,
        device=device,
        max_shard_size=max_shard_size,
        max_memory=max_memory,
        jobs=jobs,
        resume=resume,
        overwrite=overwrite,
        sources=sources,
        progress=progress,
        engine=engine,
        ray_address=ray_address,
    )
    devices = devices_for(options)
    undo, ready = prepare_unmerge(
        merged, adapters, output, options, devices[0].type, base=base, keep_replaced=keep_replaced
    )
    if undo.records is None:
        # A record has what zeros have left nothing of.
        _check_scales(undo)
    for brought in undo.brought:
        _check_brought(brought)
    _check_base(undo)
    asked = undo.interpolation
    verb = Verb(
        "unmerge",
        record=lambda s: {} if s.is_full else asked.record(s),
        judge=lambda run, written, _: _judge(undo, run, written),
        card=restored_card,
        told=lambda _, written: {"unmerged": _told(undo, written)},
        inverse=True,
        way_back=True,
        records=undo.records or {},
        settings={"keep_replaced": keep_replaced, "base": base is not None, "record": undo.records is not None},
    )
    done = carry_out(verb, ready, options, devices)
    manifest = done.manifests[0]
    return UnmergeResult(
        output=done.output,
        plan=done.plan,
        tensors=done.outputs[0].tensors,
        expected=manifest["unmerged"]["expected"],
        exact=undo.records is not None,
        returned=manifest["unmerged"]["returned"],
        identical=manifest["unmerged"]["identical"],
        resumed=done.resumed,
        manifest=manifest,
    )


def _check_scales(undo: UnmergePlan) -> None:
    """Refuse scales of which nothing is left to undo.

    Raises:
        InputError: If one is 0, as far as it was gone.
        AccessError: If an adapter can't be read.
    """
    notices = []
    alphas = undo.course.alphas_of_layers(undo.plan)
    for number, source in enumerate(undo.plan.adapters):
        for layer in source.adapter.layers:
            if layer.scale is None:
                continue
            scale = read_tensor(source.refs[layer.scale])
            applied = [interpolate_scale(scale, a) for a in alphas.get((number, layer.module), ())]
            zeros = max((int((s == 0).sum()) for s in applied), default=0)
            if zeros:
                message = f"{zeros} of {scale.numel()} output scales are 0: what they made 0 can't be brought back"
                notices.append(Notice(Level.ERROR, "zero-scale", layer.module, message, "Go back to the base itself."))
    raise_for_errors(notices, "the merge can't be undone")


def _check_base(undo: UnmergePlan) -> None:
    """Refuse a base that is not the one that was merged into, by its files from which tensors are taken.

    Raises:
        InputError: If one has another SHA-256 than the merge noted.
        AccessError: If one can't be read.
    """
    told = undo.recorded.base.sha256 if undo.recorded is not None else {}
    taken = {id(o.ref) for t in undo.plan.tensors for o in t.origins}
    for file in undo.base.files if undo.base is not None else ():
        if taken.isdisjoint(map(id, file.tensors)):
            continue
        digest = file_digest(file.path)
        if told.get(file.name, digest) != digest:
            raise InputError(
                f"{file.path} has SHA-256 {digest}, the merge was made from one with {told[file.name]}.",
                hint="Give the base that was merged into, or leave the tensors as they are with --keep-replaced.",
            )


def _check_brought(brought: Brought) -> None:
    """Refuse a checkpoint that does not hold what its adapter brought.

    Raises:
        InputError: If a tensor is another.
    """
    merged, own = brought.merged, brought.adapter
    compare = _same_values if {merged.dtype, own.dtype} <= TORCH_DTYPES.keys() else _same_bytes
    if merged.shape != own.shape or not compare(merged, own):
        raise InputError(
            f"{merged.name} is not what the adapter brings: this is no merge of it.",
            hint="Give the adapter that was merged. What was trained since the merge can't be unmerged.",
        )


def _same_values(merged: TensorRef, own: TensorRef) -> bool:
    """Tell whether a tensor holds another's values, rounded once."""

    def elements(ref: TensorRef, start: int) -> torch.Tensor:
        dtype = TORCH_DTYPES[ref.dtype]
        stop = min(start + _COMPARED, ref.num_elements)
        return read_bytes(ref, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)

    for start in range(0, merged.num_elements, _COMPARED):
        there = elements(merged, start)
        if not torch.equal(as_integers(there), as_integers(round_once(elements(own, start).double(), there.dtype))):
            return False
    return True


def _same_bytes(merged: TensorRef, own: TensorRef) -> bool:
    pieces = ((s, min(s + _COMPARED, merged.nbytes)) for s in range(0, merged.nbytes, _COMPARED))
    return merged.dtype == own.dtype and all(
        torch.equal(read_bytes(merged, *piece), read_bytes(own, *piece)) for piece in pieces
    )


def _judge(undo: UnmergePlan, run: RunResult, written: OutputResult) -> list[Notice]:
    """Note where the merged checkpoint is not as its manifest says; with a record, compare what came out with the base.

    Raises:
        DamagedFileError: If a record is there for what is no longer as it was written.
        CheckFailedError: If what came out by a record is not the base.
    """
    files = undo.recorded.files if undo.recorded is not None else {}
    changed = [n for n, f in files.items() if run.inputs.get(f"base/{n}", f.sha256) != f.sha256]
    lost = _lost(undo, written)
    if not changed:
        _check_identical(undo, written)
        return lost
    message = f"{len(changed)} weight files are not as they were written, the first: {changed[0]}"
    if undo.records is not None:
        hint = f"Copy the folder again, or remove {UNDO_FOLDER} from it to go without a record."
        raise DamagedFileError(f"{undo.plan.base.name}: {message}.", hint=hint)
    return [
        *lost,
        Notice(Level.WARNING, "changed-since", undo.plan.base.name, message, "What was changed stays changed."),
    ]


def _lost(undo: UnmergePlan, written: OutputResult) -> list[Notice]:
    """Note tensors of which the merge has kept hardly anything: tiny scales that took it below its dtype's numbers."""
    gone = [
        r.plan.name
        for r in written.tensors
        # Of a float64 nothing comes back to the last bit, as that is what is computed in.
        if undo.records is None and r.measure is not None and r.plan.dtype != "F64"
        if r.measure.kept < _HARDLY * r.measure.tried
    ]
    if not gone:
        return []
    message = f"of {len(gone)} tensors hardly an element comes back, the first: {gone[0]}"
    hint = "Their scales are so small that the merge rounded the weights away. Start from the base itself."
    return [Notice(Level.WARNING, "lost-weights", undo.plan.base.name, message, hint)]


def _check_identical(undo: UnmergePlan, written: OutputResult) -> None:
    told = undo.recorded.base.sha256 if undo.recorded is not None else {}
    for name in undo.as_base & told.keys():
        if written.files[name] != told[name]:
            raise CheckFailedError(
                f"{name} came out with SHA-256 {written.files[name]}, the base's has {told[name]}.",
                hint=f"The record is damaged, or this is a bug of ours: remove {UNDO_FOLDER} to go without it.",
            )


def _told(undo: UnmergePlan, written: OutputResult) -> dict[str, Any]:
    """Return what the manifest says of how exact the result is."""
    rotated = [r.measure for r in written.tensors if r.plan.steps and r.measure is not None]
    elements = sum(m.elements for m in rotated if m.returned is not None)
    returned, tried = sum(m.returned or 0 for m in rotated), sum(m.tried for m in rotated)
    record = undo.records is not None
    known = {n: d for n, d in undo.recorded.base.sha256.items() if n in written.files} if undo.recorded else {}
    return {
        "returned": returned / elements if elements else None,
        "expected": 1.0 if record and rotated else sum(m.kept for m in rotated) / tried if tried else None,
        "record": record,
        "identical": all(written.files[n] == d for n, d in known.items()) if len(known) == len(written.files) else None,
    }
