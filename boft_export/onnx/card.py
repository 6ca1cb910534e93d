"""The model card of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from boft_export.errors import Level
from boft_export.onnx.snippets import snippet
from boft_export.onnx.verify import Agreement
from boft_export.pipeline.model_card import base_id, extent
from boft_export.planning import FoldPlan
from boft_export.version import __version__


def export_card(
    plan: FoldPlan,
    metadata: str,
    asked: Mapping[str, Any],
    task: str,
    graphs: Mapping[str, int],
    agreements: Sequence[Agreement],
) -> str:
    """Return the card: what the graphs are made of, how to run them, and what was measured.

    Args:
        plan: What was exported.
        metadata: The card's metadata, YAML.
        asked: How far an interpolation goes; empty where all the way.
        task: What it was exported for.
        graphs: The graphs' files, with their numbers of nodes.
        agreements: How their outputs compare with the model's.
    """
    adapters = ", then ".join(f"`{a.name}` ({a.adapter.format})" for a in plan.adapters)
    folded = f" with {adapters} folded into its weights{extent(asked)}" if adapters else ""
    files = {f.name.name for f in plan.side_files}
    lines = [
        f"# {plan.base.name.rsplit('/', 1)[-1]} as ONNX",
        "",
        f"`{base_id(plan) or plan.base.name}`{folded}, exported for {task} by boft-export {__version__}.",
        "",
        *(f"- `{name}`, {nodes} nodes" for name, nodes in graphs.items()),
        "",
        "In this folder:",
        "",
        "```python",
        snippet(task, files, next(iter(graphs), "model.onnx")).rstrip(),
        "```",
    ]
    if agreements:
        ran = ", ".join(dict.fromkeys(p for a in agreements for p in a.providers))
        lines += [
            "",
            f"Compared with the PyTorch model, in ONNX Runtime ({ran}), on other shapes than those it was traced with:",
            "",
            "| output | largest difference | of the largest | mean | cosine | top-1 |",
            "|---|---|---|---|---|---|",
            *(
                f"| {a.output} | {a.largest_difference:.1e} | {a.relative_difference:.1e} | {a.mean_difference:.1e} | "
                f"{a.smallest_cosine:.6f} | {a.top1_agreement:.1%} |"
                for a in agreements
            ),
        ]
    lines += ["", "`boft_export.json` has the inputs' hashes and what was done to each tensor."]
    warnings = [n for n in plan.notices if n.level is Level.WARNING]
    if warnings:
        lines += ["", "Noted while exporting:", "", *(f"- {n}" for n in warnings)]
    return f"---\n{metadata}\n---\n\n" + "\n".join(lines) + "\n"
