"""Writes boft_export/planning/transformers_renames.json from the installed transformers.

transformers 5 gives many models other names in memory than their files have. An adapter trained there has the names in
memory; a merge works on files, without transformers. So its table of renames is kept as data. Only renames are taken,
not the conversions that fuse or split tensors.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import transformers
from transformers import conversion_mapping
from transformers.core_model_loading import WeightRenaming

TARGET = Path(__file__).parent.parent / "boft_export" / "planning" / "transformers_renames.json"


def renames() -> dict[str, list[list[str]]]:
    """Return the renames of each model type or class: pattern and replacement, in the order in which they apply."""
    found = {}
    for key, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        pairs = [
            # transformers lets a pattern end only where a name's part ends.
            [source.replace("*.", r".*\.") + (r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", source) else ""), target]
            for t in transforms
            if isinstance(t, WeightRenaming)
            for source, target in zip(t.source_patterns, t.target_patterns * len(t.source_patterns), strict=False)
        ]
        # "legacy" is for every model, and is known here by itself.
        if pairs and key != "legacy":
            found[key] = pairs
    return dict(sorted(found.items()))


def main() -> None:
    """Write the table."""
    table = {"transformers": transformers.__version__, "renames": renames()}
    TARGET.write_text(json.dumps(table, indent=0, ensure_ascii=False) + "\n")
    print(f"{len(table['renames'])} models from transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
