"""Variants of a graph: what optimising does, what quantising costs, and who else may make it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
import torch
from base import model_folder
from support import boft_tensors, needs_transformers_5, write_adapter
from tokenizers import Tokenizer, models, pre_tokenizers

from boft_export import ExportResult, UsageError, export_onnx, merge
from boft_export.onnx.variant import variant

SIZES = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny BERT and an adapter, in folders."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(folder / "base")
    tensors = boft_tensors("encoder.layer.1.attention.self.query", 64, 64, seed=0)
    return folder / "base", write_adapter(folder / "adapter", tensors)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama with a tokenizer, and an adapter, in folders."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**SIZES, **ends, num_key_value_heads=2)).save_pretrained(folder / "base")
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(90))])}
    names = {"unk_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    splits = Tokenizer(models.WordLevel(words, unk_token=names["unk_token"]))
    splits.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=splits, **names).save_pretrained(folder / "base")
    tensors = boft_tensors("model.layers.1.self_attn.q_proj", 64, 64, seed=0)
    return folder / "base", write_adapter(folder / "adapter", tensors)


def operators(result: ExportResult) -> Counter[str]:
    graph = onnx.load(result.output / "model.onnx", load_external_data=False).graph
    return Counter(f"{n.domain}:{n.op_type}" if n.domain else n.op_type for n in graph.node)


def codes(result: ExportResult) -> set[str]:
    return {n.code for n in result.plan.notices}


def test_each_step_of_optimising_leaves_fewer_operators_of_an_encoder(bert: tuple[Path, Path], tmp_path: Path) -> None:
    made = {level: export_onnx(*bert, tmp_path / level, optimize=level) for level in ("none", "standard", "ort")}
    nodes = [sum(operators(result).values()) for result in made.values()]
    assert nodes == sorted(nodes, reverse=True)
    assert len(set(nodes)) == 3
    fused = operators(made["ort"])
    assert fused["com.microsoft:Attention"] == fused["com.microsoft:BiasGelu"] == 2
    assert all("com.microsoft" not in name for name in operators(made["standard"]))
    assert "not-fused" not in codes(made["ort"])
    for result in made.values():
        assert max(a.relative_difference for a in result.agreements) < 1e-5
        assert str(tmp_path).encode() not in (result.output / "model.onnx").read_bytes()


def test_what_can_not_be_fused_is_told(llama: tuple[Path, Path], tmp_path: Path) -> None:
    result = export_onnx(*llama, tmp_path / "out", optimize="ort")
    assert "not-fused" in codes(result)
    assert max(a.relative_difference for a in result.agreements) < 1e-5


@pytest.mark.parametrize(("kind", "operator"), [("int8", "MatMulInteger"), ("int4", "com.microsoft:MatMulNBits")])
def test_a_real_model_stays_itself_when_quantised(kind: str, operator: str, tmp_path: Path) -> None:
    result = export_onnx(model_folder(), (), tmp_path / "out", task="feature-extraction", quantize=kind)
    # Six products with weights in each of six layers; the last of all, which only a pooled output uses, is left out.
    assert operators(result)[operator] == 36
    assert [a.kind for a in result.agreements] == [kind]
    assert all(0.9 < a.mean_cosine < 1 for a in result.agreements)
    files = {f.name: f.stat().st_size for f in result.output.glob("*onnx*")}
    assert files.keys() == {"model.onnx", "model.onnx_data"}
    assert files["model.onnx_data"] < 0.7 * (model_folder() / "model.safetensors").stat().st_size
    graph = onnx.load(result.output / "model.onnx", load_external_data=False)
    assert "boft_export.base" in {p.key for p in graph.metadata_props}
    assert str(tmp_path).encode() not in (result.output / "model.onnx").read_bytes()


# Its builder imports models that transformers 4 has not.
@needs_transformers_5
def test_genai_generates_from_the_graph_of_its_builder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    import onnxruntime_genai
    from transformers import AutoModelForCausalLM

    result = export_onnx(*llama, tmp_path / "out", exporter="genai")
    assert operators(result)["com.microsoft:GroupQueryAttention"] == 2
    assert "no-padding" in codes(result)
    assert not list(result.output.glob("*.safetensors"))
    model = onnxruntime_genai.Model(str(result.output))
    asked = onnxruntime_genai.GeneratorParams(model)
    asked.set_search_options(max_length=20, do_sample=False)
    run = onnxruntime_genai.Generator(model, asked)
    run.append_tokens([5, 6, 7, 8])
    while not run.is_done():
        run.generate_next_token()
    merged = merge(*llama, tmp_path / "merged").output
    whole = AutoModelForCausalLM.from_pretrained(merged)
    wanted = whole.generate(torch.tensor([[5, 6, 7, 8]]), max_length=20, do_sample=False)
    assert run.get_sequence(0).tolist() == wanted[0].tolist()


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        (("optimum", "ort", "none", None), "float32"),
        (("genai", "standard", "none", 20), "float32"),
        (("genai", "standard", "int8", None), "float32"),
        (("genai", "standard", "none", None), "float16"),
        (("dynamo", "ort", "int8", None), "float32"),
        (("dynamo", "ort", "none", None), "bfloat16"),
        (("dynamo", "standard", "int4", None), "float16"),
        (("dynamo", "standard", "none", 17), "float32"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(asked: tuple[str, str, str, int | None], dtype: str) -> None:
    with pytest.raises(UsageError):
        variant(*asked).check(dtype)
    variant("dynamo", "standard", "none", None).check(dtype)


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"PYTHONPATH": str(path)} if path is not None else {})
    command = [sys.executable, "-m", "boft_export", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_without_optimum_its_exporter_is_refused_with_a_way_to_get_it(bert: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("onnx", str(bert[0]), "-o", str(tmp_path / "out"), "--exporter", "optimum")
    assert done.returncode == 2
    assert "optimum-onnx is not installed" in done.stderr
    assert 'pip install "boft-export[onnx-optimum]"' in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_two_runtimes_are_told_of(tmp_path: Path) -> None:
    assert "problems" not in json.loads(run("env", "--json").stdout)
    # What pip leaves of the second one.
    record = tmp_path / "onnxruntime_gpu-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.0\n")
    found = json.loads(run("env", "--json", path=tmp_path).stdout)
    assert "are both installed" in found["problems"]["onnxruntime"]
    assert found["versions"]["onnxruntime"] == version("onnxruntime")
