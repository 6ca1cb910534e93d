"""Graphs that are wrong in one small thing: whatever changes an output by more than rounding is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from support import boft_tensors, needs_transformers_5, write_adapter

from boft_export import Outcome, export_onnx, validate

# Values large enough that attention matters.
SIZES = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.3}
SIZES |= {"num_attention_heads": 4}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0, "tie_word_embeddings": False}
ADAPTED = {
    "bert": "bert.encoder.layer.1.attention.self.value",
    "llama": "model.layers.0.self_attn.q_proj",
    "t5": "encoder.block.0.layer.0.SelfAttention.q",
}

Graph = Any
Mutate = Callable[[Graph], None]


def build(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    match name:
        case "bert":
            model = transformers.BertForTokenClassification(transformers.BertConfig(**SIZES, num_labels=5))
        case "llama":
            config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)
            model = transformers.LlamaForCausalLM(config)
        case _:
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    with torch.no_grad():
        # As they are at first, biases are all 0 and norms all 1.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a folder with a base, an adapter and their graphs, which are made once."""
    top = tmp_path_factory.mktemp("right")

    def made(name: str) -> Path:
        folder = top / name
        if not folder.exists():
            build(name).save_pretrained(folder / "base")
            adapter = write_adapter(folder / "adapter", boft_tensors(ADAPTED[name], 32, 32))
            export_onnx(folder / "base", adapter, folder / "onnx")
            # Only the outputs are to tell.
            (folder / "onnx" / "boft_export.json").unlink()
        return folder

    return made


def nodes(graph: Graph, kind: str) -> list[Any]:
    return [n for n in graph.node if n.op_type == kind]


def weight(graph: Graph, end: str) -> Any:
    [found] = [i for i in graph.initializer if i.name.endswith(end)]
    return found


def changed(end: str, change: Callable[[Any], Any]) -> Mutate:
    """Change a weight's values."""

    def mutate(graph: Graph) -> None:
        stored = weight(graph, end)
        values = change(numpy_helper.to_array(stored).copy())
        stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), stored.name))

    return mutate


def raised(row: int) -> Callable[[Any], Any]:
    """Add to an element of a row."""

    def change(values: Any) -> Any:
        values[row, 0] += 0.5
        return values

    return change


def swapped(one: str, other: str) -> Mutate:
    """Swap two weights."""

    def mutate(graph: Graph) -> None:
        first, second = weight(graph, one), weight(graph, other)
        first.name, second.name = second.name, first.name

    return mutate


def attribute(kind: str, name: str, value: float, *, which: int = 0) -> Mutate:
    """Set a node's attribute."""

    def mutate(graph: Graph) -> None:
        node = nodes(graph, kind)[which]
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return mutate


def ignored(name: str, value: int) -> Mutate:
    """Put a number in the place of an input's values."""

    def mutate(graph: Graph) -> None:
        used = [n for n in graph.node if n.op_type != "Shape" and name in n.input]
        assert used
        for node in used:
            node.input[:] = ["flat" if i == name else i for i in node.input]
        kind = next(i.type.tensor_type.elem_type for i in graph.input if i.name == name)
        number = helper.make_tensor("number", kind, [1], [value])
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["flat_shape"], ["flat"], value=number))
        graph.node.insert(0, helper.make_node("Shape", [name], ["flat_shape"]))

    return mutate


def first_row_for_all(name: str) -> Mutate:
    """Let all rows of a batch be its first."""

    def mutate(graph: Graph) -> None:
        for node in graph.node:
            if node.op_type != "Shape":
                node.input[:] = ["same" if i == name else i for i in node.input]
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "zero"))
        graph.node.insert(0, helper.make_node("Expand", ["one", "same_shape"], ["same"]))
        graph.node.insert(0, helper.make_node("Gather", [name, "zero"], ["one"], axis=0))
        graph.node.insert(0, helper.make_node("Shape", [name], ["same_shape"]))

    return mutate


def layer_skipped(graph: Graph) -> None:
    """Go round the last layer, which has two norms."""
    norms = nodes(graph, "RMSNormalization") or nodes(graph, "LayerNormalization")
    if norms[0].op_type == "RMSNormalization":
        norms[-1].input[0] = norms[-3].input[0]
        return
    for node in graph.node:
        node.input[:] = [norms[-3].output[0] if i == norms[-1].output[0] else i for i in node.input]


def bias_left_out(graph: Graph) -> None:
    """Add nothing where the last bias is added."""
    name = weight(graph, "classifier.bias").name
    [node] = [n for n in graph.node if name in n.input]
    assert node.op_type == "Add"
    node.op_type = "Identity"
    node.input[:] = [i for i in node.input if i != name]


def cache_reversed(graph: Graph) -> None:
    """Put new keys before the past ones."""
    node = next(n for n in nodes(graph, "Concat") if "past_key_values.0.key" in n.input)
    node.input[:] = list(node.input)[::-1]


def distances_scaled(graph: Graph) -> None:
    """Let buckets of distances grow otherwise: by what the logarithm of a distance is divided."""
    [log] = nodes(graph, "Log")
    [divided] = [n for n in nodes(graph, "Div") if n.input[0] == log.output[0]]
    changed(divided.input[1], lambda v: v * np.float32(1.25))(graph)


MUTANTS: dict[str, tuple[str, str, Mutate]] = {
    # BERT
    "a weight 1% off": ("bert", "model", changed("layer.0.intermediate.dense.weight", lambda v: v * 1.01)),
    "a square weight transposed": ("bert", "model", changed("layer.1.attention.self.value.weight", np.transpose)),
    "query and key swapped": ("bert", "model", swapped("0.attention.self.query.weight", "0.attention.self.key.weight")),
    "layers swapped": ("bert", "model", swapped("0.output.dense.weight", "1.output.dense.weight")),
    "biases rolled": ("bert", "model", changed("layer.0.attention.self.query.bias", lambda v: np.roll(v, 1))),
    "another norm": ("bert", "model", changed("1.output.LayerNorm.weight", lambda v: v + 0.001)),
    "another epsilon": ("bert", "model", attribute("LayerNormalization", "epsilon", 1e-3, which=2)),
    "attention's scale 1% off": ("bert", "model", attribute("Attention", "scale", 8**-0.5 * 1.01)),
    "causal attention": ("bert", "model", attribute("Attention", "is_causal", 1)),
    "a mask without effect": ("bert", "model", ignored("attention_mask", 1)),
    "token types without effect": ("bert", "model", ignored("token_type_ids", 0)),
    "the second token type": ("bert", "model", changed("token_type_embeddings.weight", raised(1))),
    "a far position": ("bert", "model", changed("position_embeddings.weight", raised(100))),
    "a layer skipped": ("bert", "model", layer_skipped),
    "a bias left out": ("bert", "model", bias_left_out),
    "one row for all": ("bert", "model", first_row_for_all("input_ids")),
    # Llama
    "another theta": ("llama", "model", changed("inv_freq", lambda v: v**1.01)),
    "half of rotation's angles": ("llama", "model", changed("inv_freq", lambda v: v / 2)),
    "interleaved rotation": ("llama", "model", attribute("RotaryEmbedding", "interleaved", 1)),
    "no positions": ("llama", "model", ignored("position_ids", 0)),
    "a decoder's mask without effect": ("llama", "model", ignored("attention_mask", 1)),
    "gate and up swapped": ("llama", "model", swapped("layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight")),
    "keys and values swapped": ("llama", "model", swapped("0.self_attn.k_proj.weight", "0.self_attn.v_proj.weight")),
    "another epsilon of a root mean square": ("llama", "model", attribute("RMSNormalization", "epsilon", 1e-4)),
    "a decoder's layer skipped": ("llama", "model", layer_skipped),
    "the past after the present": ("llama", "model", cache_reversed),
    "values of the past without effect": ("llama", "model", ignored("past_key_values.1.value", 0)),
    "a head 1% off": ("llama", "model", changed("lm_head.weight", lambda v: v * 1.01)),
    # T5
    "an encoder's mask without effect": ("t5", "encoder_model", ignored("attention_mask", 1)),
    "far distances of an encoder": ("t5", "encoder_model", changed("relative_attention_bias.weight", raised(31))),
    "distances of an encoder": ("t5", "encoder_model", distances_scaled),
    "an encoder's layer skipped": ("t5", "encoder_model", layer_skipped),
    "distances of a decoder": ("t5", "decoder_model", distances_scaled),
    "a mask of the question without effect": ("t5", "decoder_model", ignored("encoder_attention_mask", 1)),
    "another epsilon of a decoder": ("t5", "decoder_model", attribute("RMSNormalization", "epsilon", 1e-3)),
    "distances from the past": ("t5", "decoder_with_past_model", distances_scaled),
    "far distances from the past": (
        "t5", "decoder_with_past_model", changed("relative_attention_bias.weight", raised(31))
    ),
    "a question's mask without effect": ("t5", "decoder_with_past_model", ignored("encoder_attention_mask", 1)),
    "keys of the question without effect": (
        "t5", "decoder_with_past_model", ignored("past_key_values.0.encoder.key", 0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_the_right_graph_passes(name: str, right: Callable[[str], Path]) -> None:
    folder = right(name)
    result = validate(folder / "adapter", base=folder / "base", onnx=folder / "onnx")
    assert {c.outcome for c in result.checks if c.check == "onnx"} == {Outcome.PASS}


# transformers 4 leaves the angles to the runtime, in no tensor of their own name.
_ANGLES = ("another theta", "half of rotation's angles")


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=needs_transformers_5 if m in _ANGLES else ()) for m in MUTANTS]
)
def test_a_graph_that_is_wrong_in_one_thing_fails(mutant: str, right: Callable[[str], Path], tmp_path: Path) -> None:
    name, file, mutate = MUTANTS[mutant]
    folder = right(name)
    graphs = Path(shutil.copytree(folder / "onnx", tmp_path / "onnx"))
    model = onnx.load(graphs / f"{file}.onnx")
    mutate(model.graph)
    onnx.save(model, graphs / f"{file}.onnx")
    result = validate(folder / "adapter", base=folder / "base", onnx=graphs)
    # It runs, and is another.
    assert {c.finding for c in result.failures} == {"onnx-differs"}, [c.message for c in result.failures]
