"""How far along the path each output goes: what was asked for, checked, and told for each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from boft_export.checkpoint.places import parse_path
from boft_export.errors import InputError, Level, Notice, UsageError
from boft_export.linalg.path import InterpolationPath
from boft_export.planning.alphas import Alpha, AlphaMap, number_text, several
from boft_export.planning.model import Action, FoldPlan
from boft_export.planning.names import near_matches


@dataclass(frozen=True)
class Strength:
    """How far one output goes.

    Attributes:
        alphas: One for each adapter.
        own: Those of the tensors that a map gives their own, by name.
    """

    alphas: tuple[float, ...]
    own: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def of(self, tensor: str) -> tuple[float, ...]:
        """Return how far a tensor goes with each adapter."""
        return self.own.get(tensor, self.alphas)

    @property
    def is_full(self) -> bool:
        """Whether every tensor goes all the way."""
        return all(a == 1 for alphas in (self.alphas, *self.own.values()) for a in alphas)

    @property
    def label(self) -> str:
        """The alphas as text: ``0.25``, or ``0.5_0.2`` where adapters differ."""
        told = self.alphas if len(set(self.alphas)) > 1 else self.alphas[:1]
        return "_".join(map(number_text, told))


@dataclass(frozen=True)
class Interpolation:
    """What was asked for.

    Attributes:
        path: The curve.
        alphas: How far each output goes.
        sweep: Write each output into a folder of its own, ``alpha-0.25``, also where there is only one.
        alpha_map: Glob patterns over the output's tensor names, each with its own alpha; the last match wins.
    """

    path: InterpolationPath = InterpolationPath.GEODESIC
    alphas: tuple[Alpha, ...] = (1.0,)
    sweep: bool = False
    alpha_map: AlphaMap = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be checked without the inputs.

        Raises:
            UsageError: If there is no alpha, or one is no number, or lies off the path.
        """
        if not self.alphas:
            raise UsageError("there is no alpha.", hint="Give one or more: 0 is the base, 1 the tuned model.")
        for alpha in (*self.alphas, *self.alpha_map.values()):
            for value in several(alpha):
                if not math.isfinite(value):
                    raise UsageError(f"alpha {value} is not a finite number.")
                if self.path is InterpolationPath.TRUNCATE and not 0 <= value <= 1:
                    raise UsageError(
                        f"alpha {number_text(value)} is outside of [0, 1], where the path truncate has no factors.",
                        hint="Take another --path to extrapolate.",
                    )

    def course(self, plan: FoldPlan) -> Course:
        """Return what is to be written for a plan.

        Raises:
            UsageError: If the numbers of alphas and adapters differ, or an alpha occurs twice, or the path has no
                such point for what the adapters hold.
            InputError: If a pattern of the map matches no tensor that the adapters change, or takes tied tensors apart.
        """
        count = len(plan.adapters)
        own = self._own(plan)
        found = [Strength(_for_adapters(a, count), own) for a in self.alphas]
        for one, other in plan.tied:
            if any(s.of(one) != s.of(other) for s in found):
                raise InputError(
                    f"the alpha map takes {one} and {other} apart, which the model holds as one tensor.",
                    hint="Give both the same alpha.",
                )
        labels = [s.label for s in found]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise UsageError(f"alpha {twice} is given more than once.")
        course = Course(self.path, tuple(Variant(f"alpha-{s.label}" if self.sweep else "", s) for s in found))
        _check_path(course, plan)
        return course

    def _own(self, plan: FoldPlan) -> dict[str, tuple[float, ...]]:
        changed = [t.name for t in plan.tensors if t.action not in (Action.COPY, Action.CONVERT)]
        own: dict[str, tuple[float, ...]] = {}
        for pattern, alpha in self.alpha_map.items():
            matches = [n for n in changed if fnmatchcase(n, pattern)]
            if not matches:
                near = near_matches(pattern, changed)
                raise InputError(
                    f"{pattern} in the alpha map matches no tensor that the adapter changes"
                    + (f"; near matches: {', '.join(near)}" if near else "")
                    + ".",
                    hint="Patterns are matched with whole names, as in layers.0.*.weight; see --dry-run.",
                )
            own |= dict.fromkeys(matches, _for_adapters(alpha, len(plan.adapters)))
        return own

    def record(self, strength: Strength) -> dict[str, Any]:
        """Return what one output's manifest says was asked for."""
        return {
            "path": self.path.value,
            "alpha": list(strength.alphas),
            "alpha_map": {pattern: list(several(a)) for pattern, a in self.alpha_map.items()},
        }

    def notices(self, plan: FoldPlan) -> list[Notice]:
        """Return what a user should know of these alphas."""
        found = []
        values = [v for a in (*self.alphas, *self.alpha_map.values()) for v in several(a)]
        if beyond := sorted({v for v in values if not 0 <= v <= 1}):
            message = f"alpha {', '.join(map(number_text, beyond))} lies beyond base (0) and tuned model (1)"
            found.append(Notice(Level.WARNING, "extrapolation", "", message))
        added = [t.name for t in plan.tensors if t.origins[0].adapter is not None]
        grown = [t.name for t in plan.tensors if any(o.ref.num_elements < t.source.num_elements for o in t.origins)]
        for names, what in ((added, "that the base has nothing for are"), (grown, "grow: their new rows are")):
            if names and any(v != 1 for v in values):
                message = f"{len(names)} tensors {what} taken as the adapter brings them, whatever alpha"
                found.append(Notice(Level.WARNING, "added-whole", names[0], message))
        return found


@dataclass(frozen=True)
class Variant:
    """One output of a run.

    Attributes:
        folder: Its folder below the run's output; empty for the output itself.
        strength: How far it goes.
    """

    folder: str
    strength: Strength

    def path(self, name: str) -> str:
        """Return the path below the run's output of the variant's file ``name``."""
        return f"{self.folder}/{name}" if self.folder else name

    def path_below(self, output: str) -> str:
        """Return where it is, with the run's output at ``output``."""
        return str(parse_path(output) / self.folder)


@dataclass(frozen=True)
class Course:
    """What a run writes: a path, and how far along it each output goes.

    Attributes:
        path: The curve.
        variants: The outputs.
    """

    path: InterpolationPath
    variants: tuple[Variant, ...]

    def alphas_of_layers(self, plan: FoldPlan) -> dict[tuple[int, str], tuple[float, ...]]:
        """Return how far each layer goes, by its adapter's number and its module, but for 0, where it has no effect."""
        found: dict[tuple[int, str], dict[float, None]] = {}
        for tensor in plan.tensors:
            for step in tensor.steps:
                alphas = (v.strength.of(tensor.name)[step.adapter] for v in self.variants)
                found.setdefault((step.adapter, step.layer.module), {}).update(dict.fromkeys(a for a in alphas if a))
        return {k: tuple(v) for k, v in found.items()}


def _check_path(course: Course, plan: FoldPlan) -> None:
    """Refuse to bend what is no rotation: only the linear path goes there."""
    if course.path is InterpolationPath.LINEAR:
        return
    alphas = course.alphas_of_layers(plan)
    for step in (s for t in plan.tensors for s in t.steps if not s.layer.is_orthogonal):
        bent = [a for a in alphas[step.adapter, step.layer.module] if a != 1]
        if bent:
            raise UsageError(
                f"{step.layer.module} in {plan.adapters[step.adapter].name} is rotated by a series that is only nearly "
                f"orthogonal, and the path {course.path} goes along rotations: there is no alpha "
                f"{number_text(bent[0])} on it.",
                hint="Take --path linear, or alpha 0 or 1.",
            )


def interpolation(
    alpha: Alpha | None, alphas: Sequence[Alpha] | None, path: InterpolationPath | str, alpha_map: AlphaMap | None
) -> Interpolation:
    """Return what ``interpolate``'s arguments ask for.

    Raises:
        UsageError: If they don't say how far to go, or say it twice, or there is no such path.
    """
    if path not in list(InterpolationPath):
        raise UsageError(f"path {path} is not one of {', '.join(InterpolationPath)}.")
    if alpha is not None and alphas is not None:
        raise UsageError("alpha and alphas are both given.", hint="Give one of them.")
    if alpha is None and alphas is None:
        if not alpha_map:
            raise UsageError("it is not said how far to go.", hint="Give an alpha: 0 is the base, 1 the tuned model.")
        alpha = 1.0
    wanted = (alpha,) if alpha is not None else tuple(alphas if alphas is not None else ())
    return Interpolation(InterpolationPath(path), wanted, alphas is not None, alpha_map or {})


def _for_adapters(alpha: Alpha, count: int) -> tuple[float, ...]:
    values = several(alpha)
    if len(values) not in (1, count):
        raise UsageError(
            f"{len(values)} alphas {', '.join(map(number_text, values))} for {count} adapters.",
            hint="Give one for all adapters, or one for each in their order.",
        )
    return values if len(values) == count else values * count
