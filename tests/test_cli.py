"""The command line as a user meets it: exit codes, streams, messages, documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import boft_tensors, butterfly_matrix, read_folder, write_adapter, write_checkpoint
from typer.testing import CliRunner, Result

from boft_export.cli.main import app

COMMANDS = ("merge", "interpolate", "onnx", "unmerge", "validate", "diff", "inspect", "rotation", "env")
AT_HALF = ("interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "0.5")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_merge_reports_and_writes(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = run("merge", base, adapter, "-o", tmp_path / "out")
    assert done.exit_code == 0
    assert "merged 4 of 4 adapter layers" in done.stdout
    assert "layers.*.up.weight" in done.stdout
    assert done.stderr == ""
    assert read_folder(tmp_path / "out").keys() == read_folder(base).keys()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_merge_as_json(base: Path, adapter: Path, tmp_path: Path) -> None:
    document = json.loads(run("merge", base, adapter, "-o", tmp_path / "out", "--json").stdout)
    assert document["schema_version"] == 1
    assert document["layers"] == {"applied": 4, "expected": 4}
    assert document["counts"] == {"copy": 2, "fold": 4}
    assert document["tensors"]["layers.0.up.weight"]["relative_change"] > 0.1


def test_dry_run_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = run("merge", base, adapter, "-o", tmp_path / "out", "--dry-run", "--json")
    document = json.loads(done.stdout)
    assert done.exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert document["tensors"]["layers.0.up.weight"]["fold"] == ["m=2 b=4 -> 8"]
    assert document["bytes_to_write"] == sum(f.stat().st_size for f in base.glob("*.safetensors"))
    assert document["memory"] > document["bytes_to_read"]


def test_dry_run_shows_what_was_decided(tmp_path: Path) -> None:
    """Renames, slices of fused weights and ties are shown without asking for more, alike layers in one line."""
    weights = {f"model.layers.{i}.attn.qkv_proj.weight": torch.randn(24, 16) for i in range(2)}
    weights["model.embed_tokens.weight"] = torch.randn(8, 16)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    base = write_checkpoint(tmp_path / "base", weights, config)
    tensors = boft_tensors("lm_head", 16, 8)
    for i in range(2):
        tensors |= boft_tensors(f"wrapper.model.layers.{i}.attn.q_proj", 16, 8)
    shown = run("merge", base, write_adapter(tmp_path / "adapter", tensors), "-o", tmp_path / "out", "-n").stdout
    assert "names: wrapper.* -> *" in shown
    assert shown.count("rows 0 to 8 of model.layers.*.attn.qkv_proj.weight") == 1
    assert "lm_head.weight: no longer equals model.embed_tokens.weight" in shown
    assert "tie_word_embeddings = False" in shown


def test_quiet_prints_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = run("merge", base, adapter, "-o", tmp_path / "out", "-q")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def overflowing(folder: Path) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.layers.0.up.boft_s"] *= 1e6
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "{base}"], 2, "Missing argument"),
        (["merge", "{base}", "{adapter}", "-o", "{base}"], 2, "exists"),
        (["merge", "{base}", "{adapter}", "-o", "{base}/inside"], 2, "into the base's folder"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "-j", "0"], 2, "jobs"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--device", "tpu"], 2, "device tpu"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--max-memory", "much"], 2, "not a size"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--dtype", "int8"], 2, "int8"),
        (["merge", "-", "{adapter}", "-o", "{out}"], 2, "does not name its base"),
        (["merge", "{adapter}", "{base}", "-o", "{out}"], 3, "not an adapter"),
        (["merge", "{base}", "{overflowing}", "-o", "{out}", "--dtype", "float16"], 3, "not finite"),
        (["merge", "{base}", "{nowhere}", "-o", "{out}"], 4, "does not exist"),
        (["inspect", "{nowhere}"], 4, "does not exist"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}"], 2, "how far"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "half"], 2, "not a finite number"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "nan"], 2, "not a finite number"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "1e999"], 2, "not a finite number"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", ""], 2, "not a finite number"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "0.5,"], 2, "not a finite number"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alpha", "0.5,0.2"], 2, "2 alphas"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "0:1"], 2, "START:STOP:STEP"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", ""], 2, "START:STOP:STEP"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "0:1:0"], 2, "leads nowhere"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "1:0:0.1"], 2, "leads nowhere"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "0:1:1e-9"], 2, "more than the 1000"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "0:10:1e-999999"], 2, "more than the 1000"),
        (["interpolate", "{base}", "{adapter}", "-o", "{out}", "--alphas", "0:inf:1"], 2, "not a finite number"),
        ([*AT_HALF, "--alphas", "0:1:0.5"], 2, "more than once"),
        ([*AT_HALF, "--path", "straight"], 2, "straight"),
        ([*AT_HALF, "--path", "truncate", "--alpha", "1.5"], 2, "outside of [0, 1]"),
        ([*AT_HALF, "--alpha-map", "{nowhere}"], 4, "cannot read"),
        ([*AT_HALF, "--alpha-map", "{base}/tokenizer.json"], 3, "matches no tensor"),
        ([*AT_HALF, "--alpha-map", "{base}/model-00001-of-00002.safetensors"], 3, "UTF-8"),
        ([*AT_HALF, "--path-report", "{out}.txt"], 2, "no kind of report"),
        ([*AT_HALF, "--path-report", "{base}/config.json"], 2, "exists"),
        ([*AT_HALF, "--path-report", "{base}/config.json", "--overwrite"], 2, "into the base's folder"),
        ([*AT_HALF, "--eval", "{nowhere}"], 4, "cannot read"),
        ([*AT_HALF, "--eval", "{adapter}/adapter_config.json"], 3, "defines no function evaluate"),
        (["interpolate", "{base}", "{adapter}", "-o", "{base}", "--alpha", "0.5"], 2, "exists"),
        (["merge", "{base}", "org/absent", "-o", "{out}", "--offline"], 4, "off limits"),
        (["merge", "{base}", "{adapter}", "-o", "{out}", "--max-memory", "1MB"], 5, "too few"),
        (["rotation", "{adapter}", "-o", "{out}", "--layer", "nothing*"], 3, "no layer"),
        (["rotation", "{adapter}", "-o", "{base}"], 2, "exists"),
        (["rotation", "{adapter}", "-o", "{adapter}/adapter_model.safetensors", "--overwrite"], 2, "adapter's folder"),
        (["rotation", "{adapter}", "-o", "{adapter}/new/r.safetensors"], 2, "adapter's folder"),
    ],
)
def test_failures(base: Path, adapter: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    places = {"base": base, "adapter": adapter, "out": tmp_path / "out", "nowhere": tmp_path / "nowhere"}
    if "{overflowing}" in arguments:
        places["overflowing"] = overflowing(adapter)
    before = sorted(tmp_path.rglob("*"))
    done = run(*(a.format(**places) for a in arguments))
    assert done.exit_code == code, done.output
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_failure_as_json_and_with_traceback(base: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "wrong", {"base_model.model.x.boft_R": torch.zeros(1, 2, 4, 4)})
    done = run("merge", base, adapter, "-o", tmp_path / "out", "--json", "-vv")
    document = json.loads(done.stdout)
    assert (document["error"]["type"], document["error"]["exit_code"]) == ("InputError", 3)
    assert document["notices"][0]["code"] == "incomplete-layer"
    assert "Traceback" in done.stderr


def test_lost_effect_fails_and_writes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Rotations far below the output's precision leave the base's bytes: a merge that did nothing must not pass."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    faint = {k: torch.ones_like(t) if k.endswith("boft_s") else t * 1e-9 for k, t in tensors.items()}
    save_file(faint, adapter / "adapter_model.safetensors")
    done = run("merge", base, adapter, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert "changed no element" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("merge", base, adapter, "-o", tmp_path / "out", "--dtype", "float32").exit_code == 0


def test_interrupted(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A run that is asked to end publishes nothing and exits with 130."""
    code = (
        "import os, signal, boft_export.pipeline.works as works\n"
        "real = works.Works.make\n"
        "def make(self, *arguments):\n"
        "    works.Works.make = real\n    os.kill(os.getpid(), signal.SIGTERM)\n    real(self, *arguments)\n"
        "works.Works.make = make\n"
        "from boft_export.cli.main import main\nmain()\n"
    )
    arguments = ["merge", str(base), str(adapter), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "hint"), [("merge", "Go on with --resume."), ("inspect", None)])
def test_interrupted_as_json(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, hint: str | None
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("boft_export.planning.inputs.Sources.__init__", interrupt)
    more = [adapter, "-o", tmp_path / "out"] if command == "merge" else []
    done = run(command, base, *more, "--json")
    error = json.loads(done.stdout)["error"]
    assert (done.exit_code, error["exit_code"], error["hint"]) == (130, 130, hint)
    assert ("--resume" in done.stderr) == (hint is not None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_full_stdout(base: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "boft_export", "inspect", str(base), *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_inspect(base: Path, adapter: Path) -> None:
    found = json.loads(run("inspect", adapter, "--json").stdout)
    assert (found["kind"], found["details"]["format"], found["details"]["layers"]) == ("adapter", "PEFT BOFT", 4)
    assert found["layers"][0]["num_factors"] == 2
    found = json.loads(run("inspect", base, "--json").stdout)
    assert (found["kind"], found["dtypes"]) == ("checkpoint", {"BF16": 6272})
    assert {t["pattern"]: t["count"] for t in found["tensors"]}["layers.*.up.weight"] == 2
    assert "layers.*.up" in run("inspect", base).stdout


def test_rotation(adapter: Path, tmp_path: Path) -> None:
    target = tmp_path / "rotations.safetensors"
    assert run("rotation", adapter, "-o", target, "--layer", "layers.0.*").exit_code == 0
    written, trained = load_file(target), load_file(adapter / "adapter_model.safetensors")
    assert set(written) == {f"layers.0.{m}.{k}" for m in ("up", "down") for k in ("rotation", "scale")}
    expected = butterfly_matrix(trained["base_model.model.layers.0.up.boft_R"])
    assert (written["layers.0.up.rotation"] - expected).abs().max() < 1e-14
    assert torch.equal(
        written["layers.0.up.scale"], trained["base_model.model.layers.0.up.boft_s"].double().reshape(-1)
    )


def test_env() -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert "cpu" in found["devices"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_lines_to_paste(command: str) -> None:
    lines = [line.strip() for line in run(command, "--help").stdout.splitlines() if line.strip()]
    assert any(line == "Examples:" for line in lines)
    assert lines[lines.index("Examples:") + 1].startswith(f"boft-export {command}")


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "boft_export", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("boft-export 0.")


def test_progress_only_on_a_terminal(base: Path, adapter: Path, tmp_path: Path) -> None:
    """On a terminal the bar moves on stderr; without one nothing is drawn, as the tests above show."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    seen: list[bytes] = []

    def drain() -> None:
        try:
            while chunk := os.read(leader, 4096):
                seen.append(chunk)
        except OSError:
            return

    reader = threading.Thread(target=drain)
    reader.start()
    command = [sys.executable, "-m", "boft_export", "merge", str(base), str(adapter), "-o", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(command, stderr=follower, stdout=subprocess.DEVNULL, env=environment, check=False)
    os.close(follower)
    reader.join(10)
    os.close(leader)
    assert done.returncode == 0
    assert b"merging" in b"".join(seen)
