"""A checkpoint and an adapter with a model's shapes and random values, to measure with.

A smaller size is a slice of the model: as many of its layers as fit, and of its vocabulary the same share. Files hold
up to 5 GB, as those of transformers do. Any size is written a tensor at a time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# transformers' default size of a file.
FILE_BYTES = 5_000_000_000
# Rows that are drawn at random; a tensor repeats them, shifted: as good as random for a merge, and fast to make.
_DRAWN = 64


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int
    pairs: int

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each linear layer of a decoder layer."""
        n, few = self.hidden, self.hidden * self.pairs // self.heads
        return {
            "self_attn.q_proj": (n, n),
            "self_attn.k_proj": (few, n),
            "self_attn.v_proj": (few, n),
            "self_attn.o_proj": (n, n),
            "mlp.gate_proj": (self.inner, n),
            "mlp.up_proj": (self.inner, n),
            "mlp.down_proj": (n, self.inner),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one decoder layer's linear layers."""
        return sum(out * n for out, n in self.linear.values())

    @property
    def config(self) -> dict[str, object]:
        """What transformers reads of it."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.pairs,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def slice(self, size: float) -> Shape:
        """Return the part of the model that takes about ``size`` bytes, one layer at least."""
        whole = 2 * (self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden)
        layers = max(1, round(self.layers * size / whole))
        vocabulary = math.ceil(self.vocabulary * layers / self.layers)
        return Shape(layers, self.hidden, self.inner, vocabulary, self.heads, self.pairs)


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32000, 32, 32),
    "llama-3-8b": Shape(32, 4096, 14336, 128256, 32, 8),
    # TinyLlama's: what holds all of a model in memory, and PEFT's matrices, can be run here.
    "llama-1b": Shape(22, 2048, 5632, 32000, 32, 4),
    "llama-300m": Shape(24, 1024, 2816, 32000, 16, 16),
    "tiny": Shape(8, 256, 704, 2000, 4, 2),
}
TARGETS = {
    "linear": tuple(SHAPES["tiny"].linear),
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and the shape of each of a model's tensors, as transformers orders them."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, size in shape.linear.items():
            yield f"model.layers.{layer}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def values(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return a tensor's values in bfloat16: ones for a norm, else random."""
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    rows, n = size
    block = (torch.randn(_DRAWN, n, generator=generator) * 0.02).bfloat16()
    return torch.cat([block.roll(i, dims=1) for i in range(-(-rows // _DRAWN))])[:rows]


def write_base(folder: Path, shape: Shape) -> None:
    """Write a checkpoint."""
    folder.mkdir(parents=True)
    files: list[dict[str, tuple[int, ...]]] = []
    room = 0
    for name, size in tensors(shape):
        if 2 * math.prod(size) > room:
            files.append({})
            room = FILE_BYTES
        files[-1][name] = size
        room -= 2 * math.prod(size)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for i, held in enumerate(files):
        name = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        _write_file(folder / name, held, generator)
        weight_map |= dict.fromkeys(held, name)
    if len(files) > 1:
        total = sum(2 * math.prod(size) for _, size in tensors(shape))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config))


def _write_file(file: Path, held: dict[str, tuple[int, ...]], generator: torch.Generator) -> None:
    """Write a safetensors file a tensor at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in held.items():
        header[name] = {"dtype": "BF16", "shape": size, "data_offsets": [end, end := end + 2 * math.prod(size)]}
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with file.open("wb") as out:
        out.write(len(told).to_bytes(8, "little") + told)
        for size in held.values():
            out.write(values(size, generator).view(torch.int16).numpy().data)


def write_adapter(
    folder: Path, shape: Shape, num_factors: int, block_size: int, *, targets: str = "linear", std: float = 0.02
) -> None:
    """Write a PEFT BOFT adapter for all linear layers, or for queries and values alone."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    trained = {}
    for layer in range(shape.layers):
        for name in TARGETS[targets]:
            out, n = shape.linear[name]
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            blocks = (num_factors, n // block_size, block_size, block_size)
            trained[f"{prefix}.boft_R"] = torch.randn(blocks, generator=generator) * std
            trained[f"{prefix}.boft_s"] = 1 + torch.randn(out, 1, generator=generator) * std
    save_file(trained, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "BOFT",
        "peft_version": "0.21.2",
        "exclude_modules": None,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": [name.rpartition(".")[2] for name in TARGETS[targets]],
        "boft_block_size": block_size,
        "boft_n_butterfly_factor": num_factors,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Write a base, and an adapter for each kind of targets, below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--targets", choices=TARGETS, help="of one adapter; else of one each, adapter-qv and so on")
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--std", type=float, default=0.02, help="of what is trained")
    args = parser.parse_args()
    shape = SHAPES[args.shape].slice(args.gigabytes * 1e9)
    write_base(args.folder / "base", shape)
    for targets in (args.targets,) if args.targets else TARGETS:
        folder = args.folder / ("adapter" if args.targets else f"adapter-{targets}")
        write_adapter(folder, shape, args.factors, args.block_size, targets=targets, std=args.std)
    print(f"{shape.layers} layers in {args.folder}")


if __name__ == "__main__":
    main()
