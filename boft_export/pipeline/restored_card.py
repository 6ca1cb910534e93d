"""The ``README.md`` of a checkpoint that is its base again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from boft_export.errors import Level
from boft_export.planning import Action, FoldPlan
from boft_export.version import __version__

# What a merge's card says that no longer holds.
_NO_LONGER = {"base_model", "base_model_relation"}
_TAGS = {"boft", "merged-adapter"}


def restored_card(plan: FoldPlan, metadata: str, _: Mapping[str, Any]) -> str:
    """Return the card of a checkpoint from which adapters were taken out again.

    Args:
        plan: What was done.
        metadata: From ``card_metadata``.
    """
    kept = {k: v for k, v in (yaml.safe_load(metadata) or {}).items() if k not in _NO_LONGER}
    kept["tags"] = [t for t in kept.get("tags", ()) if t not in _TAGS]
    adapters = ", then ".join(f"`{a.name}` ({a.adapter.format})" for a in plan.adapters)
    lines = [
        f"# {plan.base.name.rsplit('/', 1)[-1]} with its adapter undone",
        "",
        (
            f"`{plan.base.name}` with {adapters} taken out of {plan.count(Action.FOLD)} weights again by boft-export "
            f"{__version__}. `boft_export.json` says how exactly."
        ),
    ]
    warnings = [n for n in plan.notices if n.level is Level.WARNING]
    if warnings:
        lines += ["", "Noted while unmerging:", "", *(f"- {n}" for n in warnings)]
    head = yaml.safe_dump({k: v for k, v in kept.items() if v}, sort_keys=False) if any(kept.values()) else ""
    return (f"---\n{head}---\n\n" if head else "") + "\n".join(lines) + "\n"
