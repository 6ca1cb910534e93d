"""``boft-export validate`` as CI meets it: exit codes, documents, reports, in every outcome."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator
from junitparser import JUnitXml
from sabotage import FIRST, SABOTAGES, Bed, make_bed
from safetensors.torch import load_file, save_file
from support import boft_tensors, write_adapter, write_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

import boft_export
from boft_export.cli.main import app
from boft_export.report.schemas import schema


@pytest.fixture
def bed(tmp_path: Path) -> Bed:
    return make_bed(tmp_path, torch.bfloat16, manifest=True)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)])


def document(done: Result) -> dict[str, Any]:
    """Return what --json printed, held against its schema."""
    found: dict[str, Any] = json.loads(done.stdout)
    Draft202012Validator(schema("validate")).validate(found)
    return found


def merge_of(bed: Bed) -> tuple[object, ...]:
    return bed.adapter, "--base", bed.base, "--merged", bed.merged


def spoil(bed: Bed, name: str) -> None:
    SABOTAGES[name][0](bed)


def edit_adapter(bed: Bed, key: str, value: float) -> None:
    file = bed.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[key].view(-1)[0] = value
    save_file(tensors, file, metadata={"format": "pt"})


SCALE = "base_model.model.model.layers.0.up.boft_s"


def test_valid(bed: Bed, tmp_path: Path) -> None:
    junit, page = tmp_path / "out" / "junit.xml", tmp_path / "out" / "page.html"
    done = run(*merge_of(bed), "--junit-xml", junit, "--report", page)
    assert (done.exit_code, done.stderr) == (0, "")
    assert "valid: " in done.stdout
    suite = JUnitXml.fromfile(str(junit))
    assert (suite.failures, suite.errors, suite.skipped) == (0, 0, 0)
    assert suite.tests > 20
    assert FIRST in page.read_text().replace("<wbr>", "")
    found = document(run(*merge_of(bed), "--json"))
    assert found["outcome"] == "pass"
    assert found["counts"]["fail"] == 0
    assert {t["wrong"] for t in found["tensors"]} == {0}
    assert {layer["module"] for layer in found["layers"]} == {n.removesuffix(".weight") for n in bed.rotated}


@pytest.mark.parametrize(
    "name", ["base-copied", "bfloat16", "bit-of-untouched", "truncated", "nan", "tie-kept", "bias-lost"]
)
def test_every_failure_is_told_in_every_form(name: str, bed: Bed, tmp_path: Path) -> None:
    _, finding, _ = SABOTAGES[name]
    spoil(bed, name)
    junit = tmp_path / "junit.xml"
    done = run(*merge_of(bed), "--json", "--junit-xml", junit)
    assert done.exit_code == 1
    found = document(done)
    assert found["outcome"] == "fail"
    assert finding in {c["finding"] for c in found["checks"] if c["fails"]}
    suite = JUnitXml.fromfile(str(junit))
    assert suite.failures == found["counts"]["fail"] > 0
    assert finding in {r.type for s in suite for case in s for r in case.result}


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["{adapter}", "--functional"], 2),
        (["--base", "{base}"], 2),
        (["{adapter}", "--threshold", "max_angel=1"], 2),
        (["{adapter}", "--threshold", "max_angle=wide"], 2),
        (["{adapter}", "--fail-on", "nothing"], 2),
        (["{adapter}", "--base", "{base}", "--merged", "{merged}", "--device", "cuda:99"], 2),
        (["{adapter}", "--base", "{base}", "--merged", "{merged}", "-j", "0"], 2),
        (["{adapter}", "--junit-xml", "{adapter}/junit.xml"], 2),
        (["{adapter}", "--report", "page.pdf"], 2),
        (["{adapter}", "--report", "{adapter}/adapter_config.json"], 2),
        (["{adapter}", "--junit-xml", "{merged}/config.json"], 2),
        (["{adapter}", "--junit-xml", "{base}/config.json"], 2),
        (["{adapter}", "--merged", "{merged}"], 2),
        (["{adapter}", "--threshold", "gram_factor=0"], 2),
        (["{adapter}", "--threshold", "max_ulp=-1"], 2),
        (["{adapter}", "--threshold", "arithmetic=inf"], 2),
        (["{base}"], 3),
        (["{adapter}", "--base", "{adapter}"], 3),
        (["{adapter}", "--policy", "{merged}/config.json"], 3),
        (["{merged}/nothing"], 4),
        (["{adapter}", "--policy", "{merged}/nothing"], 4),
        (["{adapter}", "--base", "{base}", "--merged", "{merged}", "--max-memory", "1MiB"], 5),
    ],
    ids=str,
)
def test_exit_codes(arguments: list[str], code: int, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    filled = [a.format(base=bed.base, adapter=bed.adapter, merged=bed.merged) for a in arguments]
    before = sorted(p for p in tmp_path.rglob("*"))
    done = run(*filled, "--json")
    assert done.exit_code == code, done.output
    assert done.stderr
    if done.stdout:
        found = document(done)
        assert found["error"]["exit_code"] == code
    # Wrong options that Typer itself finds have no document.
    assert done.stdout or "fail-on" in str(arguments)
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_run_without_a_result_still_leaves_a_report(
    bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = bed.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    junit, summary = tmp_path / "junit.xml", tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    summary.write_text("before\n")
    done = run(bed.adapter, "--junit-xml", junit, "--json")
    assert done.exit_code == 3
    assert document(done)["error"]["type"] == "DamagedFileError"
    assert JUnitXml.fromfile(str(junit)).errors == 1
    assert "::error title=" in done.stderr
    assert summary.read_text().startswith("before\n")
    assert "truncated" in summary.read_text()


def test_a_failure_is_told_to_people(bed: Bed) -> None:
    spoil(bed, "transposed")
    done = run(*merge_of(bed))
    assert done.exit_code == 1
    assert f"failed: replay {FIRST}: it is rotated by R in place of R^T" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("not valid: ")


def test_github_is_told(bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    spoil(bed, "layer-skipped")
    done = run(*merge_of(bed), "--json")
    assert done.exit_code == 1
    # stdout is the document's alone.
    document(done)
    assert f"::error title=layer-skipped%3A {FIRST}::" in done.stderr
    assert "not valid" in summary.read_text()


def test_warnings_fail_where_they_are_asked_to(bed: Bed, tmp_path: Path) -> None:
    edit_adapter(bed, SCALE, 0.0)
    done = run(bed.adapter, "--json")
    assert done.exit_code == 0
    assert document(done)["counts"]["warning"] == 1
    assert run(bed.adapter, "--fail-on", "inconclusive").exit_code == 0
    assert run(bed.adapter, "--fail-on", "warning").exit_code == 1
    policy = tmp_path / "policy.yaml"
    policy.write_text("fail_on: [warning]\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 1
    policy.write_text("fail_on: [warning]\nallowed_warnings: ['zero-scale:model.layers.0.*']\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 0
    policy.write_text("fail_on: [warning]\nallowed_warnings: ['zero-scale:model.layers.1.*']\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 1


def test_inconclusive_fails_where_it_is_asked_to(bed: Bed) -> None:
    arguments = ("--base", bed.base, "--merged", bed.merged)
    done = run(*arguments, "--json")
    assert done.exit_code == 0
    found = document(done)
    assert found["outcome"] == "inconclusive"
    reasons = [c["message"] for c in found["checks"] if c["outcome"] == "inconclusive"]
    assert reasons
    assert all(reasons)
    assert run(*arguments, "--fail-on", "inconclusive").exit_code == 1


def test_a_policy_asks_for_layers_and_thresholds(bed: Bed, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("required_layers: ['model.layers.*.up', 'lm_head']\nthresholds: {max_angle: 3}\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 0
    policy.write_text("required_layers: ['model.layers.2.*']\nthresholds: {max_angle: 0.1, max_scale: 1.0}\n")
    found = document(run(bed.adapter, "--policy", policy, "--json"))
    failed = {c["finding"] for c in found["checks"] if c["fails"]}
    assert failed == {"missing-layer", "large-angle", "scale-out-of-bounds"}
    # An option has the last word.
    arguments = ("--threshold", "max_angle=3", "--threshold", "max_scale=9")
    found = document(run(bed.adapter, "--policy", policy, *arguments, "--json"))
    assert {c["finding"] for c in found["checks"] if c["fails"]} == {"missing-layer"}


@pytest.mark.parametrize(
    "text",
    ["thresholds: {max_angel: 1}", "thresholds: [1]", "thresholds: {max_angle: x}", "layers: [a]", "- a", "fail_on: x",
     "required_layers: [1]", "{", "fail_on: {a: b}", "thresholds: {1: 2}", "!!python/object:os.system {}",
     "a: 2024-13-45", "thresholds: {max_angle: true}", "thresholds: {max_angle: .nan}",
     pytest.param(f"thresholds: {{max_angle: {'9' * 400}}}", id="400-digits"),
     pytest.param(f"a: {'9' * 5000}", id="5000-digits")],
)  # fmt: skip
def test_a_policy_that_means_nothing_is_refused(text: str, bed: Bed, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(text)
    done = run(bed.adapter, "--policy", policy, "--json")
    assert done.exit_code == 3
    assert str(policy) in document(done)["error"]["message"]


def test_a_policy_may_write_numbers_without_a_dot(bed: Bed, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("thresholds: {max_angle: 1e-5}\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 1


def test_reports_replace_nothing_but_reports(bed: Bed, tmp_path: Path) -> None:
    """Not even the base that is found by its name in the adapter, nor the policy."""
    config = json.loads((bed.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(bed.base)
    (bed.adapter / "adapter_config.json").write_text(json.dumps(config))
    policy = tmp_path / "policy.yaml"
    policy.write_text("fail_on: [warning]\n")
    empty = tmp_path / "page.html"
    empty.touch()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    given = (bed.adapter, "--merged", bed.merged, "--policy", policy)
    for file in (bed.base / "config.json", bed.base / "junit.xml", policy, bed.merged / "junit.xml"):
        assert run(*given, "--junit-xml", file).exit_code == 2, file
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    junit = tmp_path / "junit.xml"
    for _ in range(2):
        assert run(*given, "--junit-xml", junit, "--report", empty).exit_code == 0
    assert empty.read_text().startswith("<!doctype html>")


def test_a_report_can_go_into_a_pipe(bed: Bed, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    assert run(bed.adapter, "--junit-xml", pipe).exit_code == 0
    reader.join(10)
    assert found[0].startswith(b"<?xml")
    assert pipe.is_fifo()


def test_an_empty_policy_asks_for_nothing(bed: Bed, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("# later\n")
    assert run(bed.adapter, "--policy", policy).exit_code == 0


def test_an_adapter_that_does_not_fit_fails_the_check(bed: Bed, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", {"model.layers.0.up.weight": torch.zeros(4, 4)})
    done = run(bed.adapter, "--base", other, "--json")
    assert done.exit_code == 1
    assert {c["check"] for c in document(done)["checks"] if c["fails"]} == {"fit"}


def test_values_that_are_no_numbers(bed: Bed) -> None:
    edit_adapter(bed, SCALE, float("nan"))
    done = run(bed.adapter, "--base", bed.base, "--json")
    assert done.exit_code == 1
    assert {c["finding"] for c in document(done)["checks"] if c["fails"]} == {"not-finite"}


def test_a_huge_adapter_is_not_orthogonal_or_no_rotation(bed: Bed) -> None:
    edit_adapter(bed, SCALE.replace("boft_s", "boft_R"), 0.0)
    file = bed.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[SCALE.replace("boft_s", "boft_R")][0, 0, 0, 1] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    done = run(bed.adapter, "--json")
    document(done)
    assert done.exit_code in (0, 1)


def test_quiet_says_nothing(bed: Bed) -> None:
    done = run(*merge_of(bed), "-q")
    assert (done.exit_code, done.output) == (0, "")


def test_inputs_are_left_alone(bed: Bed, tmp_path: Path) -> None:
    def state() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}

    before = state()
    run(*merge_of(bed))
    run("--base", bed.base, "--merged", bed.merged)
    assert state() == before


@pytest.fixture
def llama(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A language model that runs, an adapter of two factors, and their merge."""
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    trained = {
        k: v
        for i, module in enumerate(("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"))
        for k, v in boft_tensors(f"model.layers.0.{module}", 16, 24 if i == 2 else 16, m=2, b=4, seed=i).items()
    }
    adapter = write_adapter(tmp_path / "adapter", trained)
    return tmp_path / "base", adapter, boft_export.merge(tmp_path / "base", adapter, tmp_path / "merged").output


def test_functional(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = llama
    page = tmp_path / "page.html"
    done = run(adapter, "--base", base, "--merged", merged, "--functional", "--json", "--report", page)
    assert done.exit_code == 0
    assert done.stderr == ""
    facts = document(done)["functional"]
    assert facts["largest_difference"] <= 4 * facts["noise"] < facts["effect"]
    assert facts["top1_agreement"] == 1
    assert "functional" in page.read_text()
    strict = ("--threshold", "max_kl=0", "--threshold", "min_cosine=1.1")
    done = run(adapter, "--base", base, "--merged", merged, "--functional", *strict, "--json")
    assert done.exit_code == 1
    assert {c["check"] for c in document(done)["checks"] if c["fails"]} == {"functional"}


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"use_cayley_neumann": False}, "peft"),
        ({"use_cayley_neumann": False, "coft": True, "eps": 1e-2}, "peft"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}, "peft"),
        # What a release computed otherwise than today's is no reference.
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "peft_version": None}, None),
    ],
)
def test_functional_of_oft(
    options: dict[str, Any], reference: str | None, llama: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, *_ = llama
    config = {
        "peft_type": "OFT",
        "oft_block_size": 4,
        "r": 0,
        "block_share": False,
        "coft": False,
        "eps": 6e-5,
    } | options
    config |= {"target_modules": ["q_proj"]}
    old = options.get("peft_version", "") is None
    trained = {"base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight": torch.randn(4, 6) * 0.05}
    adapter = write_adapter(
        tmp_path / "oft", trained, config, drop=("boft_block_num", *(("peft_version",) if old else ()))
    )
    merged = boft_export.merge(base, adapter, tmp_path / "oft-merged").output
    done = run(adapter, "--base", base, "--merged", merged, "--functional", "--json")
    assert done.exit_code == 0
    found = document(done)
    assert (found["functional"] or {}).get("reference") == reference
    (check,) = [c for c in found["checks"] if c["check"] == "functional"]
    assert check["outcome"] == ("pass" if reference else "inconclusive")


def test_functional_of_a_wrong_merge(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = llama
    wrong = tmp_path / "wrong"
    shutil.copytree(merged, wrong)
    shutil.copy(base / "model.safetensors", wrong)
    done = run(adapter, "--base", base, "--merged", wrong, "--functional", "--json")
    assert done.exit_code == 1
    assert {"not-applied", "functional-difference"} <= {c["finding"] for c in document(done)["checks"] if c["fails"]}


def test_functional_of_half_a_merge_is_inconclusive(llama: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = llama
    boft_export.interpolate(base, adapter, tmp_path / "half", 0.5)
    done = run(adapter, "--base", base, "--merged", tmp_path / "half", "--functional", "--json")
    assert done.exit_code == 0
    assert {c["check"] for c in document(done)["checks"] if c["outcome"] == "inconclusive"} == {"functional"}


def test_functional_by_texts_needs_a_tokenizer(llama: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = llama
    done = run(adapter, "--base", base, "--merged", merged, "--text", "a b", "--json")
    assert done.exit_code == 3
    assert "tokenizer" in document(done)["error"]["message"]


def test_an_interpolation_is_judged_as_what_it_says_it_is(bed: Bed, tmp_path: Path) -> None:
    half = tmp_path / "half"
    boft_export.interpolate(bed.base, bed.adapter, half, 0.5, path="factorwise")
    done = run(bed.adapter, "--base", bed.base, "--merged", half, "--json")
    assert done.exit_code == 0
    assert any("alpha 0.5" in c["message"] for c in document(done)["checks"])
    # What lies about how far it went is found out.
    shutil.copy(bed.merged / "boft_export.json", half)
    assert run(bed.adapter, "--base", bed.base, "--merged", half).exit_code == 1
