"""A checkpoint and an adapter with a large model's shapes and random values, to measure with."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

# A decoder layer of Llama-3-8B: (outputs, inputs) of each linear layer.
LINEAR = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYER_BYTES = sum(2 * out * n for out, n in LINEAR.values())


def layer_tensors(layer: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a decoder layer's tensors, bfloat16."""
    for name, (out, n) in LINEAR.items():
        # One row block drawn at random and shifted by rows: as good as random for a merge, and fast to make.
        block = (torch.randn(64, n, generator=generator) * 0.02).bfloat16()
        weight = torch.cat([block.roll(i, dims=1) for i in range(out // 64)])
        yield f"model.layers.{layer}.{name}.weight", weight
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{layer}.{name}.weight", torch.ones(4096, dtype=torch.bfloat16)


def write_base(folder: Path, size: int) -> int:
    """Write a checkpoint of about ``size`` bytes, a file for each two layers; return the number of layers."""
    folder.mkdir(parents=True)
    layers = max(1, round(size / LAYER_BYTES))
    generator = torch.Generator().manual_seed(0)
    files = -(-layers // 2)
    weight_map: dict[str, str] = {}
    for i in range(files):
        name = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        tensors = dict(t for layer in range(2 * i, min(2 * i + 2, layers)) for t in layer_tensors(layer, generator))
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return layers


def write_adapter(folder: Path, layers: int, num_factors: int, block_size: int, std: float = 0.02) -> None:
    """Write a PEFT BOFT adapter for all linear layers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(layers):
        for name, (out, n) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shape = (num_factors, n // block_size, block_size, block_size)
            tensors[f"{prefix}.boft_R"] = torch.randn(shape, generator=generator) * std
            tensors[f"{prefix}.boft_s"] = 1 + torch.randn(out, 1, generator=generator) * std
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "BOFT", "peft_version": "0.21.2", "exclude_modules": None, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main() -> None:
    """Write both below a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--factors", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=8)
    args = parser.parse_args()
    layers = write_base(args.folder / "base", int(args.gigabytes * 1e9))
    write_adapter(args.folder / "adapter", layers, args.factors, args.block_size)
    print(f"{layers} layers, {layers * LAYER_BYTES / 1e9:.2f} GB in {args.folder}")


if __name__ == "__main__":
    main()
