"""PEFT's own code as the oracle: run in float64, and rounded by arithmetic that the package has no part in."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import BOFTConfig, PeftModel, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from safetensors.torch import load_file, save_file
from support import read_folder, write_checkpoint
from torch import Tensor, nn

import boft_export

enable_butterflies_on_cpu()

# An adapter's tensors are drawn at random from a fixed seed, so every run of a case sees the same numbers.
SEED = 1234
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Bits of a dtype's fraction, the leading one included, and the exponent of its smallest subnormal.
FORMAT = {"float32": (24, -149), "bfloat16": (8, -133), "float16": (11, -24)}


class Net(nn.Module):
    """Two layers of a kind in a row, and a head: what PEFT needs to find modules by name."""

    def __init__(self, first: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"first": first} | ({"second": second} if second is not None else {}))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.body.values():
            x = module(x)
        return x


def adapt(net: nn.Module, **config: Any) -> PeftModel:
    """Put a random adapter into a copy of ``net``; whatever PEFT would train differs from its start."""
    settings = {"target_modules": ["first", "second"], "boft_block_size": 4, "init_weights": False} | config
    model = get_peft_model(copy.deepcopy(net), BOFTConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "boft_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def merged_by_peft(model: PeftModel, dtype: torch.dtype, names: list[str] | None = None) -> dict[str, Tensor]:
    """Return what PEFT's own merge gives in ``dtype``; the adapted model stays as it is."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            rotation, scale = module.get_delta_weight(model.active_adapter)
            assert rotation.dtype is scale.dtype is dtype
            # Had any step run in float32, this would be near 1e-7.
            identity = torch.eye(rotation.shape[0], dtype=dtype)
            assert (rotation @ rotation.T - identity).abs().max() < (1e-13 if dtype is torch.float64 else 1e-5)
    return {k: v.detach() for k, v in model.merge_and_unload(adapter_names=names).state_dict().items()}


def round_to(x: Tensor, dtype: str) -> Tensor:
    """Round float64 values once, to nearest with ties to even; the result is in float64 still.

    Every step but ``rint`` is exact: a value is divided by the spacing of the target's numbers around it, a power of 2.
    """
    precision, smallest = FORMAT[dtype]
    values = x.numpy()
    spacing = np.ldexp(1.0, np.maximum(np.frexp(values)[1] - precision, smallest))
    return torch.from_numpy(np.rint(values / spacing) * spacing)


def assert_same_as_oracle(found: dict[str, Tensor], oracle: dict[str, Tensor], dtype: str) -> None:
    """Hold every tensor against the float64 oracle: the half precisions exactly, float32 to its own precision."""
    assert found.keys() == oracle.keys()
    for name, exact in oracle.items():
        assert exact.dtype is torch.float64
        assert found[name].dtype is DTYPES[dtype], name
        assert found[name].shape == exact.shape, name
        if dtype == "float32":
            assert (found[name].double() - exact).abs().max() <= 1e-7 * exact.abs().max(), name
        else:
            # float64's own error is some 2^40 times smaller than the spacing: to sit on a tie would be a rare accident.
            assert torch.equal(found[name].double(), round_to(exact, dtype)), name


def save(folder: Path, net: nn.Module, model: PeftModel) -> tuple[Path, Path]:
    base = write_checkpoint(folder / "base", net.state_dict())
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(SEED)


# m, b, features, outputs. The features are one coupled group of b 2^(m-1), or several.
SHAPES = [
    *((m, b, b * 2 ** (m - 1) * (3 if m < 4 else 1), 20) for m in range(1, 6) for b in (2, 4, 6, 8)),
    (1, 3, 15, 20),
    (1, 5, 5, 20),
    (1, 5, 40, 7),
    (1, 16, 16, 1),
    (2, 8, 96, 33),
    (5, 2, 96, 5),
]


@pytest.mark.parametrize(("m", "b", "n", "out"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear(tmp_path: Path, *, m: int, b: int, n: int, out: int, dtype: str) -> None:
    net = Net(nn.Linear(n, out), nn.Linear(n, out, bias=False)).to(DTYPES[dtype])
    model = adapt(net, boft_block_size=b, boft_n_butterfly_factor=m)
    assert model.base_model.model.body["first"].boft_R["default"].shape == (m, n // b, b, b)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out")

    found = read_folder(tmp_path / "out")
    assert_same_as_oracle(found, merged_by_peft(model, torch.float64), dtype)
    assert not torch.equal(found["body.first.weight"], net.body["first"].weight)
    for name in ("body.first.bias", "head.weight", "norm.bias"):
        assert torch.equal(found[name], net.state_dict()[name])


@pytest.mark.parametrize(("m", "blocks"), [(1, 1), (1, 3), (1, 6), (2, 2), (2, 12), (3, 4), (4, 24)])
def test_linear_by_number_of_blocks(tmp_path: Path, m: int, blocks: int) -> None:
    net = Net(nn.Linear(48, 10), nn.Linear(96, 10))
    model = adapt(net, boft_block_size=0, boft_block_num=blocks, boft_n_butterfly_factor=m)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out")

    assert_same_as_oracle(read_folder(tmp_path / "out"), merged_by_peft(model, torch.float64), "float32")


CONVOLUTIONS = [
    # m, b, channels, kernel
    (1, 2, 6, 1),
    (1, 3, 6, 3),
    (1, 9, 3, 3),
    (2, 4, 8, 1),
    (2, 4, 8, 3),
    (2, 6, 4, 3),
    (3, 2, 8, 1),
    (3, 6, 8, 3),
    (4, 2, 16, 3),
    (5, 2, 32, 1),
]


@pytest.mark.parametrize(("m", "b", "channels", "kernel"), CONVOLUTIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conv2d(tmp_path: Path, *, m: int, b: int, channels: int, kernel: int, dtype: str) -> None:
    net = Net(nn.Conv2d(channels, 10, kernel), nn.Conv2d(channels, 7, kernel, stride=2, bias=False)).to(DTYPES[dtype])
    model = adapt(net, boft_block_size=b, boft_n_butterfly_factor=m)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out")

    found = read_folder(tmp_path / "out")
    assert_same_as_oracle(found, merged_by_peft(model, torch.float64), dtype)
    assert not torch.equal(found["body.first.weight"], net.body["first"].weight)


@pytest.mark.parametrize(("m", "b", "channels", "kernel"), CONVOLUTIONS)
@pytest.mark.parametrize("with_p", [False, True])
def test_conv2d_of_old_peft(tmp_path: Path, *, m: int, b: int, channels: int, kernel: int, with_p: bool) -> None:
    """Up to PEFT 0.13 the same keys meant R @ W.view(n, out) * s; a Linear meant what it means today."""
    net = Net(nn.Conv2d(channels, 10, kernel), nn.Linear(channels * kernel**2, 9))
    model = adapt(net, boft_block_size=b, boft_n_butterfly_factor=m)
    base, adapter = save(tmp_path, net, model)
    _age(adapter, model if with_p else None)

    boft_export.merge(base, adapter, tmp_path / "out")

    oracle = merged_by_peft(model, torch.float64)
    todays = oracle["body.first.weight"]
    layer = copy.deepcopy(model).double().base_model.model.body["first"]
    rotation, scale = (t.detach() for t in layer.get_delta_weight("default"))
    weight = net.body["first"].weight.detach().double()
    old = (rotation @ weight.reshape(-1, 10)) * scale.reshape(1, 10)
    oracle["body.first.weight"] = old.reshape(weight.shape)
    assert (oracle["body.first.weight"] - todays).abs().max() > 1e-2
    assert_same_as_oracle(read_folder(tmp_path / "out"), oracle, "float32")


def _age(adapter: Path, model: PeftModel | None) -> None:
    """Make a saved adapter look like one of PEFT 0.13, or with ``model``'s permutations in it of 0.12."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    del config["exclude_modules"], config["peft_version"]
    file.write_text(json.dumps(config))
    if model is not None:
        weights = adapter / "adapter_model.safetensors"
        permutations = {k: v.contiguous() for k, v in model.named_buffers() if k.endswith("boft_P")}
        assert len(permutations) == 2
        save_file({**load_file(weights), **permutations}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_dtype_rounds_once(tmp_path: Path, dtype: str) -> None:
    """A float32 base written in half precision: each element is rounded once, from its exact value."""
    net = Net(nn.Linear(64, 300), nn.Conv2d(4, 200, 4))
    model = adapt(net, boft_n_butterfly_factor=3)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out", dtype=dtype)

    assert_same_as_oracle(read_folder(tmp_path / "out"), merged_by_peft(model, torch.float64), dtype)


def test_rounding_oracle_knows_double_rounding() -> None:
    """The oracle of the half precisions tells a single rounding from one by way of float32."""
    above_tie = torch.tensor([1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8], dtype=torch.float64)
    assert round_to(above_tie, "bfloat16").tolist() == [1 + 2.0**-7, 1.0, 1.0]
    assert round_to(above_tie, "float16").tolist() == [1 + 2.0**-8, 1 + 2.0**-10, 1 + 2.0**-8]
    assert above_tie.to(torch.bfloat16)[0] == 1.0
    values = torch.randn(10_000, dtype=torch.float64) * torch.logspace(-8, 4, 10_000, dtype=torch.float64)
    assert np.array_equal(round_to(values, "float16").numpy(), values.numpy().astype(np.float16).astype(np.float64))
    assert np.array_equal(round_to(values, "float32").numpy(), values.numpy().astype(np.float32).astype(np.float64))


@pytest.mark.parametrize(("m", "b"), [(1, 8), (3, 4), (5, 2)])
def test_float32_as_people_run_peft(tmp_path: Path, m: int, b: int) -> None:
    net = Net(nn.Linear(32, 24), nn.Conv2d(8, 24, 2))
    model = adapt(net, boft_block_size=b, boft_n_butterfly_factor=m)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out")

    found = read_folder(tmp_path / "out")
    for name, expected in merged_by_peft(model, torch.float32).items():
        assert (found[name] - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("order", [["default", "style"], ["style", "default"]])
def test_two_adapters_in_sequence(tmp_path: Path, dtype: str, kind: str, order: list[str]) -> None:
    first = nn.Linear(36, 10) if kind == "linear" else nn.Conv2d(4, 10, 3)
    net = Net(first, nn.Linear(12, 5)).to(DTYPES[dtype])
    model = adapt(net, boft_block_size=2, boft_n_butterfly_factor=2)
    model.add_adapter("style", model.peft_config["default"])
    base, adapter = save(tmp_path, net, model)
    folders = {"default": adapter, "style": adapter / "style"}

    boft_export.merge(base, [folders[name] for name in order], tmp_path / "out")

    oracle = merged_by_peft(model, torch.float64, order)
    other_way = merged_by_peft(model, torch.float64, order[::-1])
    assert (oracle["body.first.weight"] - other_way["body.first.weight"]).abs().max() > 1e-3
    assert_same_as_oracle(read_folder(tmp_path / "out"), oracle, dtype)


@pytest.mark.parametrize("bias", ["none", "all", "boft_only"])
@pytest.mark.parametrize("saved", [None, ["head"], ["head", "norm"]])
def test_trained_biases_and_modules(tmp_path: Path, bias: str, saved: list[str] | None) -> None:
    net = Net(nn.Linear(16, 8), nn.Conv2d(4, 6, 2))
    model = adapt(net, boft_n_butterfly_factor=2, bias=bias, modules_to_save=saved)
    base, adapter = save(tmp_path, net, model)

    boft_export.merge(base, adapter, tmp_path / "out")

    found, before = read_folder(tmp_path / "out"), net.state_dict()
    assert_same_as_oracle(found, merged_by_peft(model, torch.float64), "float32")
    changed = {name for name in found if not torch.equal(found[name], before[name])}
    expected = {"body.first.weight", "body.second.weight"}
    expected |= {f"{module}.{leaf}" for module in saved or () for leaf in ("weight", "bias")}
    if bias != "none":
        expected |= {"body.first.bias", "body.second.bias"}
    if bias == "all":
        expected |= {"head.bias", "norm.bias"}
    assert changed == expected
