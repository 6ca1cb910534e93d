"""Two checkpoints compared, as one document: what ``--json`` prints, and what the table is made from."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from boft_export.planning.inspection import group_name
from boft_export.version import __version__

if TYPE_CHECKING:
    # At run time this would load torch, which the program's help does without.
    from boft_export.pipeline.diff import Diff

SCHEMA_VERSION = 1
_IDENTICAL = "identical"
# Of tensors alike, the largest of each is shown.
_LARGEST = ("relative_change", "largest_ulp", "mean_angle", "largest_angle", "largest_scale")


def diff_document(diff: Diff, seconds: float) -> dict[str, Any]:
    """Return a comparison as a JSON object, as ``schemas/diff.schema.json`` describes it.

    What is not finite becomes None, and half characters in names become question marks: JSON has no place for them.
    """
    changed = [
        {"name": t.name, "dtype": t.dtype, "new_dtype": t.new_dtype, "shape": t.shape, **vars(t.change)}
        for t in diff.changed
    ]
    document = {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "boft-export", "version": __version__},
        "a": diff.a,
        "b": diff.b,
        "same": diff.same,
        "counts": _counts(diff),
        "changed": changed,
        "identical": [t.name for t in diff.tensors if t.change.kind == _IDENTICAL],
        "reshaped": [vars(t) for t in diff.reshaped],
        "only_a": [vars(t) for t in diff.only_a],
        "only_b": [vars(t) for t in diff.only_b],
        "config": [vars(c) for c in diff.config],
        "seconds": seconds,
    }
    return {key: _plain(value) for key, value in document.items()}


def summary(document: Mapping[str, Any]) -> str:
    """Return the outcome in a line: how many tensors are what."""
    counts = document["counts"]
    words = {"reshaped": "of another shape", "only_a": f"only in {document['a']}", "only_b": f"only in {document['b']}"}
    parts = [f"{n:,} {words.get(kind, kind)}" for kind, n in counts.items()]
    if document["config"]:
        parts.append(f"{len(document['config'])} settings differ")
    return ("the same: " if document["same"] else "") + (", ".join(parts) or "no tensors")


def grouped_rows(changed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for changed tensors that differ only in layer numbers, with the largest of each measure.

    Args:
        changed: From the document; rows come in the order in which they do.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for tensor in changed:
        key = (group_name(tensor["name"]), tensor["kind"], tensor["dtype"], tensor["new_dtype"], tuple(tensor["shape"]))
        groups[key].append(tensor)
    return [
        {
            **members[0],
            "name": key[0],
            "count": len(members),
            "smallest_scale": min(
                (m["smallest_scale"] for m in members if m["smallest_scale"] is not None), default=None
            ),
            **{k: max((m[k] for m in members if m[k] is not None), default=None) for k in _LARGEST},
        }
        for key, members in groups.items()
    ]


def _counts(diff: Diff) -> dict[str, int]:
    """Return how many tensors are what, without zeros."""
    kinds = Counter(str(t.change.kind.value) for t in diff.tensors)
    others = {"reshaped": len(diff.reshaped), "only_a": len(diff.only_a), "only_b": len(diff.only_b)}
    return {**dict(kinds.most_common()), **{k: n for k, n in others.items() if n}}


def _plain(value: object) -> object:
    """Return a value in JSON's own types."""
    if isinstance(value, str):
        # A StrEnum's member too becomes a plain text.
        return str(value).encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    return value
