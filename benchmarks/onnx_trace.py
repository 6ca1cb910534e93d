"""Where the time of tracing goes, by the tracer's stages.

A Llama without weights is traced as ``boft-export onnx`` does it; its size is of no account, its layers are. Each stage
is a function of torch or onnxscript, whose CPU time is taken. Stages run one inside the other: the table has the time
that is a stage's own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.onnx._internal.exporter._core as exporter
from onnx_memory import write_base

from boft_export.models.loading import quiet_transformers
from boft_export.onnx import trace as tracing
from boft_export.onnx.skeleton import build_skeleton
from boft_export.onnx.tasks import find_task
from boft_export.onnx.variant import Variant
from boft_export.planning import make_plan
from boft_export.planning.inputs import Sources

# What each stage is, and the function that does it.
STAGES: dict[str, tuple[ModuleType, str]] = {
    "torch.export captures the model": (torch.export, "export"),
    "torch.export traces it again, decomposed": (exporter, "_prepare_exported_program_for_export"),
    "torch.onnx translates it": (exporter, "_exported_program_to_onnx_program"),
    "onnxscript optimises the graph": (tracing, "optimize"),
}


class Clock:
    """CPU time of stages, less that of the stages inside them."""

    def __init__(self) -> None:
        self.own: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        self._inside = [0.0]

    def timed(self, stage: str, call: Callable[..., object]) -> Callable[..., object]:
        """Return a function that is clocked."""

        def run(*args: object, **kwargs: object) -> object:
            self._inside.append(0.0)
            started = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                took = time.process_time() - started
                self.own[stage] += took - self._inside.pop()
                self._inside[-1] += took

        return run


def main() -> None:
    """Trace a model and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of a Llama with hidden size 1024")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    given = parser.parse_args()
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder, quiet_transformers():
        layers = write_base(Path(folder) / "base", given.gigabytes, 1024, tied=False)
        plan = make_plan(Sources().base(Path(folder) / "base"), (), dtype="F32")
        task = find_task(plan.base.config)
        skeleton = build_skeleton(plan, task, torch.float32)
        graphs = task.graphs(skeleton.model)
        for stage, (module, name) in STAGES.items():
            setattr(module, name, clock.timed(stage, getattr(module, name)))
        started = time.process_time()
        for graph in graphs:
            tracing.trace(skeleton, graph, Variant())
        whole = time.process_time() - started
    figures = {**clock.own, "all else": whole - sum(clock.own.values())}
    print(f"{layers} layers, {whole:.1f} s of CPU")
    for stage, took in figures.items():
        print(f"{stage:<42} {took:6.1f} s {took / whole:6.1%}")
    if given.json is not None:
        given.json.write_text(json.dumps({"layers": layers, "seconds": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
