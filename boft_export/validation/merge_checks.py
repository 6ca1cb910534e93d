"""Judging a merged checkpoint against the exact merge, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from boft_export.checkpoint import TensorRef
from boft_export.errors import Level
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.torch_io import TORCH_DTYPES, read_bytes
from boft_export.planning import Action, FoldPlan, TensorPlan
from boft_export.planning.strength import Course
from boft_export.planning.tables import TIED_HEADS
from boft_export.validation.diagnosis import Diagnosis, Doctor
from boft_export.validation.invariant_checks import check_invariant
from boft_export.validation.model import Check, Number, Outcome, TensorFacts
from boft_export.validation.policy import Thresholds
from boft_export.validation.replay import Comparison
from boft_export.validation.suspects import Suspect, read_run

_MOST_FLIPPED = 8
# Elements that are compared to tell what a tensor holds in place of what it should.
_PROBE = 1 << 16
# Untouched tensors of one shape, among which exchanged ones are looked for.
_MOST_ALIKE = 32
_HEADS = {head for _, head, _ in TIED_HEADS}
_WHAT = {Action.FOLD: "replay", Action.REPLACE: "replacement", Action.ADD: "replacement"}
_HINTS = {
    "layer-skipped": "Merge again with boft-export merge, which applies every layer or nothing.",
    "not-applied": "Merge again with boft-export merge; a loader may have dropped the adapter's keys without a word.",
    "low-precision": "Merge again in float64, rounding once: boft-export merge.",
    "flipped-bit": "The file was damaged after it was written: copy or merge it again.",
    "other-base": "Give the base that was merged, at its revision (--revision), or merge again.",
    "other-adapter": "Give the adapter that was merged, at its revision (--adapter-revision), or merge again.",
    "factor-ignored": "PEFT without its CUDA extension drops factors. Merge again with boft-export merge.",
    "stale-tie": "Write both tensors, and tie_word_embeddings false in config.json: boft-export merge does.",
    "bias-lost": "Merge again with boft-export merge, which takes over all that the adapter saved.",
    "replacement-lost": "Merge again with boft-export merge, which takes over all that the adapter saved.",
}
_AGAIN = "Merge again with boft-export merge."


def check_layout(plan: FoldPlan, stored: Mapping[str, TensorRef], *, tied: bool) -> list[Check]:
    """Check from headers that every tensor of a merge is stored, in its shape, as floats, and no other.

    Args:
        plan: What the merge must be.
        stored: What is stored, by the plan's names where they correspond.
        tied: Whether the merged config ties the output head to the embedding.
    """
    checks = []
    heads = _heads(plan)
    for tensor in plan.tensors:
        ref = stored.get(tensor.name)
        if ref is None:
            if tied and tensor.action in (Action.COPY, Action.CONVERT) and tensor.name in _HEADS:
                continue
            finding = "stale-tie" if tensor.name in heads else "missing-tensor"
            checks.append(_failed("layout", tensor.name, finding, "it is missing"))
        elif ref.shape != tensor.shape:
            text = f"expected the shape {_shape(tensor.shape)}, found {_shape(ref.shape)}"
            checks.append(_failed("layout", tensor.name, "other-shape", text))
        elif ref.dtype != tensor.dtype and not {ref.dtype, tensor.dtype} <= set(TORCH_DTYPES):
            text = f"expected the dtype {tensor.dtype}, found {ref.dtype}"
            checks.append(_failed("layout", tensor.name, "other-dtype", text))
    known = {t.name for t in plan.tensors}
    for name in stored:
        if name not in known:
            text = "neither the base nor the adapter has it"
            checks.append(_failed("layout", name, "unexpected-tensor", text, level=Level.WARNING))
    if not checks:
        checks.append(Check("layout", "", Outcome.PASS, f"all {len(known)} tensors are there, in their shapes"))
    return checks


def fitting(plan: FoldPlan, stored: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """Return what is stored and can be compared with the plan's tensors."""
    found = {}
    for tensor in plan.tensors:
        ref = stored.get(tensor.name)
        floats = {tensor.dtype, ref.dtype} <= set(TORCH_DTYPES) if ref is not None else False
        if ref is not None and ref.shape == tensor.shape and (ref.dtype == tensor.dtype or floats):
            found[tensor.name] = ref
    return found


def check_tensors(
    plan: FoldPlan, course: Course, comparisons: Sequence[Comparison], limits: Thresholds
) -> tuple[list[Check], list[TensorFacts]]:
    """Judge a replayed merge: each rotated or replaced tensor, and all that must be untouched.

    Args:
        plan: What was replayed.
        course: How far it went.
        comparisons: What was found.
        limits: Where checks fail.

    Raises:
        AccessError: If a file can't be read.
    """
    judge = _Judge(plan, course, comparisons, limits)
    checks = [c for comparison in comparisons for c in judge.check(comparison)]
    checks = [*judge.overall(checks), *checks]
    return checks, [_facts(c) for c in comparisons]


class _Judge:
    def __init__(self, plan: FoldPlan, course: Course, comparisons: Sequence[Comparison], limits: Thresholds) -> None:
        self._plan = plan
        self._course = course
        self._limits = limits
        self._doctor = Doctor(limits.arithmetic)
        self._comparisons = comparisons
        self._suspects = {
            c.plan.name: Suspect(plan, course, c) for c in comparisons if c.wrong and c.plan.action is Action.FOLD
        }
        self._heads = _heads(plan)

    def check(self, comparison: Comparison) -> list[Check]:
        """Return the checks of one tensor; one that is untouched, as it must be, has none."""
        tensor = comparison.plan
        if tensor.action is Action.FOLD:
            return self._rotated_and_invariant(comparison)
        if tensor.action in _WHAT:
            return [self._replaced(comparison)]
        return [self._untouched(comparison)] if comparison.wrong else []

    def _rotated_and_invariant(self, comparison: Comparison) -> list[Check]:
        replayed = self._rotated(comparison)
        if replayed.outcome is not Outcome.PASS or not comparison.stored.num_elements:
            return [replayed]
        invariant = check_invariant(self._plan, self._course, comparison, self._limits.gram_factor)
        return [replayed] if invariant is None else [replayed, invariant]

    def overall(self, checks: Sequence[Check]) -> list[Check]:
        """Return what the tensors' checks say together."""
        found = []
        rotated = [c for c in checks if c.check == "replay"]
        skipped = [c for c in rotated if c.finding in ("layer-skipped", "stale-tie")]
        if rotated:
            # Of untrained layers, and at alpha 0, the right merge is the base itself.
            same = sum(c.measure is None or not c.measure.changed for c in self._comparisons if c.plan.steps)
            differ = len(rotated) - len(skipped) - same
            if skipped and differ <= 0:
                text = f"all {len(rotated)} stored tensors that the adapter rotates are the base's"
                found.append(_failed("applied", "", "not-applied", text))
            elif same == len(rotated) and not self._course.variants[0].strength.is_full:
                text = f"merged as it is meant to be, all {same} rotated tensors are the base's"
                found.append(_failed("applied", "", "no-effect", text, level=Level.WARNING))
            else:
                text = f"{differ} of {len(rotated)} rotated tensors differ from the base's"
                found.append(Check("applied", "", Outcome.PASS, text))
        kept = [c for c in self._comparisons if c.plan.action in (Action.COPY, Action.CONVERT)]
        changed = [c for c in kept if c.wrong]
        measured = {"tensors": len(kept), "changed": len(changed)}
        strangers = sum(c.finding == "other-base" for c in rotated)
        if len(changed) > max(1, len(kept) // 2) or (rotated and strangers == len(rotated)):
            text = f"{len(changed)} of {len(kept)} tensors that no adapter touches differ from the base's"
            if not changed:
                text = "the rotated tensors were not made from it"
            found.append(_failed("base", "", "other-base", text, measured=measured))
        if kept and not changed:
            converted = sum(c.plan.action is Action.CONVERT for c in kept)
            text = f"{len(kept) - converted} tensors are the base's, byte for byte"
            text += f", and {converted} rounded once to another dtype" if converted else ""
            found.append(Check("untouched", "", Outcome.PASS, text, measured=measured))
        return found

    def _rotated(self, comparison: Comparison) -> Check:
        name, limits = comparison.plan.name, self._limits
        elements = comparison.stored.num_elements
        measured = {"wrong": comparison.wrong, "elements": elements, "largest_ulp": comparison.largest_ulp}
        told: dict[str, Number] = {"largest_ulp": limits.max_ulp} if limits.max_ulp != float("inf") else {}
        if not comparison.wrong:
            text = f"all {elements:,} elements are correctly rounded"
            return Check("replay", name, Outcome.PASS, text, measured=measured, limits=told)
        suspect = self._suspects[name]
        others = [
            s
            for n, s in self._suspects.items()
            if n != name and s.tensor.shape == suspect.tensor.shape and s.tensor.dtype == suspect.tensor.dtype
        ]
        found = self._doctor.diagnose(suspect, others)
        if found.finding == "layer-skipped" and name in self._heads:
            found = Diagnosis("stale-tie", "it is the base's, and no longer tied: the adapter was not applied to it")
        self._suspects[name].release()
        for other in others:
            other.release()
        if found.finding == "lost-effect":
            return Check("replay", name, Outcome.INCONCLUSIVE, found.message, measured=measured)
        if found.finding is not None:
            return _failed("replay", name, found.finding, found.message, measured=measured)
        right = 1 - comparison.wrong / elements
        text = f"{right:.4%} of the elements are correctly rounded; {found.message}"
        if comparison.wrong > limits.max_wrong * elements or (comparison.largest_ulp or 0) > limits.max_ulp:
            text += f"; the worst is off by {comparison.largest_ulp} ulp"
            return _failed("replay", name, "inexact", text, measured=measured, limits=told)
        return Check("replay", name, Outcome.PASS, text, measured=measured, limits=told)

    def _replaced(self, comparison: Comparison) -> Check:
        tensor = comparison.plan
        if not comparison.wrong:
            return Check("replacement", tensor.name, Outcome.PASS, "it is the adapter's")
        base = tensor.base
        if base is None:
            # A head that was tied to its embedding has no tensor of its own in the base.
            base = next((o.ref for o in tensor.origins if o.adapter is None), None)
        if base is not None and base.shape == tensor.shape and _holds(comparison.stored, base):
            finding = "bias-lost" if tensor.name.endswith(".bias") else "replacement-lost"
            finding = "stale-tie" if tensor.name in self._heads else finding
            return _failed("replacement", tensor.name, finding, "it is the base's, though the adapter brings its own")
        return self._damaged(comparison, "replacement", "the adapter's")

    def _untouched(self, comparison: Comparison) -> Check:
        tensor = comparison.plan
        for other in self._alike(comparison):
            if _holds(comparison.stored, other.source):
                text = f"it holds what {other.name} must be"
                return _failed("untouched", tensor.name, "swapped-layers", text)
        return self._damaged(comparison, "untouched", "the base's")

    def _alike(self, comparison: Comparison) -> list[TensorPlan]:
        own = comparison.plan
        alike = [
            c.plan for c in self._comparisons if c.wrong and c.plan.action is own.action and c.plan.shape == own.shape
        ]
        return [t for t in alike if t is not own] if len(alike) <= _MOST_ALIKE else []

    @staticmethod
    def _damaged(comparison: Comparison, check: str, whose: str) -> Check:
        """Return what is wrong with a tensor that should be someone's as it is."""
        tensor, elements = comparison.plan, comparison.stored.num_elements
        measured = {"wrong": comparison.wrong, "elements": elements, "largest_ulp": comparison.largest_ulp}
        if comparison.not_finite:
            text = f"{comparison.not_finite} elements are not finite, though {whose} are"
            return _failed(check, tensor.name, "not-finite", text, measured=measured)
        if comparison.all_places_known and _flipped_bits(comparison) == comparison.wrong <= _MOST_FLIPPED:
            text = f"a bit is turned over in {comparison.wrong} of its {elements:,} elements"
            return _failed(check, tensor.name, "flipped-bit", text, measured=measured)
        text = f"{comparison.wrong:,} of {elements:,} elements are not {whose}"
        return _failed(check, tensor.name, "other-values", text, measured=measured)


def _flipped_bits(comparison: Comparison) -> int:
    """Return how many of the wrong elements, or bytes, are off by one bit."""
    tensor, ref = comparison.plan, comparison.stored
    if comparison.wrong > _MOST_FLIPPED:
        return -1
    count = 0
    for place in comparison.places.tolist():
        if ref.dtype in TORCH_DTYPES:
            correct = round_once(read_run(tensor.source, place, place + 1).double(), TORCH_DTYPES[ref.dtype])
            bits = zip(_bytes(correct), _bytes(read_run(ref, place, place + 1)), strict=True)
        else:
            bits = zip(
                _bytes(read_bytes(tensor.source, place, place + 1)),
                _bytes(read_bytes(ref, place, place + 1)),
                strict=True,
            )
        count += sum((a ^ b).bit_count() for a, b in bits) == 1
    return count


def _bytes(x: Tensor) -> bytes:
    return bytes(x.view(torch.uint8).numpy())


def _holds(stored: TensorRef, other: TensorRef) -> bool:
    """Tell whether a tensor begins and ends with the values of another of its shape, in its own dtype."""
    if other.shape != stored.shape or stored.dtype not in TORCH_DTYPES or other.dtype not in TORCH_DTYPES:
        return False
    count = stored.num_elements
    for start, stop in ((0, min(_PROBE, count)), (max(0, count - _PROBE), count)):
        expected = round_once(read_run(other, start, stop).double(), TORCH_DTYPES[stored.dtype])
        if not torch.equal(expected, read_run(stored, start, stop)):
            return False
    return True


def _heads(plan: FoldPlan) -> set[str]:
    """Return the names of tensors that were tied to others, and are not any more."""
    untied = any(e.path[-1] == "tie_word_embeddings" for e in plan.edits)
    # What the base's files leave to the tensor it is tied to.
    added = {t.name for t in plan.tensors if t.base is None and t.origins[0].adapter is None}
    stored = {t.name for t in plan.tensors if untied and t.name in _HEADS and t.action is not Action.COPY}
    return {name for pair in plan.tied for name in pair} | added | stored


def _facts(comparison: Comparison) -> TensorFacts:
    tensor, measure = comparison.plan, comparison.measure
    measured = measure is not None and tensor.action in (Action.FOLD, Action.CONVERT)
    return TensorFacts(
        name=tensor.name,
        action=tensor.action.value,
        dtype=comparison.stored.dtype,
        shape=comparison.stored.shape,
        wrong=comparison.wrong,
        largest_ulp=comparison.largest_ulp,
        relative_change=measure.relative_change if measured and measure is not None else None,
        rounding_loss=measure.rounding_loss if measured and measure is not None else None,
    )


def _failed(
    check: str,
    subject: str,
    finding: str,
    message: str,
    *,
    level: Level = Level.ERROR,
    measured: Mapping[str, Number] | None = None,
    limits: Mapping[str, Number] | None = None,
) -> Check:
    hint = _HINTS.get(finding, _AGAIN)
    return Check(check, subject, Outcome.FAIL, message, level, finding, hint, measured or {}, limits or {})


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"
