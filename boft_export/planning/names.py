"""Matching the names an adapter was trained under to the names on disk."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from boft_export.planning.tables import FUSED_ROWS, LEAF_RENAMES, PREFIX_RENAMES

T = TypeVar("T")

# Wrappers nest at most this deep: base_model.model.language_model. and the like.
_MAX_PREFIX = 3


@dataclass(frozen=True)
class Rule:
    """A change of prefix, from the adapter's names to the checkpoint's; prefixes end in a dot or are empty."""

    old: str
    new: str

    def apply(self, name: str) -> str | None:
        """Return the name under the new prefix; None where the old one doesn't fit."""
        return self.new + name[len(self.old) :] if name.startswith(self.old) else None

    def __str__(self) -> str:
        """Return the form shown to people."""
        return f"{self.old}* -> {self.new}*"


@dataclass(frozen=True)
class Ambiguity:
    """Two rules that fit equally well but lead to different tensors."""

    name: str
    images: tuple[str, str]


def find_rules(
    wanted: Sequence[str], available: Collection[str], hit: Callable[[str], bool]
) -> tuple[list[Rule], list[Ambiguity]]:
    """Find the fewest prefix changes under which the wanted names are there.

    Args:
        wanted: Names of weights in the adapter's naming.
        available: The names on disk.
        hit: Whether a name, in the checkpoint's naming, is there; whether its shape fits is checked later.

    Returns:
        The rules in the order in which to try them, and where two of them fit equally well.
    """
    rules: list[Rule] = []
    left = [n for n in wanted if not hit(n)]
    candidates = list(dict.fromkeys(_candidates(left, available))) if left else []
    while left:
        scored = []
        for rule in candidates:
            images = {n: image for n in left if (image := rule.apply(n)) is not None and hit(image)}
            if images:
                scored.append((len(images), rule, images))
        if not scored:
            break
        most = max(count for count, _, _ in scored)
        best = [(rule, images) for count, rule, images in scored if count == most]
        rule, images = best[0]
        for _, other in best[1:]:
            clash = next((n for n in images if n in other and other[n] != images[n]), None)
            if clash is not None:
                return rules, [Ambiguity(clash, (images[clash], other[clash]))]
        rules.append(rule)
        left = [n for n in left if n not in images]
    return rules, []


def spellings(name: str, rules: Iterable[Rule]) -> Iterator[str]:
    """Yield the names under which a tensor may be on disk: as it is, under each rule, and by its old leaf's name."""
    for image in (name, *(i for r in rules if (i := r.apply(name)) is not None)):
        yield image
        for new, old in LEAF_RENAMES:
            if image.endswith(new):
                yield image.removesuffix(new) + old


def matched_names(wanted: Sequence[str], tensors: Mapping[str, T]) -> tuple[dict[str, T], list[Rule]]:
    """Return tensors by the names that are wanted, where they have others: programs save under other prefixes.

    What has no counterpart keeps its name.
    """
    missing = [n for n in wanted if n not in tensors]
    rules, _ = find_rules(missing, tensors, tensors.__contains__) if missing else ([], [])
    found = dict(tensors)
    for name in missing:
        image = next((i for i in spellings(name, rules) if i in found and i not in wanted), None)
        if image is not None:
            found[name] = found.pop(image)
    return found, rules


def fused_parent(name: str) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yield (fused weight, its parts' weights, which part) for each way in which ``name`` may be fused on disk."""
    module, _, leaf = name.rpartition(".")
    owner, _, last = module.rpartition(".")
    prefix = f"{owner}." if owner else ""
    for fused, parts in FUSED_ROWS:
        if last in parts:
            yield f"{prefix}{fused}.{leaf}", tuple(f"{prefix}{p}.{leaf}" for p in parts), parts.index(last)


def near_matches(name: str, available: Collection[str]) -> list[str]:
    """Return up to three names that look like ``name``, for an error message."""
    tail = name.split(".")[-2:]
    # Comparing with everything is slow for many tensors; those with the same end come first anyway.
    pool = [n for n in available if n.split(".")[-2:] == tail] or list(available)[:2000]
    return difflib.get_close_matches(name, pool, n=3, cutoff=0.3)


def _candidates(wanted: Iterable[str], available: Iterable[str]) -> Iterator[Rule]:
    yield from (Rule(prefix, "") for name in wanted for prefix in _prefixes(name))
    yield from (Rule(old, new) for old, new in PREFIX_RENAMES)
    yield from (Rule("", prefix) for name in available for prefix in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    """Yield the leading parts of a name that are no layer numbers and not the tensor itself."""
    prefix = ""
    for part in name.split(".")[:-2][:_MAX_PREFIX]:
        if part.isdigit():
            return
        prefix += f"{part}."
        yield prefix
