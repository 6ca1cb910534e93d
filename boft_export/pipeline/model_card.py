"""The output's ``README.md``: a model card with the metadata that the Hub reads."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boft_export.checkpoint.places import AnyPath
from boft_export.checkpoint.remote import RemotePath
from boft_export.errors import Level
from boft_export.planning import Action, FoldPlan
from boft_export.planning.alphas import number_text
from boft_export.version import __version__

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*$")
# What stays true of a merged model of what its base's card says.
_KEPT = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags")


def card_metadata(plan: FoldPlan, *tags: str) -> str:
    """Return the card's metadata as YAML, with further tags."""
    from huggingface_hub import ModelCardData

    named = base_id(plan)
    metadata = _base_metadata(plan)
    merged = ("boft", "merged-adapter") if plan.adapters else ()
    if found := list(dict.fromkeys([*metadata.get("tags", []), *merged, *tags])):
        metadata["tags"] = found
    if named:
        metadata |= {"base_model": named, **({"base_model_relation": "finetune"} if plan.adapters else {})}
    return ModelCardData(**metadata).to_yaml()


def model_card(plan: FoldPlan, metadata: str, asked: Mapping[str, Any]) -> str:
    """Return the card of a checkpoint: what it is made of, and what of it is not the base's.

    Args:
        plan: What was done.
        metadata: From ``card_metadata``.
        asked: How far an interpolation goes, as its manifest says it; empty for a merge.
    """
    adapters = ", then ".join(f"`{a.name}` ({a.adapter.format})" for a in plan.adapters)
    counts = ", ".join(
        f"{plan.count(action)} {verb}"
        for action, verb in (
            (Action.FOLD, "rotated"),
            (Action.REPLACE, "replaced"),
            (Action.ADD, "added"),
            (Action.CONVERT, "converted"),
            (Action.COPY, "as in the base"),
        )
        if plan.count(action)
    )
    title = f"{_alpha(asked)} of its adapter" if asked else "its adapter merged"
    lines = [
        f"# {plan.base.name.rsplit('/', 1)[-1]} with {title}",
        "",
        (
            f"`{base_id(plan) or plan.base.name}` with {adapters} folded into its weights by boft-export "
            f"{__version__}{extent(asked)}. It loads like the base and needs no adapter library."
        ),
        "",
        f"Tensors: {counts}. `boft_export.json` has the inputs' hashes and what was done to each tensor.",
    ]
    warnings = [n for n in plan.notices if n.level is Level.WARNING]
    if warnings:
        lines += ["", "Noted while merging:", "", *(f"- {n}" for n in warnings)]
    return f"---\n{metadata}\n---\n\n" + "\n".join(lines) + "\n"


def extent(asked: Mapping[str, Any]) -> str:
    """Return how far an interpolation goes, as the end of a clause; nothing where all the way."""
    if not asked:
        return ""
    mapped = ", some tensors as far as a map says" if asked["alpha_map"] else ""
    return f", alpha = {_alpha(asked)} of the way from base (0) to tuned (1) on the {asked['path']} path{mapped}"


def _alpha(asked: Mapping[str, Any]) -> str:
    return ", ".join(map(number_text, dict.fromkeys(asked["alpha"])))


def base_id(plan: FoldPlan) -> str | None:
    """Return the base's Hub id: its own, or the one that an adapter names where that is no other base."""
    if plan.base.repo_id or any(n.code == "other-base" and n.level is Level.WARNING for n in plan.notices):
        return plan.base.repo_id
    named = (a.adapter.base_model for a in plan.adapters)
    return next((n for n in named if n and _HUB_ID.match(n)), None)


def _base_metadata(plan: FoldPlan) -> dict[str, Any]:
    """Return what of the base's card is kept; a card that can't be read has nothing to keep."""
    from yaml import YAMLError

    card = plan.base.root / "README.md"
    try:
        found = _load(card) if card.is_file() else None
    except (OSError, UnicodeDecodeError, ValueError, YAMLError):
        found = None
    kept = {k: v for k, v in (found or {}).items() if k in _KEPT and v}
    tags = kept.pop("tags", None)
    if isinstance(tags, list):
        kept["tags"] = [t for t in tags if isinstance(t, str)]
    return kept


def _load(card: AnyPath) -> Any:  # noqa: ANN401  # it is checked by whoever asks
    """Return a card's metadata."""
    from huggingface_hub import metadata_load

    if not isinstance(card, RemotePath):
        return metadata_load(card)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / card.name
        copy.write_bytes(card.read_bytes())
        return metadata_load(copy)
