"""Judging a merged checkpoint by its base alone: is what changed a rotation of what was there?"""

from __future__ import annotations

from fnmatch import fnmatchcase

from boft_export.checkpoint import Checkpoint, TensorRef
from boft_export.errors import Level
from boft_export.pipeline.diff import compare_pairs
from boft_export.pipeline.options import Progress
from boft_export.pipeline.tensor_change import ChangeKind, TensorChange
from boft_export.planning.names import matched_names
from boft_export.planning.tables import FUSED_ROWS, TIED_HEADS
from boft_export.validation.folder_checks import check_names
from boft_export.validation.model import Check, Number, Outcome, TensorFacts
from boft_export.validation.policy import Policy

# What each kind of change means where only rotations and scales are expected: how the check ends, what it is called
# where it fails, and what is said.
_VERDICTS: dict[ChangeKind, tuple[Outcome, str | None, str]] = {
    ChangeKind.IDENTICAL: (Outcome.FAIL, "stale-tie", "it is the embedding it is tied to, and stored once more"),
    ChangeKind.CONVERTED: (Outcome.PASS, None, "it is the base's in another dtype"),
    ChangeKind.ROTATION: (Outcome.PASS, None, "it is the base's, rotated and scaled"),
    ChangeKind.ROTATION_OUTPUT: (Outcome.PASS, None, "it is the base's, rotated from the output's side"),
    ChangeKind.SCALE: (Outcome.FAIL, "rotation-dropped", "it is the base's, only scaled"),
    ChangeKind.ROUNDING: (Outcome.INCONCLUSIVE, None, "it differs from the base's by no more than a step of its dtype"),
    ChangeKind.EDIT: (Outcome.FAIL, "wrong-elements", "a few elements are not the base's, and all others are"),
    ChangeKind.REPLACEMENT: (Outcome.FAIL, "no-rotation-of-base", "it is no rotation of the base's"),
    ChangeKind.UNKNOWN: (Outcome.INCONCLUSIVE, None, "it can't be told"),
}
_FUSED = [[fused] for fused, _ in FUSED_ROWS]
_LOST = {"rotation-dropped": Level.WARNING, "stale-tie": Level.WARNING}


def check_without_adapter(
    base: Checkpoint,
    merged: Checkpoint,
    policy: Policy,
    *,
    max_memory: str | int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> tuple[list[Check], list[TensorFacts]]:
    """Compare a merged checkpoint with its base, tensor by tensor, in bounded memory.

    For each changed tensor it is estimated whether W' = diag(s) W R^T for some orthogonal R, from Gram matrices.

    Args:
        base: The base.
        merged: The merged checkpoint.
        policy: Thresholds, and which tensors may change in any way.
        max_memory: Bytes that the whole process may take.
        jobs: Threads that compute; None for the default.
        progress: Called with bytes compared, bytes in all, and the tensor's name.

    Raises:
        UsageError: If ``jobs`` or ``max_memory`` says nothing.
        DamagedFileError: If a file ends early.
        AccessError: If a file can't be read.
        ResourceError: If memory does not suffice.
    """
    stored, rules = matched_names(list(base.tensors), merged.tensors)
    checks = check_names(rules, merged)
    pairs: dict[str, tuple[TensorRef, TensorRef]] = {}
    for name, ref in base.tensors.items():
        other = stored.pop(name, None)
        if other is None or other.shape != ref.shape:
            checks.append(_unlike(name, ref, other, policy))
        else:
            pairs[name] = ref, other
    heads = set()
    for name, ref in stored.items():
        if (partner := _tied_to(name, ref, base)) is not None:
            pairs[name] = partner, ref
            heads.add(name)
            continue
        outcome = Outcome.PASS if _may_change(name, policy) else Outcome.INCONCLUSIVE
        checks.append(Check("layout", name, outcome, "the base has no such tensor"))
    facts: list[TensorFacts] = []
    compared = compare_pairs(list(pairs.values()), max_memory=max_memory, jobs=jobs, progress=progress)
    for (name, (_, ref)), found in zip(pairs.items(), compared, strict=True):
        facts.append(_facts(name, ref, found.change))
        if name in heads or found.change.kind not in (ChangeKind.IDENTICAL, ChangeKind.CONVERTED):
            checks.append(_judge(name, ref, found.change, policy))
    if heads and merged.config.get("tie_word_embeddings") is True:
        message = "it ties an output head that is stored, and so would not be loaded"
        checks.append(Check("config", "config.json", Outcome.FAIL, message, finding="stale-tie"))
    return [_applied(facts), *checks], facts


def _applied(facts: list[TensorFacts]) -> Check:
    kept = (ChangeKind.IDENTICAL, ChangeKind.CONVERTED)
    changed = sum(f.action not in kept for f in facts)
    measured = {"tensors": len(facts), "changed": changed}
    if changed:
        message = f"{changed} of {len(facts)} tensors differ from the base's"
        return Check("applied", "", Outcome.PASS, message, measured=measured)
    message = f"all {len(facts)} tensors are the base's: nothing was merged"
    return Check("applied", "", Outcome.FAIL, message, finding="not-applied", measured=measured)


def _tied_to(name: str, ref: TensorRef, base: Checkpoint) -> TensorRef | None:
    """Return the base's embedding that an output head it has no tensor for was tied to."""
    for embedding, head, _ in TIED_HEADS:
        if head == name:
            found = (t for n, t in base.tensors.items() if fnmatchcase(n, embedding) and t.shape == ref.shape)
            if (partner := next(found, None)) is not None:
                return partner
    return None


def _may_change(name: str, policy: Policy) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in policy.allowed_changes)


def _unlike(name: str, ref: TensorRef, other: TensorRef | None, policy: Policy) -> Check:
    """Return the check of a tensor that is missing or has another shape."""
    if other is None:
        message, finding = "it is missing", "missing-tensor"
    else:
        message, finding = f"its shape is {list(other.shape)}, the base's {list(ref.shape)}", "other-shape"
    if _may_change(name, policy):
        return Check("layout", name, Outcome.PASS, f"{message} (allowed by the policy)")
    hint = "If that is meant, allow it in a policy: allowed_changes."
    return Check("layout", name, Outcome.FAIL, message, finding=finding, hint=hint)


def _judge(name: str, ref: TensorRef, change: TensorChange, policy: Policy) -> Check:
    outcome, finding, message = _VERDICTS[change.kind]
    limit = None if change.limit is None else change.limit * policy.thresholds.gram_factor
    measured: dict[str, Number] = {
        "residual": change.residual,
        "noise": change.noise,
        "relative_change": change.relative_change,
        "smallest_scale": change.smallest_scale,
        "largest_scale": change.largest_scale,
        "largest_angle": change.largest_angle,
    }
    if change.kind is ChangeKind.REPLACEMENT and change.residual is not None and limit and change.residual <= limit:
        outcome, finding, message = _VERDICTS[ChangeKind.ROTATION]
    if len(ref.shape) < 2 and change.kind is ChangeKind.SCALE and 2 * (change.changed or 0) < ref.num_elements:
        # A scale so close to 1 that most elements stay as they are is no likelier than damage to the others.
        outcome, finding, message = _VERDICTS[ChangeKind.EDIT]
    if change.kind is ChangeKind.REPLACEMENT and len(ref.shape) < 2:
        outcome, finding, message = Outcome.INCONCLUSIVE, None, "it is a vector, which any training could have made"
    elif change.kind is ChangeKind.REPLACEMENT and name.split(".")[-2:-1] in _FUSED:
        outcome, finding = Outcome.INCONCLUSIVE, None
        message = "it is fused of parts, each of which may have a rotation of its own"
    if change.nonfinite_new > change.nonfinite:
        outcome, finding = Outcome.FAIL, "not-finite"
        message = f"{change.nonfinite_new - change.nonfinite} elements are not finite, though the base's are"
    elif _may_change(name, policy):
        outcome, finding, message = Outcome.PASS, None, f"{message} (allowed by the policy)"
    if change.reason is not None and outcome is Outcome.INCONCLUSIVE:
        message += f": {change.reason}"
    if change.residual is not None and limit is not None:
        message += f"; the Gram matrix of its rows is off by {change.residual:.1e}, rounding explains {limit:.1e}"
    if outcome is Outcome.PASS and change.smallest_scale is not None:
        message += f"; scales are {change.smallest_scale:.4g} to {change.largest_scale:.4g}"
    return Check(
        check="rotation",
        subject=name,
        outcome=outcome,
        message=message,
        level=_LOST.get(finding or "", Level.ERROR),
        finding=finding,
        measured=measured,
        limits={} if limit is None else {"residual": limit},
    )


def _facts(name: str, ref: TensorRef, change: TensorChange) -> TensorFacts:
    return TensorFacts(
        name=name,
        action=change.kind.value,
        dtype=ref.dtype,
        shape=ref.shape,
        largest_ulp=change.largest_ulp,
        relative_change=change.relative_change,
        residual=change.residual,
        noise=change.noise,
    )
