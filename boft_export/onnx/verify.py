"""Proving a graph: its outputs in ONNX Runtime beside those of the PyTorch model with base and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from boft_export.errors import CheckFailedError
from boft_export.models.loading import load_plan
from boft_export.models.reference import load_reference
from boft_export.onnx.session import Session
from boft_export.onnx.tasks import Compared, Task
from boft_export.planning import FoldPlan

# The largest difference, as a share of the largest magnitude.
LIMITS = {"F32": 1e-5, "F16": 2e-2, "BF16": 1e-1}


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
        top1_agreement: The share of rows with the same largest element.
        worst_case: The case with the largest difference.
        providers: What ran the graph.
    """

    output: str
    cases: int
    largest_difference: float
    mean_difference: float
    largest_magnitude: float
    smallest_cosine: float
    top1_agreement: float
    worst_case: str
    providers: tuple[str, ...]

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest magnitude."""
        return self.largest_difference / self.largest_magnitude if self.largest_magnitude else self.largest_difference

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**vars(self), "providers": list(self.providers), "relative_difference": self.relative_difference}


def verify(plan: FoldPlan, task: Task, folder: Path) -> tuple[Agreement, ...]:
    """Compare a folder's graphs with the model.

    Raises:
        CheckFailedError: If they differ by more than rounding.
    """
    sessions: dict[str, Session] = {}

    def run(name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if name not in sessions:
            sessions[name] = Session(folder / f"{name}.onnx")
        return sessions[name].run(inputs)

    cpu = torch.device("cpu")
    with torch.no_grad():
        model = load_reference(plan, cpu).model if plan.adapters else load_plan(plan, cpu, tuned=False).model
        found: dict[str, list[Compared]] = {}
        for compared in task.compare(model, run, 0):
            found.setdefault(compared.output, []).append(compared)
    providers = tuple(dict.fromkeys(p for s in sessions.values() for p in s.providers))
    agreements = tuple(_agreement(name, cases, providers) for name, cases in found.items())
    limit = LIMITS["F32"]
    for agreement in agreements:
        if not agreement.relative_difference <= limit:
            raise CheckFailedError(
                f"{agreement.output} of the graph differs from the model's by {agreement.largest_difference:.3g} "
                f"({agreement.relative_difference:.1e} of the largest, at most {limit:.0e} is rounding), on "
                f"{agreement.worst_case}. Nothing was published.",
            )
    return agreements


def _agreement(name: str, cases: list[Compared], providers: tuple[str, ...]) -> Agreement:
    largest = total = magnitude = 0.0
    elements = rows = same = 0
    cosine, worst = 1.0, cases[0].case
    for case in cases:
        expected, actual = case.expected.double(), case.actual.double()
        if expected.shape != actual.shape:
            raise CheckFailedError(
                f"{name} of the graph is {tuple(actual.shape)}, the model's {tuple(expected.shape)}, on {case.case}."
            )
        expected, actual = (t.flatten(0, -2) if case.counts is None else t[case.counts] for t in (expected, actual))
        difference = (expected - actual).abs()
        if not float(difference.max()) <= largest:
            largest, worst = float(difference.max()), case.case
        total += float(difference.sum())
        elements += difference.numel()
        magnitude = max(magnitude, float(expected.abs().max()))
        cosine = min(cosine, float(torch.cosine_similarity(expected, actual, dim=-1).min()))
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        rows += len(expected)
    return Agreement(name, len(cases), largest, total / elements, magnitude, cosine, same / rows, worst, providers)
