"""Names of modules as they are shown: printable, short, in the order of the model, and by kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

OTHER = "other"
# Colours of the kinds of module in their order; the last one is that of all others.
KIND_COLOURS = ("#2a6fc9", "#d9700f", "#25915a", "#cf3f4f", "#7d5bd0", "#12899f", "#96751a", "#b5479e", "#7f8791")


def printable(text: object) -> str:
    """Return a text without what has no place in a line of one: control characters, half characters, directions."""
    told = str(text)
    return told if told.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in told)


def shortened(text: str, length: int) -> str:
    """Return a text's end where it is too long, from a dot on if one is near: names that differ do so at the end."""
    if len(text) <= length:
        return text
    end = text[1 - length :]
    _, dot, rest = end.partition(".")
    return "…" + (rest if dot and len(rest) > length // 2 else end)


def kind_colours(kinds: Sequence[str]) -> dict[str, str]:
    """Return the kinds that have a colour of their own, the most frequent ones, and ``OTHER`` where there are more."""
    counts = Counter(kinds)
    own = len(KIND_COLOURS) - 1
    if len(counts) <= own:
        return dict(zip(counts, KIND_COLOURS, strict=False))
    kept = {kind for kind, _ in counts.most_common(own - 1)}
    return {**dict(zip((k for k in counts if k in kept), KIND_COLOURS, strict=False)), OTHER: KIND_COLOURS[-1]}


def model_order(modules: Sequence[str]) -> list[int]:
    """Return the places of modules in the order of their numbers, layer 2 before layer 10; else as they stand."""
    names = [re.findall(r"[0-9]+|[^0-9]+", module) for module in modules]
    first: dict[str, int] = {}
    for part in (p for name in names for p in name):
        first.setdefault(part, len(first))

    def key(i: int) -> list[tuple[int, int, str]]:
        # Numbers compare by length, then as text: int refuses very long ones.
        digits = [part.lstrip("0") if part.isdecimal() else "" for part in names[i]]
        return [
            (0, len(d), d) if part.isdecimal() else (1, first[part], "")
            for part, d in zip(names[i], digits, strict=True)
        ]

    return sorted(range(len(modules)), key=key)


def module_kinds(modules: Sequence[str]) -> list[str]:
    """Return each module's kind: what follows the last number in its name, cut short where that stays unique."""
    tails = []
    for module in modules:
        parts = module.split(".")
        while len(parts) > 1 and parts[-1].isdecimal():
            parts.pop()
        numbers = [i for i, part in enumerate(parts[:-1]) if part.isdecimal()]
        tails.append(tuple(parts[numbers[-1] + 1 if numbers else 0 :]))
    distinct = set(tails)
    endings = Counter(tail[-i:] for tail in distinct for i in range(1, len(tail) + 1))
    short = {t: next((t[-i:] for i in range(1, len(t)) if endings[t[-i:]] == 1), t) for t in distinct}
    return [".".join(short[tail]) for tail in tails]
