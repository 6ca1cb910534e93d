"""JSON Schemas of what ``--json`` prints, which are the documents' documentation too."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def schema(name: str) -> dict[str, Any]:
    """Return a command's JSON Schema (2020-12).

    Args:
        name: The command: ``validate``.

    Raises:
        FileNotFoundError: If it has none.
    """
    found: dict[str, Any] = json.loads(files(__name__).joinpath(f"{name}.schema.json").read_text("utf-8"))
    return found
