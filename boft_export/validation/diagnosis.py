"""Telling what went wrong with a tensor that isn't what it must be.

Errors of arithmetic and damage are told by their size. A merge that was done otherwise is found by doing it otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from boft_export.adapters import View
from boft_export.linalg.bits import as_integers
from boft_export.linalg.rotation import Rotation
from boft_export.linalg.rounding import round_once
from boft_export.pipeline.fold import unrounded
from boft_export.pipeline.layers import LayerOperator
from boft_export.planning import Segment, Step
from boft_export.validation.mistakes import Mistake, mistakes, without_rotation
from boft_export.validation.suspects import Run, Steps, Suspect

# How many times an arithmetic's unit roundoff, at the length of the vector that is rotated, an element may be off by.
_MARGIN = 8
_FLOAT64, _FLOAT32 = 2.0**-53, 2.0**-24
# An explanation must come this many times closer to what is stored than the right merge.
_CLOSER = 4
# As few elements as this may each be off by a bit that turned over.
_MOST_FLIPPED = 8
# A share of wrong elements below which they are damage and not another merge.
_SPORADIC = 0.02
# Below this share, wrong float32 elements are not the work of float32 arithmetic, which gets a good part wrong.
_FEW = 0.01
# Among as many tensors of one shape, those that were exchanged are looked for.
_MOST_EXCHANGED = 8
# Rows whose inner products are compared.
_ROWS = 64


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a tensor.

    Attributes:
        finding: By name; None where all that differs is errors that the arithmetic may make.
        message: In a sentence.
    """

    finding: str | None
    message: str


class Doctor:
    """Diagnoses tensors one after the other; what one suffers from is looked for first in the next.

    Args:
        arithmetic: Unit roundoff of the arithmetic whose errors are let pass.
    """

    def __init__(self, arithmetic: float) -> None:
        self._arithmetic = arithmetic
        self._last: tuple[Mistake, Mistake] | None = None

    def diagnose(self, suspect: Suspect, others: Sequence[Suspect] = ()) -> Diagnosis:
        """Tell what is wrong with a rotated tensor.

        Args:
            suspect: The tensor.
            others: Further ones of its shape that aren't what they must be.
        """
        found = suspect.comparison
        if found.not_finite:
            text = f"{found.not_finite} elements are not finite"
            return Diagnosis("not-finite", text)
        sample: Sequence[Run] = suspect.sample()
        beyond, flipped = found.wrong, 0
        if found.all_places_known or not self._beyond(suspect, sample, self._arithmetic)[0]:
            changed = found.measure.changed if found.measure is not None else found.stored.num_elements
            few = found.wrong < _FEW * changed and suspect.dtype in (torch.float32, torch.float64)
            arithmetic = min(self._arithmetic, _FLOAT64) if few else self._arithmetic
            beyond, flipped = self._beyond(suspect, suspect.runs_of_places(), arithmetic)
            if beyond == flipped and 0 < beyond <= _MOST_FLIPPED:
                return Diagnosis("flipped-bit", f"a bit is turned over in {_count(beyond, 'element')}")
        sample, part = _wrong_part(suspect, sample)
        inputs = [(run, suspect.before(run), suspect.stored(run)) for run in sample]
        off, effect = _off(suspect, inputs)
        if not beyond and off <= effect / _CLOSER:
            return Diagnosis(None, "the rest is off by what the arithmetic makes")
        explained = self._explain(suspect, inputs, others)
        if explained is not None:
            finding = "part-skipped" if part and explained.finding == "layer-skipped" else explained.finding
            return Diagnosis(finding, part + explained.message)
        if not beyond:
            return Diagnosis("lost-effect", "what it was to change is no more than the arithmetic's errors")
        if beyond < _SPORADIC * found.stored.num_elements:
            text = f"{beyond:,} of {found.stored.num_elements:,} elements are wrong, the first at {_place(suspect)}"
            return Diagnosis("wrong-elements", text)
        last = _by_rows(suspect, inputs) or _low_precision(suspect, inputs) or _by_inner_products(suspect, sample)
        return Diagnosis(last.finding, part + last.message)

    @staticmethod
    def _beyond(suspect: Suspect, runs: Sequence[Run], arithmetic: float) -> tuple[int, int]:
        """Return how many elements are off by more than rounding and arithmetic, and how many of them by one bit."""
        beyond = flipped = 0
        for run in runs:
            x = suspect.before(run)
            y = suspect.after(run, x, suspect.fused_steps(run.segment))
            z = suspect.stored(run)
            length = torch.maximum(suspect.length(run, x), suspect.length(run, y))
            allowed = half_ulp(z) + _MARGIN * suspect.amplification(run.segment) * arithmetic * length
            correct = round_once(y, suspect.dtype)
            off = ((z.double() - y).abs() > allowed) & (z != correct)
            beyond += int(off.sum())
            flipped += int(_one_bit(z[off], correct[off]).sum())
        return beyond, flipped

    def _explain(self, suspect: Suspect, inputs: Sequence[_Input], others: Sequence[Suspect]) -> Diagnosis | None:
        """Return what a merge done otherwise explains best, if it comes much closer than the right one."""
        right = self._distance(suspect, inputs, suspect.steps)
        factors = max((o.rotation.num_factors for r, _, _ in inputs for _, o in suspect.steps(r.segment)), default=1)
        best: tuple[float, Diagnosis] = (right / _CLOSER, Diagnosis(None, ""))
        # Of explanations that fit alike the first counts.
        pairs = list(mistakes(factors))
        if self._last is not None:
            pairs.insert(0, self._last)
        for rotation, scale in pairs:

            def steps(segment: Segment, rotation: Mistake = rotation, scale: Mistake = scale) -> Steps:
                return [(p, scale.change(rotation.change(o))) for p, o in suspect.steps(segment)]

            distance = self._distance(suspect, inputs, steps)
            if distance < best[0]:
                best = distance, _named(rotation, scale)
                self._last = rotation, scale
                if distance == 0:
                    return best[1]
        for distance, diagnosis in self._further(suspect, inputs, others):
            if distance < best[0]:
                best = distance, diagnosis
        return best[1] if best[1].finding is not None else None

    def _further(
        self, suspect: Suspect, inputs: Sequence[_Input], others: Sequence[Suspect]
    ) -> Iterator[tuple[float, Diagnosis]]:
        """Yield how far other explanations are off: adapters left out or exchanged, layers exchanged."""
        adapters = sorted({s.adapter for s in suspect.tensor.steps})
        for left_out in adapters if len(adapters) > 1 else ():
            name = suspect.plan.adapters[left_out].name

            def without(segment: Segment, left_out: int = left_out) -> Steps:
                return [(p, o) for p, o in suspect.steps(segment) if p.adapter != left_out]

            yield (
                self._distance(suspect, inputs, without),
                Diagnosis("adapter-ignored", f"the adapter {name} was left out"),
            )
        if len(adapters) > 1:
            reverse = self._distance(suspect, inputs, lambda g: suspect.steps(g)[::-1])
            yield reverse, Diagnosis("adapters-reversed", "the adapters are applied in reverse order")
        if len(suspect.tensor.origins) > 1:
            of_base = [
                (run, suspect.before(run, 0), z)
                for run, _, z in inputs
                if run.stop <= suspect.tensor.origins[0].ref.num_elements
            ]
            if len(of_base) == len(inputs):
                text = "the adapter's weight was not put in place of the base's before it was rotated"
                yield self._distance(suspect, of_base, suspect.steps), Diagnosis("replacement-lost", text)
        if len(others) > _MOST_EXCHANGED:
            return
        for other in others:
            places = {(g.start, g.stop): g for g in other.tensor.segments}
            if any(_ends(run.segment) not in places for run, _, _ in inputs):
                continue
            moved = [(replace(r, segment=places[_ends(r.segment)]), z) for r, _, z in inputs]
            theirs = [(run, other.before(run), z) for run, z in moved]
            text = f"it holds what {other.tensor.name} must be"
            yield self._distance(other, theirs, other.steps), Diagnosis("swapped-layers", text)
            if all(_fit(r.segment, places[_ends(r.segment)]) for r, _, _ in inputs):
                text = f"it is rotated by what belongs to {other.tensor.name}"

                def lent(segment: Segment, other: Suspect = other, places: _Places = places) -> Steps:
                    return other.steps(places[_ends(segment)])

                yield self._distance(suspect, inputs, lent), Diagnosis("swapped-layers", text)

    @staticmethod
    def _distance(suspect: Suspect, inputs: Sequence[_Input], steps: Callable[[Segment], Steps]) -> float:
        """Return |stored - merged and rounded| over a sample."""
        total = 0.0
        for run, x, z in inputs:
            merged = round_once(suspect.after(run, x, steps(run.segment)), suspect.dtype).double()
            total += float(((z.double() - merged) ** 2).sum())
        return math.sqrt(total)


_Input = tuple[Run, Tensor, Tensor]


def _wrong_part(suspect: Suspect, sample: Sequence[Run]) -> tuple[Sequence[Run], str]:
    """Return the runs in those parts of a tensor that are wrong, and what to call these; nothing where all are."""
    rotated = [s for s in suspect.tensor.segments if s.steps]
    places = suspect.comparison.places
    wrong = [s for s in rotated if bool(((places >= s.start) & (places < s.stop)).any())]
    if len(wrong) == len(rotated) or not suspect.comparison.all_places_known:
        return sample, ""
    modules = dict.fromkeys(step.layer.module for segment in wrong for step in segment.steps)
    return [r for r in sample if r.segment in wrong], f"the part of {', '.join(modules)}: "


def _named(rotation: Mistake, scale: Mistake) -> Diagnosis:
    """Return what a pair of variants is called: the rotation's fault comes first."""
    if rotation.finding == "rotation-dropped" and scale.finding == "scale-dropped":
        return Diagnosis("layer-skipped", "it is the base's: the adapter was not applied")
    messages = [v.message for v in (rotation, scale) if v.finding]
    return Diagnosis(rotation.finding or scale.finding, ", and ".join(messages))


_Places = Mapping[tuple[int, int], Segment]


def _ends(segment: Segment) -> tuple[int, int]:
    return segment.start, segment.stop


def _fit(own: Segment, other: Segment) -> bool:
    """Tell whether the steps of one segment could be applied to another."""

    def shape(segment: Segment) -> list[tuple[View, int, int, int | None]]:
        return [(s.view, s.start, s.layer.num_features, s.layer.num_outputs) for s in segment.steps]

    return shape(own) == shape(other)


def half_ulp(z: Tensor) -> Tensor:
    """Return half of the spacing of the dtype's values at ``z``, float64."""
    info = torch.finfo(z.dtype)
    exponent = torch.frexp(z.double().abs().clamp_min(info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exponent, info.eps / 2, dtype=torch.float64), exponent)


def _one_bit(a: Tensor, b: Tensor) -> Tensor:
    """Tell which elements differ by one bit."""
    bits = as_integers(a) ^ as_integers(b)
    return (bits != 0) & ((bits & (bits - 1)) == 0)


def _off(suspect: Suspect, inputs: Sequence[_Input]) -> tuple[float, float]:
    """Return |stored - right| and |right - base| over a sample, both of what is rounded."""
    off = effect = 0.0
    for run, x, z in inputs:
        y = round_once(suspect.after(run, x, suspect.steps(run.segment)), suspect.dtype).double()
        off += _squares(z.double() - y)
        effect += _squares(round_once(x, suspect.dtype).double() - y)
    return math.sqrt(off), math.sqrt(effect)


def _by_rows(suspect: Suspect, inputs: Sequence[_Input]) -> Diagnosis | None:
    """Tell what shows in how stored rows lie to the right ones and the base's; None where nothing does."""
    step = inputs[0][0].segment.steps[0]
    if step.view is not View.INPUT:
        return None
    width = step.layer.num_features
    x, y, z = (
        torch.cat([v.view(-1, width) for v in values])
        for values in zip(
            *((x, suspect.after(run, x, suspect.steps(run.segment)), z.double()) for run, x, z in inputs), strict=True
        )
    )
    if not z.any():
        return Diagnosis("wrong-values", "it is all zeros")
    tolerance = 2 * torch.finfo(suspect.dtype).eps + _MARGIN * suspect.amplification(inputs[0][0].segment) * _FLOAT32
    length = torch.linalg.vector_norm(y, dim=1)
    right = torch.linalg.vector_norm(z - y, dim=1) <= tolerance * length
    same = torch.linalg.vector_norm(z - x, dim=1) <= tolerance * length
    if (right | same).all() and same.any():
        return Diagnosis("part-skipped", f"{int(same.sum())} of {len(x)} rows looked at are the base's")
    change, error = y - x, z - y
    along = float((error * change).sum() / (change * change).sum().clamp_min(1e-300))
    if _squares(error - along * change) <= _squares(error) / _CLOSER**2:
        return Diagnosis("part-way", f"it goes {1 + along:.0%} of the way from the base")
    cosine = torch.nn.functional.cosine_similarity(z, y, dim=1)
    longer = (torch.linalg.vector_norm(z, dim=1) / length - 1).abs() > tolerance
    if (1 - cosine.abs() <= tolerance**2).all() and 2 * int((longer | (cosine < 0)).sum()) > len(z):
        return Diagnosis("wrong-scale", "its rows are rotated as they must be, and have other lengths or signs")
    return None


def _low_precision(suspect: Suspect, inputs: Sequence[_Input]) -> Diagnosis | None:
    """Tell whether what is stored is as far off as a merge in 16-bit arithmetic, done here, is."""
    off = effect = along = 0.0
    by_dtype = dict.fromkeys(_LOW, 0.0)
    for run, x, z in inputs:
        steps = suspect.steps(run.segment)
        y = suspect.after(run, x, steps)
        off += _squares(z.double() - y)
        effect += _squares(y - x)
        along += float(((z.double() - y) * (y - x)).sum())
        for dtype in _LOW:
            by_dtype[dtype] += _squares(_in_dtype(run, x, steps, dtype) - y) + _squares(half_ulp(z)) / 3
    # Nearer to the base than to the right merge it could be anything, and what lies on the way there is no noise.
    if off > effect / 4 or along**2 > off * effect / 4:
        return None
    for dtype, expected in by_dtype.items():
        if off <= _LOW_MARGIN * expected:
            name = str(dtype).removeprefix("torch.")
            text = f"it is off by {math.sqrt(off / effect):.1%} of its change, as a merge in {name} arithmetic is"
            return Diagnosis("low-precision", text)
    return None


# Narrow arithmetic that merges are done in, the finest first.
_LOW = (torch.float16, torch.bfloat16)
# Such merges differ in how often they round: in squares.
_LOW_MARGIN = 9.0


def _in_dtype(run: Run, x: Tensor, steps: Steps, dtype: torch.dtype) -> Tensor:
    """Return steps applied in narrow arithmetic: operators and each result are rounded to ``dtype``."""
    y = x.to(dtype)
    for step, operator in steps:
        narrow = tuple(replace(f, blocks=f.blocks.to(dtype).double()) for f in operator.rotation.factors)
        scale = None if operator.scale is None else operator.scale.to(dtype).double()
        lone = replace(operator, rotation=Rotation(narrow), scale=None)
        y = _applied(run, y, step, lone).to(dtype)
        if scale is not None:
            y = _applied(run, y, step, replace(without_rotation(operator), scale=scale)).to(dtype)
    return y.double()


def _applied(run: Run, x: Tensor, step: Step, operator: LayerOperator) -> Tensor:
    return unrounded([(x, 1.0)], [(step, operator)], run.start, compute=torch.float64, device=torch.device("cpu"))[1]


def _by_inner_products(suspect: Suspect, sample: Sequence[Run]) -> Diagnosis:
    """Tell a rotation of this base by something else from what has nothing to do with this base.

    Rotated and scaled rows keep the angles between them.
    """
    rows: list[Tensor] = []
    stored: list[Tensor] = []
    for run in sample:
        if run.segment.steps[0].view is View.INPUT and len(rows) < _ROWS:
            width = run.segment.steps[0].layer.num_features
            rows.append(suspect.before(run).view(-1, width))
            stored.append(suspect.stored(run).double().view(-1, width))
    text = "it is neither the merge of this base and this adapter nor one with a known mistake"
    if not rows:
        return Diagnosis("wrong-values", text)
    a, b = (torch.nn.functional.normalize(torch.cat(x)[:_ROWS]) for x in (rows, stored))
    change = float(torch.linalg.matrix_norm(b @ b.T - a @ a.T) / torch.linalg.matrix_norm(a @ a.T))
    if len(a) < 2 or not math.isfinite(change):
        return Diagnosis("wrong-values", text)
    if change < max(4 * torch.finfo(suspect.dtype).eps, 1e-4):
        return Diagnosis("other-adapter", "it is this base, rotated or scaled by something else than this adapter")
    return Diagnosis(
        "other-base", "the angles between its rows are not this base's: it was made from another base, or damaged"
    )


def _squares(x: Tensor) -> float:
    return float((x**2).nansum())


def _place(suspect: Suspect) -> str:
    """Return the place of the first wrong element, by its index."""
    place = int(suspect.comparison.places[0])
    index = []
    for size in reversed(suspect.tensor.shape):
        place, i = divmod(place, size)
        index.append(i)
    return f"[{', '.join(map(str, reversed(index)))}]"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("" if number == 1 else "s")
