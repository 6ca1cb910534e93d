"""Writes boft_export/planning/transformers_ties.json from the installed transformers.

A tied parameter is in a checkpoint once, under one of its names. A merge that changes one side of a tie has to know the
others. Only ties between plain names are taken; patterns tie layers of a kind that no adapter tells apart.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import transformers

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "boft_export" / "planning" / "transformers_ties.json"
_CLASS = re.compile(r"^class (\w+)\(.*?\n(?=^class |\Z)", re.DOTALL | re.MULTILINE)
# Some classes set them when they are made, by their config; what a model doesn't have is not in its files.
_TIES = re.compile(r"_tied_weights_keys\s*=\s*(\{.*?\})", re.DOTALL)
_PLAIN = re.compile(r"[\w.]+\.(weight|bias)")


def ties() -> dict[str, list[list[str]]]:
    """Return for each class its ties: a name, and the name of the parameter that it is."""
    found: dict[str, list[list[str]]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for definition in _CLASS.finditer(path.read_text(encoding="utf-8")):
            for written in _TIES.finditer(definition[0]):
                try:
                    pairs = ast.literal_eval(written[1])
                except (ValueError, SyntaxError):
                    continue
                plain = [[a, b] for a, b in pairs.items() if _PLAIN.fullmatch(a) and _PLAIN.fullmatch(b)]
                if plain:
                    found.setdefault(definition[1], []).extend(plain)
    return dict(sorted(found.items()))


def main() -> None:
    """Write the table."""
    table = {"transformers": transformers.__version__, "ties": ties()}
    TARGET.write_text(json.dumps(table, indent=0, ensure_ascii=False) + "\n")
    print(f"{len(table['ties'])} classes from transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
