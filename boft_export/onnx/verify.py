"""Proving a graph: its outputs in ONNX Runtime beside those of the PyTorch model with base and adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import CheckFailedError, Level, Notice
from boft_export.models.loading import CannotTellError, load_plan, model_errors
from boft_export.models.mapped import MappedWeights
from boft_export.onnx.limits import LIMITS, Limits, graph_kind
from boft_export.onnx.reference import load_expected
from boft_export.onnx.rounded import Rounded
from boft_export.onnx.session import Session, check_runs
from boft_export.onnx.skeleton import model_class
from boft_export.onnx.tasks import Compared, RunGraph, Task, Tensors
from boft_export.pipeline.allocator import give_back_freed
from boft_export.pipeline.engine import Engine
from boft_export.planning import FoldPlan
from boft_export.planning.strength import Course

# Bytes of weights up to which ONNX Runtime may make of them what it does by default, in memory.
_SMALL = 256 << 20
_SEED = 0


@dataclass(frozen=True)
class Agreement:
    """How an output compares with the model's on all cases.

    Attributes:
        output: Its name.
        cases: How many cases it was compared on.
        largest_difference: Of any element.
        mean_difference: Of all elements.
        largest_magnitude: Of the model's own.
        smallest_cosine: Of any row.
        mean_cosine: Of all rows.
        top1_agreement: The share of rows with the same largest element.
        worst_case: The case with the largest difference.
        providers: What ran the graph.
        kind: What the graph computes in: ``float32``, ``float16``, ``bfloat16``, ``int8`` or ``int4``.
        reference: What the model is: ``base`` alone, or with the adapters applied by ``peft``, ``hooks`` or ``hooks and
            rotated kernels``, or ``folded weights``.
        constants_folded: Whether the runtime optimised the graph as it does by default.
        rounding: What is the largest share for the model itself, where each operator's result is rounded to what the
            graph computes in; 0 where that was not looked at.
    """

    output: str
    cases: int
    largest_difference: float
    mean_difference: float
    largest_magnitude: float
    smallest_cosine: float
    mean_cosine: float
    top1_agreement: float
    worst_case: str
    providers: tuple[str, ...]
    kind: str = "float32"
    reference: str = "base"
    constants_folded: bool = True
    rounding: float = 0.0

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        return self.largest_difference / self.largest_magnitude if self.largest_magnitude else self.largest_difference

    def allowed(self, limits: Limits) -> float:
        """Return the largest relative difference that is within the limits."""
        return max(limits.largest, limits.roundings * self.rounding)

    def beyond(self, limits: Limits) -> str | None:
        """Return what is beyond the limits, in words; None if nothing is."""
        allowed = self.allowed(limits)
        if not self.relative_difference <= allowed:
            return (
                f"differs from the model's by {self.largest_difference:.3g}, {self.relative_difference:.1e} of the "
                f"largest, and at most {allowed:.0e} is rounding in {self.kind}; the worst: {self.worst_case}"
            )
        if not self.smallest_cosine >= limits.cosine:
            return f"has a cosine of {self.smallest_cosine:.4f} with the model's, {limits.cosine:g} is the least"
        if not self.mean_cosine >= limits.mean_cosine:
            return f"has a mean cosine of {self.mean_cosine:.4f} with the model's, {limits.mean_cosine:g} is the least"
        if not self.top1_agreement >= limits.top1:
            return f"has the model's first choice in {self.top1_agreement:.0%} of rows, {limits.top1:.0%} is the least"
        return None

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "providers": list(self.providers), "relative_difference": self.relative_difference}


@dataclass(frozen=True)
class Verification:
    """A finished comparison.

    Attributes:
        agreements: How each output compares.
        limits: What they were held to.
        notices: What there is to say of the comparison itself.
    """

    agreements: tuple[Agreement, ...]
    limits: Limits
    notices: tuple[Notice, ...]


def verify(
    plan: FoldPlan,
    task: Task,
    folder: Path,
    course: Course,
    engine: Engine,
    *,
    scratch: Path,
    device: str = "cpu",
    limits: Mapping[str, Limits] = LIMITS,
) -> Verification:
    """Compare a folder's graphs with the model, and refuse those that differ.

    Args:
        plan: Base and adapters.
        task: What the graphs are for.
        folder: Where they are.
        course: How far the adapters go.
        engine: How weights are folded where only that tells what they must be.
        scratch: A folder for what has to be on disk meanwhile.
        device: Where the graphs run: on the CPU, unless this begins with ``cuda``.
        limits: How far outputs may differ, by what a graph computes in.

    Raises:
        CheckFailedError: If they differ by more than rounding, or don't run.
        CannotTellError: If the model can't be run here.
    """
    found = compare(plan, task, folder, course, engine, scratch=scratch, device=device, limits=limits)
    for agreement in found.agreements:
        if (told := agreement.beyond(found.limits)) is not None:
            raise CheckFailedError(
                f"{agreement.output} of the graph {told}. Nothing was published.",
                hint="Another --task may be what the model is for. If not, this is worth a report.",
            )
    return found


def compare(
    plan: FoldPlan,
    task: Task,
    folder: Path,
    course: Course,
    engine: Engine,
    *,
    scratch: Path,
    device: str = "cpu",
    limits: Mapping[str, Limits] = LIMITS,
) -> Verification:
    """Compare a folder's graphs with the model; arguments as of ``verify``.

    Raises:
        CheckFailedError: If what comes out is not finite, or of another shape, or the graphs don't run.
        CannotTellError: If the model can't be run here.
    """
    # What tracing and folding held.
    give_back_freed()
    runner = _Runner(folder, device)
    kind = model_class(plan, task)
    with MappedWeights(scratch) as weights, torch.no_grad():
        expected = load_expected(plan, course, engine, weights, kind)
        found: dict[str, list[Compared]] = {}
        for compared in task.compare(expected.model, runner.run, _SEED):
            _check(compared)
            found.setdefault(compared.output, []).append(compared)
        held = limits[runner.kind]
        roundings = _roundings(task, expected.model, runner, found) if held.roundings else {}
        agreements = tuple(
            replace(runner.agreement(cases, expected.kind), rounding=roundings.get(name, 0.0))
            for name, cases in found.items()
        )
        notices = runner.notices()
        if plan.adapters and any(a for t in plan.tensors for a in course.variants[0].strength.of(t.name)):
            del expected
            # Mapped anew, as rotated kernels are in the pages of the model's own.
            with contextlib.suppress(CannotTellError), MappedWeights(scratch) as anew:
                base = load_plan(plan, torch.device("cpu"), tuned=False, read=anew.read, kind=kind).model
                notices += _visibility(task, base, runner, held, roundings)
    return Verification(agreements, held, notices)


class _Outputs(dict[str, Tensor]):
    """A graph's outputs by name.

    Args:
        graph: The graph's file.
        found: What came out.
    """

    def __init__(self, graph: str, found: Tensors) -> None:
        super().__init__(found)
        self._graph = graph

    def __missing__(self, name: str) -> Tensor:
        """Refuse what the graph doesn't give."""
        raise CheckFailedError(
            f"{self._graph} gives no {name}, expected for this task, but {', '.join(list(self)[:4])}.",
            hint="Another task may be what it was exported for.",
        )


class _Runner:
    """Runs a folder's graphs, and keeps what came out.

    Args:
        folder: Where they are.
        device: Where to run them: on the CPU, unless this begins with ``cuda``.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = "cuda" if device.startswith("cuda") else "cpu"
        self._fold_constants = sum(f.stat().st_size for f in folder.glob("*.onnx*")) <= _SMALL
        self._sessions: dict[str, Session] = {}
        self._kinds: list[str] = []
        self._outputs: list[Tensors] = []

    @property
    def kind(self) -> str:
        """What the graphs compute in: of several, the coarsest."""
        return max(self._kinds, key=list(LIMITS).index, default="float32")

    def run(self, name: str, inputs: Tensors) -> Tensors:
        """Run a graph."""
        path = self._folder / f"{name}.onnx"
        if name not in self._sessions:
            self._kinds.append(kind := graph_kind(path))
            check_runs(kind)
        with model_errors(CheckFailedError, f"ONNX Runtime can't run {path.name}"):
            if name not in self._sessions:
                # Nothing but CUDA runs bfloat16.
                device = "cuda" if self.kind == "bfloat16" else self._device
                self._sessions[name] = Session(path, device, fold_constants=self._fold_constants)
            self._outputs.append(_Outputs(path.name, self._sessions[name].run(inputs)))
        return self._outputs[-1]

    def replay(self) -> RunGraph:
        """Return what gives the same outputs in the same order once more."""
        outputs = iter(self._outputs)
        return lambda _name, _inputs: next(outputs)

    def notices(self) -> tuple[Notice, ...]:
        """Tell where the runtime was asked for something else than it did."""
        ran = self._providers()
        found: tuple[Notice, ...] = ()
        if self._device == "cuda" and "CUDAExecutionProvider" not in ran:
            message = f"ONNX Runtime ran on {', '.join(ran)}, without CUDA"
            found += (Notice(Level.WARNING, "no-cuda-provider", "", message, 'pip install "boft-export[onnx-gpu]"'),)
        if idle := sorted(p.name for p in self._folder.glob("*.onnx") if p.stem not in self._sessions):
            message = f"{', '.join(idle)} beside what the task has was not run"
            found += (Notice(Level.WARNING, "not-run", idle[0], message, "Keep it in a folder of its own."),)
        return found

    def agreement(self, cases: Sequence[Compared], reference: str) -> Agreement:
        """Return how an output compares on all cases."""
        return _agreement(cases, self._providers(), self.kind, reference, constants_folded=self._fold_constants)

    def _providers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(p for s in self._sessions.values() for p in s.providers))


def _check(case: Compared) -> None:
    """See that outputs can be compared.

    Raises:
        CheckFailedError: If not.
    """
    if case.expected.shape != case.actual.shape:
        shapes = f"{tuple(case.actual.shape)}, the model's {tuple(case.expected.shape)}"
        raise CheckFailedError(f"{case.output} of the graph is {shapes}, on {case.case}.")
    for whose, values in (("the model", case.expected), ("the graph", case.actual)):
        if bad := int((~torch.isfinite(_rows(values, case.counts))).sum()):
            raise CheckFailedError(
                f"{bad} of {values.numel()} values in {case.output} of {whose} are not finite, on {case.case}.",
                hint="Look for damaged weights, or export with --dtype float32.",
            )


def _rows(values: Tensor, counts: Tensor | None) -> Tensor:
    """Return the rows of an output that count, float64."""
    return (values.reshape(-1, values.shape[-1]) if counts is None else values[counts]).double()


def _agreement(
    cases: Sequence[Compared], providers: tuple[str, ...], kind: str, reference: str, *, constants_folded: bool
) -> Agreement:
    largest = total = magnitude = 0.0
    elements = rows = same = 0
    cosine, cosines, worst = 1.0, 0.0, cases[0].case
    for case in cases:
        expected, actual = _rows(case.expected, case.counts), _rows(case.actual, case.counts)
        if not expected.numel():
            continue
        difference = (expected - actual).abs()
        if not float(difference.max()) <= largest:
            largest, worst = float(difference.max()), case.case
        total += float(difference.sum())
        elements += difference.numel()
        magnitude = max(magnitude, float(expected.abs().max()))
        # Two rows of zeros are the same; one of them alone has no direction.
        zeros = (expected == 0).all(-1) & (actual == 0).all(-1)
        directions = torch.cosine_similarity(expected, actual, dim=-1).masked_fill(zeros, 1.0)
        cosine, cosines = min(cosine, float(directions.min())), cosines + float(directions.sum())
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        rows += len(expected)
    if not rows:
        raise CheckFailedError(f"no row of {cases[0].output} could be compared.")
    return Agreement(
        output=cases[0].output,
        cases=len(cases),
        largest_difference=largest,
        mean_difference=total / elements,
        largest_magnitude=magnitude,
        smallest_cosine=cosine,
        mean_cosine=cosines / rows,
        top1_agreement=same / rows,
        worst_case=worst,
        providers=providers,
        kind=kind,
        reference=reference,
        constants_folded=constants_folded,
    )


def _roundings(
    task: Task, model: nn.Module, runner: _Runner, found: Mapping[str, Sequence[Compared]]
) -> dict[str, float]:
    """Return how far each output is from itself where the model rounds as the graph does."""
    with Rounded(getattr(torch, runner.kind)):
        rounded = list(task.compare(model, runner.replay(), _SEED))
    moved = {
        name: [
            replace(case, actual=other.expected)
            for case, other in zip(cases, (r for r in rounded if r.output == name), strict=True)
        ]
        for name, cases in found.items()
    }
    return {name: runner.agreement(cases, "rounded").relative_difference for name, cases in moved.items()}


def _visibility(
    task: Task, base: nn.Module, runner: _Runner, limits: Limits, roundings: Mapping[str, float]
) -> tuple[Notice, ...]:
    """Tell where the base without its adapters would have passed as well."""
    for compared in task.compare(base, runner.replay(), _SEED):
        if compared.expected.shape != compared.actual.shape:
            return ()
        found = replace(runner.agreement([compared], "base"), rounding=roundings.get(compared.output, 0.0))
        if found.beyond(limits) is not None:
            return ()
    message = f"the adapter changes less than {runner.kind} rounds, so the outputs don't show that it is applied"
    return (Notice(Level.WARNING, "adapter-not-visible", "", message, "Export with --dtype float32."),)
