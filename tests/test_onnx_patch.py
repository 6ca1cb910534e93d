"""Folding into graphs that exist: files of ours and of other programs, and all that is refused."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import set_external_data
from safetensors.torch import load_file
from support import boft_tensors, expected_merge, write_adapter
from torch import Tensor
from typer.testing import CliRunner

from boft_export import (
    AccessError,
    CheckFailedError,
    DamagedFileError,
    ExportResult,
    InputError,
    UsageError,
    export_onnx,
    merge,
)
from boft_export.cli.main import app

BERT = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
SELF = "encoder.layer.0.attention.self"
QUERY, KEY, VALUE = (f"{SELF}.{part}.weight" for part in ("query", "key", "value"))
DATA = "model.onnx_data"
ONNX_DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and an adapter of its queries and values."""
    from transformers import BertConfig, BertModel

    made = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = BertModel(BertConfig(**BERT))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(made / "base")
    tensors = [boft_tensors(f"{SELF}.{part}", 32, 32, seed=i) for i, part in enumerate(("query", "value"))]
    write_adapter(made / "adapter", tensors[0] | tensors[1])
    return made


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "base" / "model.safetensors")


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    """The base, exported by us."""
    return export_onnx(folder / "base", (), folder / "ours").output


def tuned(folder: Path, name: str, adapter: str = "adapter") -> Tensor:
    """Return what a weight becomes, in float64."""
    blocks = load_file(folder / adapter / "adapter_model.safetensors")
    own = {k: v for k, v in blocks.items() if name.removesuffix(".weight") in k}
    return expected_merge(load_file(folder / "base" / "model.safetensors")[name], own)


def write_graph(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    location: str | None = None,
    places: Mapping[str, tuple[int, int]] | None = None,
    operator: str = "Identity",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a graph that holds tensors, and computes nothing; external data of ``places`` is expected to be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    initializers = []
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        made = helper.make_tensor(name, ONNX_DTYPES[tensor.dtype], tensor.shape, raw, raw=True)
        if location is not None:
            offset, nbytes = places[name] if places else (len(data), len(raw))
            set_external_data(made, location, offset, nbytes)
            made.ClearField("raw_data")
            data += raw + bytes(-len(raw) % 64)
        initializers.append(made)
    if location is not None and places is None:
        (path.parent / location).write_bytes(data)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy")
    node = helper.make_node(operator, ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], initializers))
    helper.set_model_props(model, dict(metadata or {}))
    path.write_bytes(model.SerializeToString())
    return path


def patch(folder: Path, graph: Path, output: Path, adapter: str = "adapter", **options: Any) -> ExportResult:
    return export_onnx(folder / "base", folder / adapter, output, base_onnx=graph, **options)


def stored(path: Path) -> dict[str, Any]:
    return {i.name: numpy_helper.to_array(i).copy() for i in onnx.load(path).graph.initializer}


def files(path: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in path.glob("*.onnx*")}


def same(found: Any, wanted: Tensor) -> bool:
    return np.array_equal(np.asarray(found, np.float64), wanted.double().numpy())


def test_a_patched_graph_of_ours_is_a_fresh_export_byte_for_byte(folder: Path, ours: Path, tmp_path: Path) -> None:
    fresh = export_onnx(folder / "base", folder / "adapter", tmp_path / "fresh")
    result = patch(folder, ours / "model.onnx", tmp_path / "patched")
    assert files(tmp_path / "patched") == files(tmp_path / "fresh")
    assert files(tmp_path / "patched")[DATA] != files(ours)[DATA]
    assert result.graphs == fresh.graphs
    assert max(a.relative_difference for a in result.agreements) < 1e-5
    # As it is patched from a folder.
    patch(folder, ours, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "fresh")


def test_a_patched_graph_of_ours_is_a_fresh_export_of_the_merged_model(
    folder: Path, ours: Path, tmp_path: Path
) -> None:
    merge(folder / "base", folder / "adapter", tmp_path / "merged")
    export_onnx(tmp_path / "merged", (), tmp_path / "fresh")
    patch(folder, ours / "model.onnx", tmp_path / "patched")
    assert files(tmp_path / "patched")[DATA] == files(tmp_path / "fresh")[DATA]
    models = [onnx.load(tmp_path / n / "model.onnx", load_external_data=False) for n in ("patched", "fresh")]
    for model in models:
        del model.metadata_props[:]
    assert models[0].SerializeToString() == models[1].SerializeToString()


def test_a_patched_graph_is_no_base_but_can_be_patched_as_the_merged_models(
    folder: Path, ours: Path, tmp_path: Path
) -> None:
    merge(folder / "base", folder / "adapter", tmp_path / "merged")
    patch(folder, ours / "model.onnx", tmp_path / "patched")
    with pytest.raises(InputError, match="not of this base: 0 of the 2 tensors"):
        patch(folder, tmp_path / "patched" / "model.onnx", tmp_path / "wrong")
    export_onnx(
        tmp_path / "merged", folder / "adapter", tmp_path / "twice", base_onnx=tmp_path / "patched" / "model.onnx"
    )
    twice = export_onnx(folder / "base", [folder / "adapter"] * 2, tmp_path / "at-once", base_onnx=ours)
    names = [p.key for p in onnx.load(twice.output / "model.onnx", load_external_data=False).metadata_props]
    assert len(names) == len(set(names))


def test_alpha_goes_part_of_the_way(folder: Path, ours: Path, tmp_path: Path) -> None:
    patch(folder, ours / "model.onnx", tmp_path / "zero", alpha=0)
    assert files(tmp_path / "zero")[DATA] == files(ours)[DATA]


def test_what_a_graph_of_ours_does_not_use_is_named(folder: Path, ours: Path, tmp_path: Path) -> None:
    tensors = boft_tensors("pooler.dense", 32, 32) | boft_tensors(f"{SELF}.query", 32, 32)
    write_adapter(tmp_path / "pooled", tensors)
    result = export_onnx(folder / "base", tmp_path / "pooled", tmp_path / "out", base_onnx=ours / "model.onnx")
    assert [(n.code, n.subject) for n in result.plan.notices] == [("not-in-graph", "pooler.dense.weight")]
    graph = write_graph(tmp_path / "other.onnx", {QUERY: load_file(folder / "base" / "model.safetensors")[QUERY]})
    with pytest.raises(InputError, match=r"1 of the 2 .*pooler\.dense\.weight"):
        export_onnx(folder / "base", tmp_path / "pooled", tmp_path / "refused", base_onnx=graph)


class Flat(torch.nn.Module):
    """A model whose forward takes and gives tensors alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def torch_export(folder: Path, path: Path, *, dynamo: bool, fixed: bool = False) -> Path:
    """Export the base as torch does it by itself, its weights in the file."""
    from transformers import BertModel

    model = Flat(BertModel.from_pretrained(folder / "base", attn_implementation="eager").eval())
    tokens, mask = torch.ones(2, 2, 5, dtype=torch.long)
    # Else the mask would be traced away.
    mask[0, -2:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
    free = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    named = {n: {0: "batch", 1: "length"} for n in (*inputs, "last_hidden_state")}
    axes: dict[str, Any] = {"dynamic_shapes": [free] * 3} if dynamo else {"dynamic_axes": named}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(inputs.values()), path, dynamo=dynamo, external_data=False, verbose=False,
            input_names=list(inputs), output_names=["last_hidden_state"], **({} if fixed else axes),
        )  # fmt: skip
    return path


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
def test_torchs_own_exports_are_patched_where_their_weights_are(folder: Path, tmp_path: Path, dynamo: bool) -> None:
    before = onnx.load(torch_export(folder, tmp_path / "base.onnx", dynamo=dynamo))
    result = patch(folder, tmp_path / "base.onnx", tmp_path / "out")
    assert [a.output for a in result.agreements] == ["last_hidden_state"]
    assert max(a.relative_difference for a in result.agreements) < 1e-5
    assert list(files(tmp_path / "out")) == ["model.onnx"]
    after = onnx.load(tmp_path / "out" / "model.onnx")
    assert after.graph.node == before.graph.node
    changed = [a.name for a, b in zip(after.graph.initializer, before.graph.initializer, strict=True) if a != b]
    assert len(changed) == 2
    # They are not found by these.
    assert not set(changed) & {QUERY, VALUE}


def test_a_graph_that_computes_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    path = torch_export(folder, tmp_path / "base.onnx", dynamo=False)
    model = onnx.load(path)
    norm = next(i for i in model.graph.initializer if i.name.endswith("output.LayerNorm.weight"))
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32(1.5), norm.name))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckFailedError, match="The base's graph differs from the base as well"):
        patch(folder, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_graph_that_takes_no_other_shapes_is_said_not_to_be_verified(folder: Path, tmp_path: Path) -> None:
    path = torch_export(folder, tmp_path / "base.onnx", dynamo=False, fixed=True)
    result = patch(folder, path, tmp_path / "out")
    assert [n.code for n in result.plan.notices] == ["not-verified"]
    assert "can't run model.onnx" in result.plan.notices[0].message


@pytest.mark.parametrize("location", [None, "weights.bin"], ids=["embedded", "external"])
def test_weights_are_found_by_what_is_in_them(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path, location: str | None
) -> None:
    held = {"onnx::MatMul_12": weights[QUERY].T, "val_7": weights[VALUE], "k": weights[KEY].T, "b": weights[VALUE].T}
    graph = write_graph(tmp_path / "g" / "bert.onnx", held, location=location, metadata={"author": "somebody"})
    result = patch(folder, graph, tmp_path / "out")
    now = stored(tmp_path / "out" / "model.onnx")
    assert same(now["onnx::MatMul_12"], tuned(folder, QUERY).float().T)
    assert same(now["val_7"], tuned(folder, VALUE).float())
    assert same(now["b"], tuned(folder, VALUE).float().T)
    assert same(now["k"], weights[KEY].T)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    said = {p.key: p.value for p in model.metadata_props}
    assert said["author"] == "somebody"
    assert '"adapter"' in said["boft_export.adapters"]
    assert (tmp_path / "out" / "weights.bin").is_file() == (location is not None)
    assert [n.code for n in result.plan.notices] == ["not-verified"]
    assert result.agreements == ()


def test_weights_in_constants_and_in_branches_are_found(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    query, value = (numpy_helper.from_array(weights[n].T.contiguous().numpy()) for n in (QUERY, VALUE))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [32, 32])
    inner = helper.make_graph([helper.make_node("Constant", [], ["y"], value=query)], "inner", [], [y])
    # Floats of their own field, not raw.
    other = helper.make_tensor("y", TensorProto.FLOAT, [32, 32], weights[VALUE].flatten().tolist())
    outer = helper.make_graph([helper.make_node("Constant", [], ["y"], value=other)], "outer", [], [y])
    x = helper.make_tensor_value_info("x", TensorProto.BOOL, [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=outer)
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [value]))
    (tmp_path / "base.onnx").write_bytes(model.SerializeToString())
    patch(folder, tmp_path / "base.onnx", tmp_path / "out")
    found = onnx.load(tmp_path / "out" / "model.onnx").graph
    branches = {a.name: a.g.node[0].attribute[0].t for a in found.node[0].attribute}
    assert same(numpy_helper.to_array(branches["then_branch"]), tuned(folder, QUERY).float().T)
    assert same(numpy_helper.to_array(branches["else_branch"]), tuned(folder, VALUE).float())
    assert same(numpy_helper.to_array(found.initializer[0]), tuned(folder, VALUE).float().T)


@pytest.mark.parametrize("rows", [False, True], ids=["columns", "rows"])
def test_weights_that_are_stored_together_are_found(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path, rows: bool
) -> None:
    wide = torch.cat([weights[n] for n in (QUERY, KEY, VALUE)])
    stray = torch.randn(32, 7)
    held = {"stray": stray, "qkv_proj": wide if rows else wide.T}
    graph = write_graph(tmp_path / "g" / "model.onnx", held, location="model.onnx.data")
    graph.with_name("genai_config.json").write_text("{}")
    patch(folder, graph, tmp_path / "out")
    assert (tmp_path / "out" / "genai_config.json").read_text() == "{}"
    now = stored(tmp_path / "out" / "model.onnx")
    wanted = torch.cat([tuned(folder, QUERY).float(), weights[KEY], tuned(folder, VALUE).float()])
    assert same(now["qkv_proj"], wanted if rows else wanted.T)
    assert same(now["stray"], stray)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_a_narrower_graph_are_rounded_once(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path, dtype: torch.dtype
) -> None:
    held = {n: weights[n].to(dtype).T for n in (QUERY, VALUE)}
    patch(folder, write_graph(tmp_path / "half.onnx", held), tmp_path / "out")
    now = onnx.load(tmp_path / "out" / "model.onnx").graph.initializer
    for tensor in now:
        bits = torch.from_numpy(np.frombuffer(tensor.raw_data, np.int16).copy()).view(dtype).view(32, 32).T
        wanted = tuned(folder, tensor.name)
        nearest = (wanted - bits.double()).abs()
        step = (wanted.float().to(dtype).double() - wanted).abs()
        assert bool((nearest <= step).all())


def test_graphs_of_a_folder_share_their_data_as_before(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    held = {QUERY: weights[QUERY].T, VALUE: weights[VALUE].T}
    first = write_graph(tmp_path / "g" / "encoder_model.onnx", held, location=DATA)
    places = {"v": (4096, 4096)}
    write_graph(first.with_name("decoder_model.onnx"), {"v": held[VALUE]}, location=DATA, places=places)
    result = patch(folder, tmp_path / "g", tmp_path / "out")
    assert set(result.graphs) == {"encoder_model.onnx", "decoder_model.onnx"}
    assert set(files(tmp_path / "out")) == {"encoder_model.onnx", "decoder_model.onnx", "model.onnx_data"}
    assert same(stored(tmp_path / "out" / "decoder_model.onnx")["v"], tuned(folder, VALUE).float().T)
    assert same(stored(tmp_path / "out" / "encoder_model.onnx")[QUERY], tuned(folder, QUERY).float().T)


def test_one_other_element_makes_it_another_model(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    for i in (0, 517, 1023):
        other = weights[QUERY].clone()
        other.view(-1)[i] += 1e-6
        graph = write_graph(tmp_path / f"{i}.onnx", {QUERY: other, VALUE: weights[VALUE]})
        with pytest.raises(InputError, match=r"1 of the 2 tensors .* not so .*query\.weight"):
            patch(folder, graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def twins(folder: Path, tmp_path: Path) -> tuple[Path, Tensor]:
    """Return a folder whose base has the same values for query and value; the adapter changes them differently."""
    shutil.copytree(folder, tmp_path / "twins")
    tensors = load_file(tmp_path / "twins" / "base" / "model.safetensors")
    from safetensors.torch import save_file

    tensors[VALUE] = tensors[QUERY].clone()
    save_file(tensors, tmp_path / "twins" / "base" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "twins", tensors[QUERY]


def test_what_can_not_be_told_apart_is_refused_unless_each_has_its_name(folder: Path, tmp_path: Path) -> None:
    both, same_values = twins(folder, tmp_path)
    for i, held in enumerate(({"shared": same_values.T}, {QUERY: same_values.T}, {"a": same_values, "b": same_values})):
        graph = write_graph(tmp_path / f"{i}.onnx", held)
        with pytest.raises(InputError, match=r"query\.weight holds the same values as .*value\.weight"):
            patch(both, graph, tmp_path / "out")
    wide = write_graph(tmp_path / "wide.onnx", {"qkv": torch.cat([same_values, same_values])})
    with pytest.raises(InputError, match="which of them is in qkv"):
        patch(both, wide, tmp_path / "out")
    graph = write_graph(tmp_path / "named.onnx", {QUERY: same_values.T, VALUE: same_values.T})
    patch(both, graph, tmp_path / "out")
    now = stored(tmp_path / "out" / "model.onnx")
    assert same(now[QUERY], tuned(both, QUERY).float().T)
    assert same(now[VALUE], tuned(both, VALUE).float().T)


def test_a_matrix_that_is_its_own_transpose_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(folder, tmp_path / "square")
    tensors = load_file(tmp_path / "square" / "base" / "model.safetensors")
    tensors[QUERY] = tensors[QUERY] + tensors[QUERY].T
    save_file(tensors, tmp_path / "square" / "base" / "model.safetensors", metadata={"format": "pt"})
    graph = write_graph(tmp_path / "g.onnx", {QUERY: tensors[QUERY], VALUE: tensors[VALUE]})
    with pytest.raises(InputError, match="equals its own transpose"):
        patch(tmp_path / "square", graph, tmp_path / "out")


def test_a_quantised_graph_is_refused(folder: Path, weights: dict[str, Tensor], tmp_path: Path) -> None:
    small = {"w": torch.zeros(32, 32, dtype=torch.int8)}
    for i, operator in enumerate(("DequantizeLinear", "MatMulNBits", "Identity")):
        graph = write_graph(tmp_path / f"{i}.onnx", small, operator=operator)
        with pytest.raises(InputError, match="the graph is quantised"):
            patch(folder, graph, tmp_path / "out")
    # What is quantised of it is none of the adapter's.
    part = {"w": small["w"], QUERY: weights[QUERY], VALUE: weights[VALUE]}
    patch(folder, write_graph(tmp_path / "part.onnx", part), tmp_path / "out")
    assert same(stored(tmp_path / "out" / "model.onnx")[QUERY], tuned(folder, QUERY).float())


def test_tensors_of_other_shapes_need_a_fresh_export(folder: Path, ours: Path, tmp_path: Path) -> None:
    name = "base_model.model.embeddings.word_embeddings.weight"
    tensors = boft_tensors(f"{SELF}.query", 32, 32) | {name: torch.randn(101, 32)}
    write_adapter(tmp_path / "grown", tensors, {"modules_to_save": ["word_embeddings"]})
    with pytest.raises(InputError, match=r"\(101, 32\) with the adapters, and the base's is \(99, 32\)"):
        export_onnx(folder / "base", tmp_path / "grown", tmp_path / "out", base_onnx=ours)


def test_replaced_tensors_are_found_like_others(folder: Path, ours: Path, tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    new = torch.randn(99, 32)
    tensors = boft_tensors(f"{SELF}.query", 32, 32) | {f"base_model.model.{name}": new}
    write_adapter(tmp_path / "replaced", tensors, {"modules_to_save": ["word_embeddings"]})
    result = export_onnx(folder / "base", tmp_path / "replaced", tmp_path / "out", base_onnx=ours)
    assert same(stored(tmp_path / "out" / "model.onnx")[name], new)
    assert max(a.relative_difference for a in result.agreements) < 1e-5


def damaged_graphs(folder: Path, work: Path) -> dict[str, Path]:
    """Return graphs that can't be read, by what is wrong with them."""
    weights = load_file(folder / "base" / "model.safetensors")
    held = {QUERY: weights[QUERY], VALUE: weights[VALUE]}
    (work / "secret").write_bytes(bytes(1 << 14))
    found = {}
    places = {QUERY: (0, 4096), VALUE: (4096, 4096)}
    for kind, location in (("above", "../secret"), ("absolute", str(work / "secret")), ("missing", "nothing")):
        found[kind] = write_graph(work / kind / "g.onnx", held, location=location, places=places)
    found["link"] = write_graph(work / "link" / "g.onnx", held, location="inside", places=places)
    (work / "link" / "inside").symlink_to(work / "secret")
    found["truncated data"] = write_graph(work / "short" / "g.onnx", held, location="data")
    os.truncate(work / "short" / "data", 6000)
    whole = write_graph(work / "g.onnx", held).read_bytes()
    for kind, content in (
        ("truncated", whole[:5000]), ("empty", b""), ("text", b"{'model': 'onnx'}\n" * 9), ("no graph", b"\x08\x0a"),
        ("another", (folder / "base" / "model.safetensors").read_bytes()),
    ):  # fmt: skip
        found[kind] = work / f"{kind}.onnx"
        found[kind].write_bytes(content)
    return found


def test_damaged_graphs_are_refused_and_nothing_is_left_behind(folder: Path, tmp_path: Path) -> None:
    for kind, graph in damaged_graphs(folder, tmp_path).items():
        with pytest.raises(DamagedFileError) as caught:
            patch(folder, graph, tmp_path / "made" / "out")
        assert str(graph.parent) in str(caught.value), kind
    assert not (tmp_path / "made").exists()


def test_links_to_a_graph_are_followed_where_its_data_lies(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """As in the Hub's cache, where a snapshot's files are links to others in one folder."""
    held = {QUERY: weights[QUERY], VALUE: weights[VALUE]}
    write_graph(tmp_path / "blobs" / "a", held, location=DATA)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to(tmp_path / "blobs" / "a")
    (tmp_path / "snapshot" / "model.onnx_data").symlink_to(tmp_path / "blobs" / "model.onnx_data")
    patch(folder, tmp_path / "snapshot" / "model.onnx", tmp_path / "out")
    assert same(stored(tmp_path / "out" / "model.onnx")[QUERY], tuned(folder, QUERY).float())
    assert not any(f.is_symlink() for f in (tmp_path / "out").iterdir())


def test_inputs_are_never_written_to(folder: Path, ours: Path, tmp_path: Path) -> None:
    before = files(ours)
    for output in (ours, ours / "out"):
        with pytest.raises(UsageError, match="the graph's folder"):
            patch(folder, ours, output, overwrite=True)
    with pytest.raises(UsageError, match="no adapter"):
        export_onnx(folder / "base", (), tmp_path / "out", base_onnx=ours)
    with pytest.raises(AccessError, match="is not there"):
        patch(folder, tmp_path / "nowhere.onnx", tmp_path / "out")
    with pytest.raises(AccessError, match="no ONNX file"):
        patch(folder, folder / "base", tmp_path / "out")
    assert files(ours) == before


def test_the_command_patches_and_a_dry_run_finds_what_would_fail(folder: Path, ours: Path, tmp_path: Path) -> None:
    def run(graph: Path, *options: str) -> int:
        command = ["onnx", str(folder / "base"), str(folder / "adapter"), "-o", str(tmp_path / "out")]
        return CliRunner().invoke(app, [*command, "--base-onnx", str(graph), "--json", *options]).exit_code

    other = write_graph(tmp_path / "other.onnx", {"w": torch.randn(32, 32)})
    assert run(other, "-n") == 3
    assert run(tmp_path / "nowhere.onnx", "-n") == 4
    assert run(ours / "model.onnx", "-n") == 0
    assert not (tmp_path / "out").exists()
    assert run(ours / "model.onnx") == 0
    assert set(files(tmp_path / "out")) == {"model.onnx", "model.onnx_data"}
