"""What tests share: small checkpoints and adapters made on disk, and an oracle for the merge."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file, save_file
from torch import Tensor

# For property tests: no time limit for one example, since machines are shared.
properties = settings(deadline=None, max_examples=50)

# For what transformers 4 does not have, or has in another form.
needs_transformers_5 = pytest.mark.skipif(
    importlib.metadata.version("transformers").startswith("4."), reason="needs transformers 5"
)

# The config that today's PEFT writes, as far as a merge looks at it.
PEFT_CONFIG = {
    "peft_type": "BOFT",
    "peft_version": "0.21.2",
    "exclude_modules": None,
    "boft_block_num": 0,
    "bias": "none",
    "base_model_name_or_path": None,
    "modules_to_save": None,
}


def write_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """Write a checkpoint of ``shards`` files as save_pretrained lays it out; tensors go to the files in turn."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "test"}))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        part = {t: tensors[t] for t, file in weight_map.items() if file == name}
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def boft_tensors(
    module: str, n: int, out: int, *, m: int = 2, b: int = 4, std: float = 0.3, seed: int = 0
) -> dict[str, Tensor]:
    """Return the two tensors of a trained BOFT layer, under the keys PEFT saves."""
    generator = torch.Generator().manual_seed(seed)
    prefix = f"base_model.model.{module}"
    return {
        f"{prefix}.boft_R": torch.randn(m, n // b, b, b, generator=generator) * std,
        f"{prefix}.boft_s": 1 + torch.randn(out, 1, generator=generator) * 0.1,
    }


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, drop: tuple[str, ...] = ()
) -> Path:
    """Write an adapter as PEFT does; ``config`` adds to PEFT's, ``drop`` takes keys away from it."""
    folder.mkdir(parents=True)
    full = {k: v for k, v in {**PEFT_CONFIG, **(config or {})}.items() if k not in drop}
    (folder / "adapter_config.json").write_text(json.dumps(full))
    save_file(dict(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def butterfly_matrix(blocks: Tensor) -> Tensor:
    """Return the dense R (n, n), float64, of PEFT's boft_R (m, D, b, b): the formula, block by block."""
    m, count, b, _ = blocks.shape
    n, h = count * b, b // 2
    product = torch.eye(n, dtype=torch.float64)
    eye = torch.eye(b, dtype=torch.float64)
    for i in range(m):
        factor = torch.zeros(n, n, dtype=torch.float64)
        for d in range(count):
            g, j = divmod(d, 2**i)
            first = g * b * 2**i + j * h
            second = g * b * 2**i + (j + 2**i) * h
            index = [*range(first, first + h), *range(second, second + b - h)]
            a = blocks[i, d].double()
            s = (a - a.T) / 2
            factor[torch.tensor(index)[:, None], torch.tensor(index)] = (eye - s) @ torch.linalg.inv(eye + s)
        product = factor @ product
    return product


def expected_merge(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return diag(s) W R^T in float64 for one layer's ``boft_tensors``."""
    blocks = next(v for k, v in tensors.items() if k.endswith("boft_R"))
    scale = next(v for k, v in tensors.items() if k.endswith("boft_s")).double().reshape(-1, 1)
    flat = weight.double().reshape(weight.shape[0], -1)
    return (scale * (flat @ butterfly_matrix(blocks).T)).reshape(weight.shape)


def load_tool(name: str) -> ModuleType:
    """Return one of the scripts in tools/ as a module."""
    path = Path(__file__).parent.parent / "tools" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
