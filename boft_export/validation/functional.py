"""Does the merged model compute what base and adapter do? Both are run, and what comes out is compared.

How far apart two right models may be is not fixed but measured: the reference is run again with its adapted weights off
by random rounding errors of the size that storing the merge makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from boft_export.checkpoint.folder import open_checkpoint
from boft_export.checkpoint.places import local_path
from boft_export.errors import UsageError
from boft_export.models.inputs import Batch, FunctionalInputs, make_batches
from boft_export.models.loading import (
    BrokenMergeError,
    CannotTellError,
    LoadedModel,
    load_merged,
    load_plan,
    model_errors,
    quiet_transformers,
)
from boft_export.models.reference import Reference, load_reference
from boft_export.pipeline.allocator import keep_tiles_free_chunks
from boft_export.pipeline.devices import resolve_devices
from boft_export.pipeline.torch_io import torch_device
from boft_export.planning import FoldPlan
from boft_export.planning.model import Action
from boft_export.validation.model import Check, FunctionalFacts, Number, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECK, _FINDING = "functional", "functional-difference"
_CONTROLS = 3
# Bits of a dtype's fraction, the leading one included, and the exponent of its smallest step. The reference computes
# in float32, and its own errors are some float32 steps, so that is what its noise is at least.
_PRECISION = {"F64": (22, -149), "F32": (22, -149), "BF16": (8, -133), "F16": (11, -24)}
_ARITHMETIC = 1e-6
# Elements that are perturbed at once, and predictions kept in all.
_CHUNK = 1 << 24
_PREDICTIONS = 512


@dataclass(frozen=True)
class FunctionalLimits:
    """What the comparison must hold.

    Attributes:
        noise_factor: The largest difference may be this many times the noise.
        max_kl: The largest KL divergence, in nats; None for no limit.
        min_top1: The least share of predictions with the same first choice; None for no limit.
        min_cosine: The least cosine of a pair of outputs; None for no limit.
    """

    noise_factor: float = 4.0
    max_kl: float | None = None
    min_top1: float | None = None
    min_cosine: float | None = None


@dataclass(frozen=True)
class Outputs:
    """What a model made of all inputs.

    Attributes:
        kind: ``logits`` or ``embeddings``.
        parts: For each input and output its rows, each a prediction or a token's embedding, float32 on the CPU.
    """

    kind: str
    parts: tuple[Tensor, ...]


def check_functional(
    plan: FoldPlan,
    merged: Path,
    inputs: FunctionalInputs | None = None,
    limits: FunctionalLimits | None = None,
    *,
    device: str = "auto",
) -> tuple[FunctionalFacts | None, list[Check]]:
    """Compare models as ``compare_functional`` does, and judge what was found, or that nothing could be.

    Raises:
        UsageError: If transformers is not installed, or there is no such device.
        InputError: If the inputs can't be read.
        ResourceError: If memory does not suffice.
    """
    try:
        facts = compare_functional(plan, merged, inputs or FunctionalInputs(), device=device)
    except CannotTellError as error:
        return None, [Check(_CHECK, "", Outcome.INCONCLUSIVE, error.message, hint=error.hint)]
    except BrokenMergeError as error:
        return None, [Check(_CHECK, "", Outcome.FAIL, error.message, finding="functional-broken", hint=error.hint)]
    return facts, functional_checks(facts, limits or FunctionalLimits())


def compare_functional(
    plan: FoldPlan, merged: Path, inputs: FunctionalInputs, *, device: str = "auto"
) -> FunctionalFacts:
    """Run the merged model and base plus adapters, one in memory at a time, and compare what comes out.

    Args:
        plan: The plan of the merge: base and adapters.
        merged: The merged checkpoint's folder.
        inputs: What to run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CannotTellError: If models of this kind can't be run and compared here.
        BrokenMergeError: If base and adapter run, and the merged model does not.
        UsageError: If transformers is not installed, or there is no such device.
        InputError: If the inputs can't be read.
        ResourceError: If memory does not suffice.
    """
    try:
        place = torch_device(resolve_devices(device)[0])
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    checkpoint = open_checkpoint(merged)
    folder = local_path(checkpoint.root, "running a model") / checkpoint.folder
    # What one model held goes back to the system before the next is loaded, on other threads.
    keep_tiles_free_chunks()
    rounding = _Rounding.of(plan, {n: t.dtype for n, t in checkpoint.tensors.items()})
    with (
        quiet_transformers(),
        torch.no_grad(),
        torch.random.fork_rng(devices=[place] if place.type == "cuda" else []),
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
    ):
        reference = load_reference(plan, place)
        batches = make_batches(inputs, reference.model, folder)
        expected = _run(reference.model, batches, place)
        reference.check_all_ran()
        scale = max(float(p.abs().max()) for p in expected.parts)
        if not math.isfinite(scale):
            raise CannotTellError("base and adapter give numbers that are not finite.")
        noise = [_difference(expected, o) for o in _controls(reference, rounding, batches, place)]
        _free(reference.model)
        base = load_plan(plan, place, tuned=False).model
        effect = _difference(expected, _run(base, batches, place))
        _free(base)
        actual = _run_merged(load_merged(folder, place), reference.missing, batches, place)
    if actual.kind != expected.kind or [p.shape for p in actual.parts] != [p.shape for p in expected.parts]:
        raise BrokenMergeError(f"{merged} gives outputs of another shape than base and adapter.")
    classes = expected.kind == "logits" and all(p.shape[-1] > 1 for p in expected.parts)
    return FunctionalFacts(
        reference=reference.kind,
        inputs=inputs.kind,
        samples=sum(len(next(iter(b.arguments.values()))) for b in batches),
        outputs=expected.kind,
        largest_difference=_difference(expected, actual),
        noise=max(*noise, _ARITHMETIC * scale),
        effect=effect,
        kl_divergence=_kl_divergence(expected, actual) if classes else None,
        top1_agreement=_agreement(expected, actual) if classes else None,
        smallest_cosine=_smallest_cosine(expected, actual),
    )


def functional_checks(facts: FunctionalFacts, limits: FunctionalLimits) -> list[Check]:
    """Judge a comparison: one check of the difference, and one of each limit that is set."""
    allowed = limits.noise_factor * facts.noise
    difference = facts.largest_difference
    measured = {"largest_difference": difference, "noise": facts.noise, "effect": facts.effect}
    told = (
        f"{facts.outputs} differ by {difference:.3g}; rounding makes {facts.noise:.3g}, the adapter {facts.effect:.3g}"
    )
    bound: dict[str, Number] = {"largest_difference": allowed}
    if not difference <= allowed:
        hint = "The merged model is not base and adapter: the other checks may tell where. Merge again."
        first = Check(_CHECK, "", Outcome.FAIL, told, finding=_FINDING, hint=hint, measured=measured, limits=bound)
    elif facts.effect <= allowed:
        message = f"the adapter's effect is within rounding, so this can't tell: {told}"
        hint = "Try other inputs, or a merge in float32."
        first = Check(_CHECK, "", Outcome.INCONCLUSIVE, message, hint=hint, measured=measured, limits=bound)
    else:
        first = Check(_CHECK, "", Outcome.PASS, told, measured=measured, limits=bound)
    checks = [first]
    for name, value, limit, sign in (
        ("kl_divergence", facts.kl_divergence, limits.max_kl, 1),
        ("top1_agreement", facts.top1_agreement, limits.min_top1, -1),
        ("smallest_cosine", facts.smallest_cosine, limits.min_cosine, -1),
    ):
        if limit is None:
            continue
        if value is None:
            outcome, message = Outcome.INCONCLUSIVE, f"there is no {name} without logits over classes"
        else:
            outcome = Outcome.FAIL if sign * value > sign * limit else Outcome.PASS
            message = f"{name} is {value:.6g}, the {'most' if sign > 0 else 'least'} allowed {limit:.6g}"
        finding = _FINDING if outcome is Outcome.FAIL else None
        checks.append(
            Check(_CHECK, "", outcome, message, finding=finding, measured={name: value}, limits={name: limit})
        )
    return checks


# Running


def _run(model: PreTrainedModel, batches: Sequence[Batch], device: torch.device) -> Outputs:
    """Run a model on all batches.

    Raises:
        CannotTellError: If it does not run, or gives nothing that can be compared.
    """
    kept = max(1, _PREDICTIONS // sum(len(next(iter(b.arguments.values()))) for b in batches))
    kinds, parts = set(), []
    for batch in batches:
        # Some models draw random numbers even when they are not trained.
        torch.manual_seed(0)
        with model_errors(CannotTellError, f"{type(model).__name__} does not run on these inputs"):
            result = model(**{k: v.to(device) for k, v in batch.arguments.items()}, return_dict=True)
        values = {k: v for k, v in result.items() if isinstance(v, Tensor)}
        logits = {k: v for k, v in values.items() if "logits" in k}
        chosen = logits or {
            k: v for k, v in values.items() if k == "last_hidden_state" or k.endswith(("_output", "_embeds"))
        }
        kinds.add("logits" if logits else "embeddings")
        for name, value in chosen.items():
            parts += [_thin(p, kept if logits else len(p)).float().cpu() for p in _rows(name, value, batch.mask)]
    if not parts:
        raise CannotTellError(f"{type(model).__name__} gives neither logits nor embeddings.")
    return Outputs(kinds.pop(), tuple(parts))


def _rows(name: str, value: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Take an output apart into each input's rows, without those of padding.

    Args:
        name: Its name.
        value: Shape (inputs, features), (inputs, tokens, features), or (inputs, features, height, width).
        mask: The tokens that count, shape (inputs, tokens).
    """
    if value.ndim == 4:
        value = value.flatten(2).mT
    if value.ndim == 2 and name in {"start_logits", "end_logits"}:
        return [row[m][None] for row, m in zip(value, mask, strict=True)] if mask is not None else list(value[:, None])
    if value.ndim == 3 and mask is not None and value.shape[:2] == mask.shape:
        return [row[m] for row, m in zip(value, mask.to(value.device), strict=True)]
    return [row.reshape(-1, row.shape[-1]) for row in (value if value.ndim > 1 else value[:, None])]


def _thin(rows: Tensor, count: int) -> Tensor:
    """Return at most ``count`` rows, evenly spread, the last one among them."""
    if len(rows) <= count:
        return rows
    return rows[torch.linspace(len(rows) - 1, 0, count).round().long()]


def _run_merged(
    loaded: LoadedModel, missing: frozenset[str], batches: Sequence[Batch], device: torch.device
) -> Outputs:
    """Run the merged model.

    Raises:
        BrokenMergeError: If it lacks parameters, does not run, or gives numbers that are not finite.
    """
    if lacking := sorted(loaded.missing - missing):
        raise BrokenMergeError(
            f"{len(lacking)} parameters of the merged model are not in its files, the first: {lacking[0]}."
        )
    try:
        outputs = _run(loaded.model, batches, device)
    except CannotTellError as error:
        raise BrokenMergeError(f"the merged model fails where base and adapter run: {error.message}") from error
    if bad := sum(int((~torch.isfinite(p)).sum()) for p in outputs.parts):
        raise BrokenMergeError(
            f"{bad} of {sum(p.numel() for p in outputs.parts)} outputs of the merged model are not finite."
        )
    return outputs


def _free(model: PreTrainedModel) -> None:
    """Give a model's memory back, whoever still holds the model."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Noise


@dataclass(frozen=True)
class _Rounding:
    """How a merge stores what it changes.

    Attributes:
        bits: Of the fraction, the leading one included.
        smallest: The exponent of the smallest step.
        everywhere: Whether it also stores what no adapter touches in fewer bits than the base has.
    """

    bits: int
    smallest: int
    everywhere: bool

    @classmethod
    def of(cls, plan: FoldPlan, stored: Mapping[str, str]) -> _Rounding:
        """Tell it from the dtypes of a merged checkpoint's tensors, by name.

        Raises:
            CannotTellError: If it holds a dtype whose rounding is not known.
        """
        floats = {n: d for n, d in stored.items() if d.startswith(("F", "BF"))}
        if strange := next((n for n, d in floats.items() if d not in _PRECISION), None):
            raise CannotTellError(f"{strange} is stored as {floats[strange]}, whose rounding is not known here.")
        narrowest = min(floats.values(), key=lambda d: _PRECISION[d], default="F32")
        changed: list[str] = []
        narrowed: list[str] = []
        for tensor in plan.tensors:
            dtype = floats.get(tensor.name, narrowest)
            if tensor.action not in {Action.COPY, Action.CONVERT}:
                changed.append(dtype)
            elif _PRECISION[dtype] < _PRECISION.get(tensor.source.dtype, (0, 0)):
                narrowed.append(dtype)
        bits, smallest = min((_PRECISION[d] for d in (*changed, *narrowed)), default=_PRECISION["F32"])
        return cls(bits, smallest, bool(narrowed))

    def errors(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Return random errors, each up to half a step of the dtype at its value."""
        exponents = torch.frexp(values).exponent - self.bits
        steps = torch.ldexp(torch.ones_like(values), exponents.clamp_(min=self.smallest))
        drawn = torch.rand(values.shape, generator=generator, device=values.device, dtype=values.dtype)
        return drawn.sub_(0.5).mul_(steps)


def _controls(
    reference: Reference, rounding: _Rounding, batches: Sequence[Batch], device: torch.device
) -> Iterator[Outputs]:
    """Yield what the reference makes of the inputs under random rounding errors of its weights, some times over."""
    chosen = list(reference.model.parameters()) if rounding.everywhere else reference.weights
    weights = list({w.data_ptr(): w for w in chosen if w.is_floating_point()}.values())
    for seed in range(_CONTROLS):
        for sign in (1, -1):
            generator = torch.Generator(device).manual_seed(seed)
            for chunk in (c for w in weights for c in torch.split(w.view(-1), _CHUNK)):
                chunk.add_(rounding.errors(chunk, generator), alpha=sign)
            if sign > 0:
                yield _run(reference.model, batches, device)


# Comparing


def _difference(one: Outputs, other: Outputs) -> float:
    """Return the largest difference of any element."""
    return max(float((a - b).abs().max()) for a, b in zip(one.parts, other.parts, strict=True))


def _kl_divergence(one: Outputs, other: Outputs) -> float:
    """Return the largest KL(one | other) of a row, in nats."""
    largest = 0.0
    for a, b in zip(one.parts, other.parts, strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        largest = max(largest, float((p.exp() * (p - q)).sum(-1).max()))
    return largest


def _agreement(one: Outputs, other: Outputs) -> float:
    """Return the share of rows whose largest element is the same one."""
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(one.parts, other.parts, strict=True)]
    return float(torch.cat(same).double().mean())


def _smallest_cosine(one: Outputs, other: Outputs) -> float:
    """Return the smallest cosine of a row of logits, or of an input's embeddings, averaged over its tokens."""
    smallest = 1.0
    for a, b in zip(one.parts, other.parts, strict=True):
        x, y = (p.double() if one.kind == "logits" else p.double().mean(0, keepdim=True) for p in (a, b))
        lengths = x.norm(dim=-1) * y.norm(dim=-1)
        # Two rows of zeros are the same; one of them alone has no direction.
        cosines = torch.where(lengths > 0, (x * y).sum(-1) / lengths, (x == y).all(-1).double())
        smallest = min(smallest, float(cosines.min()))
    return smallest
