"""What lies beside the graphs: config, tokenizer, processor, manifest and model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from boft_export.checkpoint import Staging
from boft_export.checkpoint.staging import file_system_errors
from boft_export.pipeline.manifest import dump
from boft_export.pipeline.recorded import MANIFEST_NAME
from boft_export.planning import FoldPlan


def write_side_files(plan: FoldPlan, staging: Staging, manifest: Mapping[str, Any], card: str) -> None:
    """Write all that a loader wants to find beside the graphs."""
    for side in plan.side_files:
        if side.name.name.endswith(".safetensors.index.json"):
            continue
        with staging.write(str(side.name)) as file:
            if side.source is not None:
                with file_system_errors(side.source), side.source.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                file.write((side.text or "").encode())
    for name, text in ((MANIFEST_NAME, dump(manifest)), ("README.md", card)):
        with staging.write(name) as file:
            file.write(text.encode())
