"""Rotations of numpy arrays: the same as those of tensors, and made without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import boft_tensors, properties, write_adapter, write_checkpoint
from threadpoolctl import threadpool_info

from boft_export import native
from boft_export.adapters import AdapterLayer, Parametrization, Storage
from boft_export.checkpoint.tensors import HeldBytes, TensorRef
from boft_export.errors import InputError
from boft_export.linalg import neumann
from boft_export.linalg.butterfly import butterfly_index
from boft_export.linalg.cayley import cayley, from_triangle, shrink, skew
from boft_export.linalg.planner import Costs, plan_stages
from boft_export.linalg.rotation import Factor, Rotation
from boft_export.pipeline.array_io import read_array
from boft_export.pipeline.layers import build_arrays, build_layer
from boft_export.pipeline.one_blas_thread import OneBlasThread
from boft_export.pipeline.torch_io import as_bytes, read_tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def held(values: torch.Tensor, dtype: str) -> TensorRef:
    return TensorRef("x", dtype, tuple(values.shape), HeldBytes(as_bytes(values.contiguous())), "x.safetensors")


def close(tensor: torch.Tensor, array: object, tolerance: float = 1e-15) -> bool:
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float64
    return bool(np.abs(tensor.numpy() - array).max() <= tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_are_read_as_tensors_are(dtype):
    bits = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-6, 2.0**-130, 65504.0, 1.0]).to(DTYPES[dtype])
    for values in (bits.view(DTYPES[dtype]), special, special[:0], special[-1]):
        ref = held(values, dtype)
        assert np.array_equal(read_array(ref), read_tensor(ref).numpy(), equal_nan=True)
        assert np.array_equal(np.signbit(read_array(ref)), read_tensor(ref).signbit().numpy())


@pytest.mark.parametrize("b", [1, 4, 7, 32])
def test_the_mathematics_is_the_same_on_arrays_and_tensors(b):
    a = randn(2, 3, b, b) * 0.1
    entries = randn(2, 3, b * (b - 1) // 2)
    s = skew(a)
    assert np.array_equal(skew(a.numpy()), s.numpy())
    assert np.array_equal(from_triangle(entries.numpy(), b), from_triangle(entries, b).numpy())
    for norm in (0.2, 1e9):
        assert close(shrink(a, norm), shrink(a.numpy(), norm))
    assert close(cayley(s), cayley(s.numpy()))
    assert close(neumann.polynomial(s, (1, 2, 2, 1)), neumann.polynomial(s.numpy(), (1, 2, 2, 1)))
    residuals = [neumann.expected_residual(x, (1, 2, 2, 1)) for x in (s, s.numpy())]
    assert residuals[0] == pytest.approx(residuals[1], rel=1e-10, abs=1e-15)


@properties
@given(st.integers(1, 5), st.sampled_from([2, 4, 6, 8]), st.integers(1, 3), st.sampled_from([1, 8, 16]))
def test_fused_stages_are_the_same_on_arrays_and_tensors(m, b, groups, smallest):
    count = groups * 2 ** (m - 1)
    q = cayley(skew(randn(m, count, b, b) * 0.5))
    tensors = Rotation(tuple(Factor(q[i], butterfly_index(i, count, b)) for i in range(m)))
    arrays = Rotation(tuple(Factor(q[i].numpy(), butterfly_index(i, count, b, np)) for i in range(m)))
    assert tensors.residual() == pytest.approx(arrays.residual(), abs=1e-15)
    for costs in (Costs({4: 1.0, 1024: 1.1}, smallest, 9.0), Costs({4: 1.0, 1024: 1e6}, smallest, 0.0)):
        for one, other in zip(
            tensors.fused(smallest, costs).factors, arrays.fused(smallest, costs).factors, strict=True
        ):
            assert np.array_equal(one.index.numpy(), other.index)
            assert close(one.blocks, other.blocks)


def test_costs_of_another_kernel_make_another_plan():
    cheap, dear = Costs({8: 1.0, 64: 1.2}, 8, 0.0), Costs({8: 1.0, 64: 100.0}, 8, 0.0)
    assert plan_stages(3, lambda i, j: 8 << (j - i - 1), cheap) == [(0, 3)]
    assert plan_stages(3, lambda i, j: 8 << (j - i - 1), dear) == [(0, 1), (1, 2), (2, 3)]


LAYERS = [
    AdapterLayer("m", "blocks", "scale", 2, 4, 8, 32),
    AdapterLayer("m", "blocks", None, 1, 4, 8, None, storage=Storage.TRIANGLE, transposed=True, max_norm=0.3),
    AdapterLayer(
        "m", "blocks", None, 1, 4, 8, None, Parametrization.NEUMANN, storage=Storage.TRIANGLE, series=(1, 2, 2, 2),
        shared=True,
    ),
]  # fmt: skip


def source_of(layer: AdapterLayer, factor: float = 0.1) -> SimpleNamespace:
    entries = 28 if layer.storage is Storage.TRIANGLE else 64
    blocks = randn(layer.num_factors, 1 if layer.shared else 4, entries) * factor
    return SimpleNamespace(name="a", refs={"blocks": held(blocks, "F64"), "scale": held(1 + randn(32) * 0.1, "F64")})


@pytest.mark.parametrize("layer", LAYERS, ids=["boft", "coft", "shared"])
def test_a_layer_is_built_of_arrays_and_given_as_tensors(layer):
    source = source_of(layer)
    arrays, tensors = build_arrays(source, layer), build_layer(source, layer)
    for one, other in zip(arrays.rotation.factors, tensors.rotation.factors, strict=True):
        assert isinstance(one.blocks, np.ndarray)
        assert isinstance(other.blocks, torch.Tensor)
        assert np.array_equal(one.blocks, other.blocks.numpy())
        assert (one.generator is None) == (other.generator is None) == (not layer.is_orthogonal)
    back = arrays.inverse().rotation.tensors().dense() @ tensors.rotation.dense()
    assert float((back - torch.eye(32, dtype=torch.float64)).abs().max()) < 1e-13
    assert isinstance(arrays.scale, np.ndarray) == isinstance(tensors.scale, torch.Tensor) == (layer.scale is not None)


@pytest.mark.parametrize("layer", LAYERS[::2], ids=["boft", "shared"])
@pytest.mark.parametrize("factor", [float("nan"), 1e308])
def test_values_that_give_no_rotation_are_refused(layer, factor):
    with pytest.raises(InputError, match="too large to give a rotation"):
        build_arrays(source_of(layer, factor * 100), layer)


def test_large_blocks_are_the_same_for_any_number_of_blas_threads() -> None:
    code = """
import hashlib
import numpy as np
from types import SimpleNamespace
from boft_export.adapters import AdapterLayer, View
from boft_export.checkpoint.tensors import HeldBytes, TensorRef
from boft_export.linalg.path import InterpolationPath
from boft_export.pipeline.layers import LayerCache
blocks = np.random.default_rng(0).standard_normal((2, 4, 256, 256)) * 0.05
source = SimpleNamespace(name="a", refs={"b": TensorRef("b", "F64", blocks.shape, HeldBytes(blocks.tobytes()), "f")})
step = SimpleNamespace(adapter=0, layer=AdapterLayer("m", "b", None, 2, 4, 256, None), view=View.INPUT)
course = SimpleNamespace(path=InterpolationPath.GEODESIC, alphas_of_layers=lambda _: {(0, "m"): [1.0]})
cache = LayerCache(SimpleNamespace(adapters=[source]), course, None, 1 << 30, inverse=True)
for factor in cache.get(step, 1.0, None).rotation.factors:
    print(hashlib.sha256(factor.blocks).hexdigest())
"""
    found = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, env={**os.environ, "OPENBLAS_NUM_THREADS": n}
        ).stdout
        for n in ("1", "2", "4")
    }
    assert len(found) == 1


def test_the_limit_of_threads_is_lifted_by_whoever_leaves_last() -> None:
    def numbers() -> list[int]:
        return [p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"]

    limit, before = OneBlasThread(), numbers()
    with limit:
        with limit:
            assert set(numbers()) == {1}
        assert set(numbers()) == {1}
    assert numbers() == before


def test_operators_and_checks_load_no_torch(base: Path, adapter: Path, tmp_path: Path) -> None:
    code = """
import sys
from boft_export.pipeline.layers import LayerCache, inspect_values
from boft_export.pipeline.options import RunOptions
from boft_export.pipeline.prepare import prepare
from boft_export.planning.strength import Interpolation
import numpy as np
ready = prepare(sys.argv[1], [sys.argv[2]], sys.argv[3], Interpolation(), RunOptions(), "cpu")
steps = [s for t in ready.plan.tensors for s in t.steps]
assert steps
for inverse in (False, True):
    cache = LayerCache(ready.plan, ready.course, None, 1 << 30, inverse=inverse)
    for step in steps:
        operator = cache.get(step, 1.0, None)
        assert isinstance(operator.scale, np.ndarray)
        assert all(isinstance(x, np.ndarray) for f in operator.rotation.factors for x in (f.blocks, f.index))
assert not inspect_values(ready.plan.adapters[0])[1]
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, base, adapter, tmp_path / "out"], check=True)


# What was expected of a run, and whether torch was loaded in it.
RUN = """
import json, sys
import boft_export
from boft_export.pipeline import prepare
arguments, expected, needs_torch = json.loads(sys.argv[1]), [], prepare.needs_torch
prepare.needs_torch = lambda *given: expected.append(needs_torch(*given)) or expected[-1]
boft_export.interpolate(**arguments)
print(json.dumps([*expected, "torch" in sys.modules]))
"""


@pytest.mark.skipif(native.instruction_set() is None, reason="there is no compiled kernel")
@pytest.mark.parametrize(
    ("options", "loads"),
    [
        ({"alphas": [1]}, False),
        ({"alphas": [0, 1]}, False),
        ({"alphas": [1], "dtype": "float32"}, False),
        ({"alphas": [0.5, 1], "path": "linear", "alpha_map": {"head.weight": 1}}, False),
        ({"alphas": [0.5], "path": "linear"}, True),
        ({"alphas": [1], "alpha_map": {"layers.0.up.weight": 0.5}}, True),
        ({"alphas": [1], "compute_dtype": "float32"}, True),
        ({"alphas": [1], "kernel": "torch"}, True),
    ],
    ids=lambda x: ", ".join(f"{k} {v}" for k, v in x.items()) if isinstance(x, dict) else None,
)
def test_a_run_knows_beforehand_whether_it_loads_torch(tmp_path, options, loads):
    """It decides how much memory there is for the rest."""
    layers = {f"layers.{i}.up": (16, 24) for i in range(2)}
    weights = {f"{m}.weight": torch.randn(shape, generator=torch.Generator()).half() for m, shape in layers.items()}
    base = write_checkpoint(tmp_path / "base", weights | {"head.weight": torch.ones(8, 16).half()})
    trained = {k: v for m, (out, n) in layers.items() for k, v in boft_tensors(m, n, out).items()}
    trained["base_model.model.head.weight"] = torch.full((8, 16), 2.0)
    adapter = write_adapter(tmp_path / "adapter", trained, {"modules_to_save": ["head"]})
    given = {**options, "base": str(base), "adapters": str(adapter), "output": str(tmp_path / "out")}
    environment = {**os.environ, "BOFT_EXPORT_KERNEL": given.pop("kernel", "")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(given)], check=True, capture_output=True, env=environment, text=True
    )
    assert json.loads(done.stdout) == [loads, loads]
