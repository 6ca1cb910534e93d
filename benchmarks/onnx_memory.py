"""Memory and time of an export to ONNX, phase by phase, by the model's size.

A causal model with random float32 weights, and an adapter of two factors on queries and values, are exported in a
process of their own, whose anonymous memory (RssAnon: what has no file behind it) is read every few milliseconds. What
tracing takes without any weight is the measure for all other phases.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

VOCABULARY, HEADS, PAIRS = 32000, 16, 4
# Models of more bytes than this are wider, as they are in practice, and not only deeper.
_WIDE = 2e9
# What the export calls its phases, and what they are called here.
_PHASES = {"building": "build", "tracing": "trace", "verifying": "verify"}
_REST = "rest"
_INTERVAL = 0.005


def linear(hidden: int) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of a decoder layer's linear layers."""
    inner, pairs = hidden * 11 // 4, hidden // HEADS * PAIRS
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (pairs, hidden),
        "self_attn.v_proj": (pairs, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def write_base(folder: Path, gigabytes: float, hidden: int, *, tied: bool) -> int:
    """Write a checkpoint of about a size, a file for each two layers; return the number of layers."""
    folder.mkdir(parents=True)
    shapes = linear(hidden)
    ends = VOCABULARY * hidden * (1 if tied else 2)
    layers = max(1, round((gigabytes * 1e9 / 4 - ends) / sum(out * n for out, n in shapes.values())))
    generator = torch.Generator().manual_seed(0)

    def weight(out: int, n: int) -> torch.Tensor:
        return torch.randn(out, n, generator=generator) * 0.02

    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    save({"model.embed_tokens.weight": weight(VOCABULARY, hidden), "model.norm.weight": torch.ones(hidden)})
    if not tied:
        save({"lm_head.weight": weight(VOCABULARY, hidden)})
    for first in range(0, layers, 2):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, min(first + 2, layers)):
            prefix = f"model.layers.{layer}"
            tensors |= {f"{prefix}.{name}.weight": weight(*shape) for name, shape in shapes.items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{name}.weight"] = torch.ones(hidden)
        save(tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": PAIRS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def write_adapter(folder: Path, layers: int, hidden: int) -> None:
    """Write a PEFT BOFT adapter of two factors for queries and values."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name in ("self_attn.q_proj", "self_attn.v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.boft_R"] = torch.randn(2, hidden // 8, 8, 8, generator=generator) * 0.1
            tensors[f"{prefix}.boft_s"] = 1 + torch.randn(linear(hidden)[name][0], 1, generator=generator) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "BOFT", "peft_version": "0.21.2", "exclude_modules": None, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@dataclass
class Phase:
    """What one phase took."""

    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Run:
    """One export: by what, of which checkpoint, and what each phase took."""

    by: str
    gigabytes: float
    tied: bool
    seconds: float = 0.0
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def peak_mb(self) -> float:
        """The largest anonymous memory of all phases."""
        return max(p.peak_mb for p in self.phases.values())

    @property
    def above_tracing_mb(self) -> float:
        """By how much that is more than tracing without weights."""
        return self.peak_mb - self.phases.get("trace", Phase()).peak_mb


def export(base: str, adapter: str, output: str) -> None:
    """Export in this process, and say on stderr which phase is begun."""
    from boft_export import export_onnx

    last = ""

    def told(_: int, total: int, name: str) -> None:
        nonlocal last
        phase = "write" if total else _PHASES[name.split(maxsplit=1)[0]]
        if phase != last:
            print(f"phase {phase}", file=sys.stderr, flush=True)
        last = phase

    export_onnx(base, adapter, output, progress=told)


def export_by_optimum(base: str, output: str) -> None:
    """Export the base with optimum in this process, which has neither an adapter to merge nor weights to fold."""
    from optimum.exporters.onnx import main_export

    main_export(base, output, task="text-generation-with-past")


def anonymous_mb(pid: int) -> float:
    """Return a process's anonymous memory; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def measure(work: Path, gigabytes: float, *, tied: bool, optimum: Path | None = None) -> Run:
    """Export a folder's base and adapter, or the base with optimum, and return what each phase took.

    Raises:
        CalledProcessError: If the export fails.
    """
    run = Run("boft-export" if optimum is None else "optimum", gigabytes, tied)
    command = [str(optimum or sys.executable), __file__]
    command += ["--export", *(str(work / n) for n in ("base", "adapter", "onnx"))]
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=writing)
    os.close(writing)
    errors = os.fdopen(reading)
    current, begun, said = _REST, time.monotonic(), []
    started = begun
    while True:
        ended = process.poll() is not None
        now, held = time.monotonic(), anonymous_mb(process.pid)
        run.phases.setdefault(current, Phase())
        run.phases[current].peak_mb = max(run.phases[current].peak_mb, held)
        for line in errors.readlines():
            said.append(line)
            if line.startswith("phase "):
                run.phases[current].seconds += now - begun
                current, begun = line.split()[1], now
                run.phases.setdefault(current, Phase())
        if ended:
            break
        time.sleep(_INTERVAL)
    run.phases[current].seconds += time.monotonic() - begun
    run.seconds = time.monotonic() - started
    if process.returncode:
        print("".join(said), file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return run


def main() -> None:
    """Measure each size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.2, 2.5])
    parser.add_argument("--tied", action="store_true", help="one matrix for embedding and head")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--optimum-python", type=Path, help="Python of an environment with optimum, to compare with")
    args = parser.parse_args()
    if args.export:
        base, adapter, output = args.export
        if find_spec("optimum") is not None:
            export_by_optimum(base, output)
        else:
            export(base, adapter, output)
        return
    runs: list[Run] = []
    print(f"{'GB':>5} {'':>11} {'phase':>8} {'seconds':>8} {'peak MB':>8}")
    for size in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            work = Path(name)
            hidden = 2048 if size * 1e9 > _WIDE else 1024
            layers = write_base(work / "base", size, hidden, tied=args.tied)
            write_adapter(work / "adapter", layers, hidden)
            actual = sum(f.stat().st_size for f in (work / "base").iterdir()) / 1e9
            for python in (None, *([args.optimum_python] if args.optimum_python else [])):
                runs.append(run := measure(work, actual, tied=args.tied, optimum=python))
                shutil.rmtree(work / "onnx")
                for phase, took in run.phases.items():
                    print(f"{actual:5.2f} {run.by:>11} {phase:>8} {took.seconds:8.1f} {took.peak_mb:8.0f}", flush=True)
                told = f"  {run.above_tracing_mb:+.0f} of tracing" if python is None else ""
                print(f"{actual:5.2f} {run.by:>11} {'all':>8} {run.seconds:8.1f} {run.peak_mb:8.0f}{told}", flush=True)
    if args.json:
        figures = [{**asdict(r), "peak_mb": r.peak_mb, "above_tracing_mb": r.above_tracing_mb} for r in runs]
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
