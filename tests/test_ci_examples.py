"""The examples for CI, each run as its system runs it: on right merges, on spoiled ones, and with hostile names."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from html_page import assert_self_contained
from jsonschema import Draft202012Validator
from junitparser import Error, Failure, JUnitXml
from sabotage import FIRST, SABOTAGES, Bed, make_bed
from safetensors.torch import load_file, save_file

from boft_export.report.schemas import schema
from boft_export.validation.policy import Policy, Thresholds, read_policy

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples" / "ci"
ACTION: dict[str, Any] = yaml.safe_load((EXAMPLES / "action.yml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text())
GITLAB: dict[str, Any] = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())["validate-adapter"]
HOOK: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())[0]
JOB: dict[str, Any] = WORKFLOW["jobs"]["validate"]
SCRIPTS = Path(sys.executable).parent
BASH = shutil.which("bash") or "bash"
EXPRESSION = re.compile(r"\$\{\{(.*?)\}\}", re.DOTALL)

# Run as a command, each of these would leave a file called x behind.
HOSTILE = [
    "a b", "$(touch x)", "`touch x`", "'; touch x; '", '"; touch x; "', "x\\", "*", "~", "--help", "%0A::error::x",
    "${{ github.token }}", "a=b", "é\u2028", "-",
]  # fmt: skip
NEWLINES = "a\nb'$(touch x)\noutcome=pass\n\n"


# The systems, as far as the examples use them


def script(path: Path, text: str) -> None:
    """Write a Python program that can be called by its name."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def recorder(path: Path, record: Path, *, stdout: str = "", exit_code: int = 0) -> None:
    """Write a program that writes down its arguments, once for each call."""
    text = (
        f"import json, sys\nopen({str(record)!r}, 'a').write(json.dumps(sys.argv[1:]) + '\\n')\n"
        f"sys.stdout.write({stdout!r})\nsys.exit({exit_code})\n"
    )
    script(path, text)


def calls(record: Path) -> list[list[str]]:
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


@dataclass
class Machine:
    """A machine that runs jobs: programs in ``programs`` come before the real ones.

    Attributes:
        folder: For all that is not the job's own.
        work: The job's folder, where its steps run.
        used: Actions that are not in the repository, with what they are given.
    """

    folder: Path
    work: Path = field(init=False)
    programs: Path = field(init=False)
    used: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work, self.programs = self.folder / "work", self.folder / "programs"
        for made in (self.work, self.programs, self.folder / "temp"):
            made.mkdir(parents=True)
        # Nothing is installed from the network.
        recorder(self.programs / "pip", self.folder / "pip.jsonl")

    def bash(self, text: str, env: Mapping[str, str], options: Sequence[str]) -> subprocess.CompletedProcess[str]:
        file = self.folder / "script.sh"
        file.write_text(text)
        path = f"{self.programs}:{SCRIPTS}:/usr/bin:/bin"
        own = {"PATH": path, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8", "COLUMNS": "80"}
        command = [BASH, *options, str(file)]
        return subprocess.run(
            command, cwd=self.work, env={**own, **env}, capture_output=True, text=True, timeout=200, check=False
        )


@dataclass
class Ended:
    """How an action or a job ended."""

    code: int = 0
    stdout: str = ""
    stderr: str = ""
    summary: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)


@dataclass
class GitHub(Machine):
    """GitHub's runner."""

    def steps(self, steps: Sequence[Mapping[str, Any]], contexts: dict[str, Any], env: Mapping[str, str]) -> Ended:
        """Run steps; after one that failed, those that run always."""
        ended = Ended()
        contexts = {**contexts, "steps": {}}
        for step in steps:
            if not condition(step.get("if"), contexts, failed=ended.code != 0):
                continue
            own = {**env, **{k: evaluate(str(v), contexts) for k, v in step.get("env", {}).items()}}
            given = {k: evaluate(text_of(v), contexts) for k, v in step.get("with", {}).items()}
            uses = step.get("uses")
            if uses is None:
                done = self.run(step["run"], own)
            elif uses.startswith("./"):
                done = self.action(given, env, self.work / uses)
            else:
                self.used.append((uses, given))
                continue
            ended.ran.append(step.get("name", uses))
            ended.code = ended.code or done.code
            ended.stdout += done.stdout
            ended.stderr += done.stderr
            ended.summary += done.summary
            if "id" in step:
                contexts["steps"][step["id"]] = {"outputs": done.outputs}
        ended.outputs = contexts["steps"]
        return ended

    def run(self, text: str, env: Mapping[str, str]) -> Ended:
        """Run a step's script, with files of its own for outputs and the summary."""
        outputs, summary = self.folder / "outputs", self.folder / "summary"
        outputs.write_text("")
        summary.write_text("")
        own = {
            "GITHUB_ACTIONS": "true",
            "CI": "true",
            "GITHUB_OUTPUT": str(outputs),
            "GITHUB_STEP_SUMMARY": str(summary),
            "RUNNER_TEMP": str(self.folder / "temp"),
        }
        done = self.bash(text, {**own, **env}, ["--noprofile", "--norc", "-eo", "pipefail"])
        return Ended(done.returncode, done.stdout, done.stderr, summary.read_text(), read_outputs(outputs.read_text()))

    def action(self, given: Mapping[str, str], env: Mapping[str, str], folder: Path = EXAMPLES) -> Ended:
        """Run a composite action; inputs that it does not have are an error here."""
        action = yaml.safe_load((folder / "action.yml").read_text())
        assert given.keys() <= action["inputs"].keys()
        inputs = {k: given.get(k, v["default"]) for k, v in action["inputs"].items()}
        ended = self.steps(action["runs"]["steps"], {"inputs": inputs}, {**env, "GITHUB_ACTION_PATH": str(folder)})
        contexts = {"steps": ended.outputs}
        ended.outputs = {k: evaluate(v["value"], contexts) for k, v in action["outputs"].items()}
        return ended


def evaluate(text: str, contexts: Mapping[str, Any]) -> str:
    """Return a text with its expressions' values; there is nothing in them but names."""

    def value(found: re.Match[str]) -> str:
        node: Any = contexts
        first, *rest = found[1].strip().split(".")
        assert first in contexts, found[0]
        for name in (first, *rest):
            node = node.get(name, "") if isinstance(node, Mapping) else ""
        return str(node)

    return EXPRESSION.sub(value, text)


def condition(text: str | None, contexts: Mapping[str, Any], *, failed: bool) -> bool:
    if text == "always()":
        return True
    if text is None or failed:
        return not failed
    name, word = re.fullmatch(r"([\w.]+) != '(\w+)'", text).groups()  # type: ignore[union-attr]
    return evaluate("${{ " + name + " }}", contexts) != word


def text_of(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_outputs(text: str) -> dict[str, str]:
    """Read a step's outputs as GitHub's runner does: NAME=VALUE, or NAME<<END, lines, END."""
    found = {}
    lines = iter(text.removesuffix("\n").split("\n") if text else ())
    for line in lines:
        if "<<" in line.split("=")[0]:
            name, end = line.split("<<", 1)
            kept = []
            for inner in lines:
                if inner == end:
                    break
                kept.append(inner)
            else:
                raise AssertionError(f"{name} has no end")
            found[name] = "\n".join(kept)
        else:
            name, found[name] = line.split("=", 1)
    return found


# Merges to run on


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    """A right merge, in a folder whose name has what shells trip over."""
    return make_bed(tmp_path_factory.mktemp("bed") / 'it\'s $(touch x) "here"', torch.float32)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    made = make_bed(tmp_path_factory.mktemp("spoiled"), torch.float32)
    SABOTAGES["layer-skipped"][0](made)
    return made


@pytest.fixture
def github(tmp_path: Path) -> GitHub:
    return GitHub(tmp_path / "github")


def merge_wrongly(machine: Machine, merged: Path) -> None:
    """Put a boft-export on the machine whose merges come out as ``merged``; all else it does as it should."""
    text = (
        "import os, shutil, sys\n"
        "if sys.argv[1] == 'merge':\n"
        f"    shutil.copytree({str(merged)!r}, sys.argv[sys.argv.index('--output') + 1])\n"
        "else:\n"
        f"    os.execv({str(SCRIPTS / 'boft-export')!r}, sys.argv)\n"
    )
    script(machine.programs / "boft-export", text)


def assert_reports(page: Path, junit: Path, finding: str | None = None) -> None:
    """Hold a page and a JUnit report to a merge that is right, or has one kind of error."""
    parsed = JUnitXml.fromfile(str(junit))
    results = [r for suite in parsed for case in suite for r in case.result]
    told = "".join(assert_self_contained(page.read_text()).text)
    if finding is None:
        assert parsed.tests > 0
        assert results == []
        assert "not valid" not in told
    else:
        assert {(type(r), r.type) for r in results} == {(Failure, finding)}
        assert "not valid" in told
        assert finding in told


# GitHub: the action


def test_the_action_passes_a_right_merge(github: GitHub, bed: Bed) -> None:
    given = {
        "install": "false",
        "adapters": f"{bed.adapter}\n",
        "base": str(bed.base),
        "merged": str(bed.merged),
        "policy": str(EXAMPLES / "policy.yaml"),
        "thresholds": "max_angle=3.1\nmax_ulp=0\n",
        "fail-on": "warning\ninconclusive",
        "report": "reports/a page.html",
        "junit": "reports/junit.xml",
        "json": "reports/validation.json",
    }
    done = github.action(given, {})
    assert (done.code, done.stdout) == (0, "boft-export validate: pass\n"), done.stderr
    assert done.outputs == {
        "outcome": "pass", "report": "reports/a page.html", "junit": "reports/junit.xml",
        "json": "reports/validation.json",
    }  # fmt: skip
    document = json.loads((github.work / done.outputs["json"]).read_text())
    Draft202012Validator(schema("validate")).validate(document)
    assert document["fail_on"] == ["error", "inconclusive", "warning"]
    assert_reports(github.work / done.outputs["report"], github.work / done.outputs["junit"])
    assert done.summary.startswith("## ✅ boft-export validate: valid")
    assert sorted(p.name for p in github.work.iterdir()) == ["reports"]
    assert calls(github.folder / "pip.jsonl") == []


def test_the_action_fails_with_a_spoiled_merge(github: GitHub, spoiled: Bed) -> None:
    given = {
        "install": "false", "adapters": str(spoiled.adapter), "base": str(spoiled.base), "merged": str(spoiled.merged),
        "report": "page.html", "junit": "junit.xml",
    }  # fmt: skip
    done = github.action(given, {})
    assert (done.code, done.outputs["outcome"]) == (1, "fail"), done.stderr
    assert f"::error title=layer-skipped%3A {FIRST}::" in done.stderr
    assert done.summary.startswith("## ❌ boft-export validate: not valid")
    assert "layer-skipped" in done.summary
    assert_reports(github.work / "page.html", github.work / "junit.xml", "layer-skipped")
    assert json.loads(Path(done.outputs["json"]).read_text())["outcome"] == "fail"
    assert Path(done.outputs["json"]).is_relative_to(github.folder / "temp")


def test_the_action_tells_an_error_from_a_failure(github: GitHub, bed: Bed) -> None:
    """A page of an earlier run is not what this one wrote."""
    page = github.work / "page.html"
    page.write_text("<!doctype html>old")
    os.utime(page, (0, 0))
    given = {"adapters": str(bed.adapter), "base": "./nowhere", "merged": str(bed.merged)}
    done = github.action({**given, "install": "false", "report": "page.html", "junit": "junit.xml"}, {})
    assert done.code == 4
    assert {k: done.outputs[k] for k in ("outcome", "report", "junit")} == {
        "outcome": "error", "report": "", "junit": "junit.xml"
    }  # fmt: skip
    errors = [r for suite in JUnitXml.fromfile(str(github.work / "junit.xml")) for case in suite for r in case.result]
    assert [type(r) for r in errors] == [Error]
    assert "no result" in done.summary


@pytest.mark.parametrize(
    ("stdout", "code", "outcome"),
    [
        ('{"outcome": "inconclusive"}', 0, "inconclusive"),
        ('{"outcome": "inconclusive"}', 1, "inconclusive"),
        ('{"error": {}}', 70, "error"),
        ('{"outcome": "pa', 137, "error"),
        ("", 2, "error"),
    ],
)
def test_the_step_ends_as_the_command_does(github: GitHub, stdout: str, code: int, outcome: str) -> None:
    recorder(github.programs / "boft-export", github.folder / "calls.jsonl", stdout=stdout, exit_code=code)
    done = github.action({"install": "false", "adapters": "a"}, {})
    assert (done.code, done.outputs["outcome"]) == (code, outcome)


def test_a_missing_command_is_no_pass(github: GitHub) -> None:
    script(github.programs / "boft-export", "")
    (github.programs / "boft-export").chmod(0o644)
    (github.programs / "python3").symlink_to(sys.executable)
    done = github.action({"install": "false", "adapters": "a"}, {"PATH": f"{github.programs}:/usr/bin:/bin"})
    assert (done.code in {126, 127}, done.outputs["outcome"]) == (True, "error")


def test_all_inputs_reach_the_command_as_they_are(github: GitHub) -> None:
    """Texts of one line, and of several, that would be commands, options or workflow commands."""
    record = github.folder / "calls.jsonl"
    recorder(github.programs / "boft-export", record, stdout='{"outcome": "pass"}')
    lines = "\n".join(HOSTILE)
    one = {
        "base": "--base=",
        "merged": "--merged=",
        "policy": "--policy=",
        "report": "--report=",
        "junit": "--junit-xml=",
    }
    many = {"thresholds": "--threshold=", "fail-on": "--fail-on=", "args": "", "adapters": ""}
    for text in [*HOSTILE, NEWLINES, ""]:
        given = {
            "install": "false",
            "functional": "true",
            **dict.fromkeys(one, text),
            **dict.fromkeys(many, f"{lines}\n\n"),
        }
        done = github.action(given, {})
        assert done.code == 0, done.stderr
        assert done.outputs["outcome"] == "pass"
        (arguments,) = calls(record)
        record.unlink()
        options, adapters = arguments[: -len(HOSTILE) - 1], arguments[-len(HOSTILE) :]
        assert arguments[-len(HOSTILE) - 1] == "--"
        assert adapters == HOSTILE
        assert sorted(options) == sorted(
            ["validate", "--json", "--functional", *(o + text for o in one.values() if text)]
            + [option + line for name, option in many.items() if name != "adapters" for line in HOSTILE]
        )
    assert list(github.work.iterdir()) == []


@pytest.mark.parametrize("name", [*HOSTILE, NEWLINES + "a"])
def test_outputs_hold_the_names_of_what_was_written(github: GitHub, name: str) -> None:
    """A name with lines of its own sets no other output."""
    text = (
        "import sys\n"
        "for a in sys.argv:\n"
        "    if a.startswith('--report='):\n"
        "        open(a.removeprefix('--report='), 'w').close()\n"
        'print(\'{"outcome": "fail"}\')\n'
    )
    script(github.programs / "boft-export", text)
    done = github.action({"install": "false", "report": name, "json": f"{name}.d/made.json"}, {})
    assert done.code == 0, done.stderr
    assert done.outputs == {"outcome": "fail", "report": name, "junit": "", "json": f"{name}.d/made.json"}
    assert {p.name for p in github.work.iterdir()} == {name, f"{name}.d"}


@pytest.mark.parametrize(
    ("text", "code"), [("true", 0), ("false", 0), ("", 0), ("yes", 2), ("True", 2), ("$(touch x)", 2)]
)
def test_functional_is_true_or_false(github: GitHub, text: str, code: int) -> None:
    record = github.folder / "calls.jsonl"
    recorder(github.programs / "boft-export", record, stdout='{"outcome": "pass"}')
    assert github.action({"install": "false", "functional": text}, {}).code == code
    assert [("--functional" in c) for c in calls(record)] == ([text == "true"] if code == 0 else [])
    assert list(github.work.iterdir()) == []


def test_the_action_installs_its_own_version_or_what_it_is_told(github: GitHub, tmp_path: Path) -> None:
    recorder(github.programs / "boft-export", github.folder / "calls.jsonl", stdout='{"outcome": "pass"}')
    pip = github.folder / "pip.jsonl"
    assert github.action({}, {}).code == 0
    assert github.action({"functional": "true"}, {}).code == 0
    constraint = ["--constraint", str(ROOT / "constraints.txt")]
    own = ["install", f"{ROOT}[plots]", *constraint]
    assert calls(pip) == [own, [*own, "peft", "transformers"]]
    pip.unlink()
    assert github.action({"package": "boft-export[plots]==0.1.0\n$(touch x) 'a'\n\n"}, {}).code == 0
    assert calls(pip) == [["install", "boft-export[plots]==0.1.0", "$(touch x) 'a'"]]
    pip.unlink()
    assert list(github.work.iterdir()) == []
    # Outside of the repository there is no package to install.
    copy = tmp_path / "elsewhere" / "a" / "b"
    copy.mkdir(parents=True)
    shutil.copy(EXAMPLES / "action.yml", copy)
    done = github.action({}, {}, copy)
    assert (done.code, done.ran) == (2, ["Install boft-export"])
    assert done.stdout.startswith("::error::This copy")
    assert calls(pip) == []
    recorder(github.programs / "pip", pip, exit_code=1)
    assert github.action({}, {}).code == 1


def test_what_the_action_installs_is_there_and_known() -> None:
    """Its extras and its constraints are ones that the package has."""
    text = ACTION["runs"]["steps"][0]["run"]
    (extra,) = re.findall(r"\[(\w+)\]\"", text)
    project = (ROOT / "pyproject.toml").read_text()
    assert f"\n{extra} = [" in project
    constraints = (ROOT / "constraints.txt").read_text()
    assert all(f"\n{name}==" in constraints for name in ("peft", "transformers"))


def test_every_input_and_output_is_declared_and_used() -> None:
    steps = ACTION["runs"]["steps"]
    used = {x for s in steps for v in s.get("env", {}).values() for x in re.findall(r"inputs\.([\w-]+)", v)}
    used |= {x for s in steps for x in re.findall(r"inputs\.([\w-]+)", s.get("if", ""))}
    assert used == set(ACTION["inputs"])
    (made,) = [s["run"] for s in steps if s.get("id") == "validate"]
    assert set(re.findall(r"(?:output|written) (\w+) \"", made)) == set(ACTION["outputs"])
    for step in steps:
        assert step["shell"] == "bash"
        for name in step["env"]:
            assert f"${name}" in step["run"] or f"${{{name}" in step["run"]
    for item in (*ACTION["inputs"].values(), *ACTION["outputs"].values()):
        assert item["description"].endswith(".")


@pytest.mark.parametrize("steps", [ACTION["runs"]["steps"], JOB["steps"]])
def test_no_script_has_an_expression_in_it(steps: list[dict[str, Any]]) -> None:
    assert any("run" in s for s in steps)
    assert not any(EXPRESSION.search(s.get("run", "")) for s in steps)


# GitHub: the workflow


def run_workflow(github: GitHub, bed: Bed) -> Ended:
    (github.work / "boft-export").symlink_to(ROOT)
    env = {**{k: str(v) for k, v in WORKFLOW["env"].items()}, "BASE": str(bed.base), "ADAPTER": str(bed.adapter)}
    return github.steps(JOB["steps"], {"env": env}, env)


def assert_uploaded(github: GitHub) -> None:
    uses, given = github.used[-1]
    assert uses.startswith("actions/upload-artifact@")
    assert {p.name for p in (github.work / given["path"]).iterdir()} == {"report.html", "junit.xml"}


def test_the_workflow_passes_a_right_merge(github: GitHub, bed: Bed) -> None:
    done = run_workflow(github, bed)
    assert done.code == 0, done.stderr
    assert done.ran == ["Install", "Merge", "Validate"]
    assert done.outputs["validate"]["outputs"]["outcome"] == "pass"
    assert_reports(github.work / "validation/report.html", github.work / "validation/junit.xml")
    assert_uploaded(github)
    (installed,) = calls(github.folder / "pip.jsonl")
    assert installed == ["install", "./boft-export[plots]", "--constraint", "boft-export/constraints.txt"]
    assert {p.name for p in github.work.iterdir()} == {"boft-export", "merged", "validation"}


def test_the_workflow_fails_with_a_spoiled_merge_and_keeps_its_reports(github: GitHub, spoiled: Bed) -> None:
    merge_wrongly(github, spoiled.merged)
    done = run_workflow(github, spoiled)
    assert done.code == 1
    assert done.outputs["validate"]["outputs"]["outcome"] == "fail"
    assert_reports(github.work / "validation/report.html", github.work / "validation/junit.xml", "layer-skipped")
    assert_uploaded(github)


def test_the_workflow_asks_for_little_and_names_what_it_uses() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert "permissions" not in JOB
    # YAML takes the key for a truth.
    assert set(WORKFLOW[True]) == {"pull_request", "workflow_dispatch"}
    names = [s["uses"] for s in JOB["steps"] if "uses" in s]
    local = [n for n in names if n.startswith("./")]
    assert local == ["./boft-export/examples/ci"]
    (checkout,) = [s["with"] for s in JOB["steps"] if s.get("with", {}).get("path") == "boft-export"]
    assert checkout["repository"].endswith("/boft-export")
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", n) for n in names if n not in local)
    for step in JOB["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    last = JOB["steps"][-1]
    assert (last["if"], last["with"]["path"]) == ("always()", "validation")


# GitLab


def run_gitlab(machine: Machine, bed: Bed) -> subprocess.CompletedProcess[str]:
    env = {**GITLAB["variables"], "BASE": str(bed.base), "ADAPTER": str(bed.adapter), "GITLAB_CI": "true", "CI": "true"}
    return machine.bash("\n".join(GITLAB["before_script"] + GITLAB["script"]), env, ["-eo", "pipefail"])


def test_gitlab_passes_a_right_merge(tmp_path: Path, bed: Bed) -> None:
    machine = Machine(tmp_path / "gitlab")
    done = run_gitlab(machine, bed)
    assert done.returncode == 0, done.stderr
    assert "valid: " in done.stdout
    assert "::" not in done.stderr
    assert calls(machine.folder / "pip.jsonl") == [["install", GITLAB["variables"]["PACKAGE"]]]
    assert_reports(machine.work / "validation/report.html", machine.work / "validation/junit.xml")
    assert {p.name for p in machine.work.iterdir()} == {"merged", "validation"}


def test_gitlab_fails_with_a_spoiled_merge_and_keeps_its_reports(tmp_path: Path, spoiled: Bed) -> None:
    machine = Machine(tmp_path / "gitlab")
    merge_wrongly(machine, spoiled.merged)
    done = run_gitlab(machine, spoiled)
    assert done.returncode == 1
    assert "layer-skipped" in done.stdout
    kept = GITLAB["artifacts"]
    assert kept["when"] == "always"
    (page,) = kept["paths"]
    assert_reports(machine.work / page, machine.work / kept["reports"]["junit"], "layer-skipped")


# pre-commit


def run_hook(
    machine: Machine, files: Sequence[str], args: Sequence[str] = (), path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the hook as pre-commit does: its entry split as a shell would, but without one, then args and files."""
    command = [*shlex.split(HOOK["entry"]), *args, *(f for f in files if re.search(HOOK["files"], f))]
    # The environment that pre-commit makes comes first on the path.
    command[0] = str(SCRIPTS / command[0])
    env = {**os.environ, "PYTHONPATH": str(path or ""), "PYTHONUTF8": "1"}
    return subprocess.run(command, cwd=machine.work, env=env, capture_output=True, text=True, timeout=200, check=False)


def test_the_hook_takes_adapters_only() -> None:
    taken = ["adapter_config.json", "a/adapter_model.safetensors", "a b/c/adapter_model.bin"]
    left = [
        "adapter_config.json.md",
        "my_adapter_config.json",
        "model.safetensors",
        "adapter_modelxsafetensors",
        "adapter/x",
    ]
    assert [f for f in taken + left if re.search(HOOK["files"], f)] == taken


def test_the_hook_passes_right_adapters_by_whatever_name(tmp_path: Path, bed: Bed) -> None:
    machine = Machine(tmp_path / "hook")
    # A module of the repository is none of the program's.
    (machine.work / "typer.py").write_text("raise SystemExit(99)")
    names = [".", "a b", "$(touch x)", "-x", "--policy=none.yaml", "a\nb", 'it\'s "é"']
    for name in names:
        shutil.copytree(bed.adapter, machine.work / name, dirs_exist_ok=True)
    files = [str(Path(name) / file) for name in names for file in ("adapter_config.json", "adapter_model.safetensors")]
    before = sorted(machine.work.rglob("*"))
    done = run_hook(machine, [*files, "typer.py"], ["--threshold=max_angle=3.1", "--fail-on", "inconclusive"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("valid: ") == len(names)
    told = done.stdout.splitlines()
    assert [line for line in told if line in set(map(ascii, names))] == list(map(ascii, sorted(names)))
    assert sorted(machine.work.rglob("*")) == before


def test_the_hook_fails_with_a_spoiled_adapter_and_tells_of_all(tmp_path: Path, bed: Bed) -> None:
    machine = Machine(tmp_path / "hook")
    shutil.copytree(bed.adapter, machine.work / "a")
    shutil.copytree(bed.adapter, machine.work / "b")
    file = machine.work / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for n, t in tensors.items() if n.endswith("boft_s"))[0] = torch.nan
    save_file(tensors, file)
    # A config alone is enough to find its adapter.
    done = run_hook(machine, ["a/adapter_config.json", "b/adapter_config.json"])
    assert done.returncode == 1
    assert "not-finite" in done.stdout
    assert done.stdout.index("'a'") < done.stdout.index("not valid: ") < done.stdout.index("'b'")
    assert done.stdout.rstrip().splitlines()[-1].startswith("valid: ")


@pytest.mark.parametrize(("codes", "code", "tried"), [((1, 3, 0), 3, 3), ((4, 1, 0), 4, 3), ((0, 130, 0), 130, 2)])
def test_the_hook_ends_as_the_worst_and_stops_when_interrupted(
    tmp_path: Path, codes: tuple[int, ...], code: int, tried: int
) -> None:
    machine = Machine(tmp_path / "hook")
    package, record = tmp_path / "path" / "boft_export" / "cli", tmp_path / "calls.jsonl"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    text = (
        "import json, sys\n"
        "def main():\n"
        f"    file = open({str(record)!r}, 'a+')\n"
        "    print(json.dumps(sys.argv), file=file, flush=True)\n"
        "    file.seek(0)\n"
        f"    sys.exit({codes!r}[len(file.readlines()) - 1])\n"
    )
    (package / "main.py").write_text(text)
    names = ["--policy=$(touch x)", "a b", "a\n'b"]
    for name in names:
        (machine.work / name).mkdir()
        (machine.work / name / "adapter_config.json").touch()
    (machine.work / "--policy=$(touch x)" / "adapter_model.bin").touch()
    files = [f"{names[0]}/adapter_model.bin", *(f"{n}/adapter_config.json" for n in names)]
    options = ["--base=b/adapter_model.bin", "--text", "$(touch x)", "--text", "b"]
    done = run_hook(machine, files, options, package.parent.parent)
    assert done.returncode == code, done.stderr
    ran = sorted(names)[:tried]
    assert calls(record) == [["boft-export", "validate", *options, "--", name] for name in ran]
    assert done.stdout.splitlines() == list(map(ascii, ran))
    assert {p.name for p in machine.work.iterdir()} == set(names)


def test_the_config_for_pre_commit_uses_the_hook() -> None:
    (repository,) = yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text())["repos"]
    assert [h["id"] for h in repository["hooks"]] == [HOOK["id"]]
    assert repository["repo"].endswith("/boft-export")
    assert HOOK["language"] == "python"


# What is beside them


def test_the_policy_has_every_key() -> None:
    text = (EXAMPLES / "policy.yaml").read_text()
    given = yaml.safe_load(text)
    assert set(given) == {f.name for f in fields(Policy)}
    assert set(given["thresholds"]) == {f.name for f in fields(Thresholds)}
    policy = read_policy(EXAMPLES / "policy.yaml")
    assert policy.thresholds.arithmetic == Thresholds().arithmetic
    defaults = re.findall(r"^  (\w+): .*# default (none|[\d.]+|-?\.inf)[:;\n]", text, re.MULTILINE)
    assert len(defaults) == len(given["thresholds"]) - 2
    for name, told in defaults:
        default = getattr(Thresholds(), name)
        assert default == (None if told == "none" else yaml.safe_load(told)), name


def test_versions_and_places_are_the_same_everywhere() -> None:
    from boft_export.version import __version__

    texts = {p.name: p.read_text() for p in EXAMPLES.iterdir() if p.is_file()}
    told = {name: set(re.findall(r"\bv(\d+\.\d+\.\d+)\b", text)) for name, text in texts.items()}
    assert {v for versions in told.values() for v in versions} == {__version__}
    readme = texts.pop("README.md")
    assert all(f"`{name}`" in readme for name in texts)
    assert set(re.findall(r"`([\w-]+\.ya?ml)`", readme)) == set(texts)
