"""What a validation says: checks with their outcomes, and what was measured of each layer and tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from boft_export.errors import Level

Number = float | int | None


class Outcome(StrEnum):
    """How a check ended."""

    PASS = "pass"  # noqa: S105  # an outcome, no password
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    """It could not be told; the check's message says why."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    Attributes:
        check: What was checked, by a fixed name: ``orthogonality``, ``replay``.
        subject: The layer, tensor or file it is about; empty for the whole.
        outcome: How it ended.
        message: What was found, in a sentence, without the subject.
        level: How bad a failure is.
        finding: What is wrong, by a fixed name such as ``scale-dropped``; None where nothing is.
        hint: The next step.
        measured: What was measured, by name.
        limits: What it was compared with, by the name of what was measured.
    """

    check: str
    subject: str
    outcome: Outcome
    message: str
    level: Level = Level.ERROR
    finding: str | None = None
    hint: str | None = None
    measured: Mapping[str, Number] = field(default_factory=dict)
    limits: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerFacts:
    """An adapter layer's rotation R, measured in float64.

    Attributes:
        module: Its name in the model that was trained.
        adapter: The adapter's number.
        num_features: The size n of R.
        num_factors: The number m of factors.
        block_size: The size b of a trained block.
        group_size: The features that are coupled: R is block-diagonal in groups of this size.
        residual: max |R^T R - I|.
        residual_norm: The Frobenius norm of R^T R - I.
        expected_residual: The residual that the parametrisation has by design: 0 for the Cayley transform.
        determinant: det R; its sign is exact.
        smallest_singular_value: Of R.
        largest_singular_value: Of R.
        angles: The angles in radians by which R turns its planes, 0 to pi: the quantiles 0, 5, ... 100 %.
        smallest_scale: Of the output scales; None without scales.
        largest_scale: Of the output scales.
    """

    module: str
    adapter: int
    num_features: int
    num_factors: int
    block_size: int
    group_size: int
    residual: float
    residual_norm: float
    expected_residual: float
    determinant: float
    smallest_singular_value: float
    largest_singular_value: float
    angles: tuple[float, ...]
    smallest_scale: float | None
    largest_scale: float | None


@dataclass(frozen=True)
class TensorFacts:
    """A tensor of a merged checkpoint, compared with what it must be.

    Attributes:
        name: Its name.
        action: What a merge does to it: ``copy``, ``convert``, ``fold``, ``replace`` or ``add``; without an adapter,
            what was found to be done: ``identical``, ``rotation``, ``scale``, ``replacement``, ...
        dtype: Its dtype in the merged checkpoint.
        shape: Its shape.
        wrong: Elements that are not the correctly rounded value; None where that can't be told.
        largest_ulp: By how many steps of the dtype the worst one is off.
        relative_change: |W' - W| / |W| of the exact merge; None where nothing changes.
        rounding_loss: |rounding error| / |W' - W|.
        residual: Without an adapter: how far the Gram matrix of its rows is from that of a rotated base, relative.
        noise: Without an adapter: what rounding alone makes of ``residual``.
    """

    name: str
    action: str
    dtype: str
    shape: tuple[int, ...]
    wrong: int | None = None
    largest_ulp: int | None = None
    relative_change: float | None = None
    rounding_loss: float | None = None
    residual: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class FunctionalFacts:
    """The merged model's outputs beside those of base and adapter.

    Attributes:
        reference: What applied the adapter: ``peft``, or ``hooks`` of our own that rotate activations, or ``hooks and
            rotated kernels`` where convolutions larger than 1x1 are adapted.
        inputs: What was run: ``random``, ``text`` or ``images``.
        samples: How many inputs.
        outputs: What was compared: ``logits`` or ``embeddings``.
        largest_difference: Of any element.
        noise: The same, of a reference whose adapted weights are off by random rounding errors.
        effect: The same, of the base without the adapter.
        kl_divergence: Largest KL(reference | merged) of a prediction, in nats; None without logits over classes.
        top1_agreement: Share of predictions with the same first choice; None without logits over classes.
        smallest_cosine: Of any pair of outputs.
    """

    reference: str
    inputs: str
    samples: int
    outputs: str
    largest_difference: float
    noise: float
    effect: float
    kl_divergence: float | None
    top1_agreement: float | None
    smallest_cosine: float


@dataclass(frozen=True)
class Validation:
    """A finished validation.

    Attributes:
        adapters: The adapters' names.
        base: The base's name; None where there was none.
        merged: The merged checkpoint's name; None where there was none.
        checks: All checks in order.
        layers: Each adapter layer's rotation.
        tensors: Each tensor of the merged checkpoint that was compared.
        functional: The models' outputs compared; None where they were not.
        fail_on: What fails the whole: ``error`` always, and with it ``warning``, ``inconclusive``.
        onnx: The name of the folder with ONNX graphs; None where there was none.
    """

    adapters: tuple[str, ...]
    base: str | None
    merged: str | None
    checks: tuple[Check, ...]
    layers: tuple[LayerFacts, ...] = ()
    tensors: tuple[TensorFacts, ...] = ()
    functional: FunctionalFacts | None = None
    fail_on: frozenset[str] = frozenset({"error"})
    onnx: str | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that fail the whole."""
        return tuple(c for c in self.checks if self.fails(c))

    def fails(self, check: Check) -> bool:
        """Tell whether a check fails the whole."""
        if check.outcome is Outcome.INCONCLUSIVE:
            return "inconclusive" in self.fail_on
        return check.outcome is Outcome.FAIL and (check.level is Level.ERROR or "warning" in self.fail_on)

    @property
    def outcome(self) -> Outcome:
        """How the whole ended: failed, or inconclusive where all that passed is that something could not be told."""
        if self.failures:
            return Outcome.FAIL
        undecided = any(c.outcome is Outcome.INCONCLUSIVE for c in self.checks)
        return Outcome.INCONCLUSIVE if undecided else Outcome.PASS
