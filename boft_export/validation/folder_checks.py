"""Judging what lies around a merged checkpoint's weights: config, side files, and what its manifest says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from boft_export.checkpoint import Checkpoint
from boft_export.errors import Level
from boft_export.pipeline.recorded import Recorded
from boft_export.planning import ConfigEdit, FoldPlan
from boft_export.planning.names import Rule
from boft_export.planning.output import OWN_FILES
from boft_export.validation.model import Check, Outcome

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_MISSING = object()
_TIE = "tie_word_embeddings"
# What programs set by themselves when they save.
_FREE_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", _TIE}
_SHOWN = 60


def check_config(base: Checkpoint, edits: Sequence[ConfigEdit], merged: Checkpoint) -> list[Check]:
    """Check that the config says what the weights are: a tie that was undone, sizes that changed, and else the base's.

    Args:
        base: The base.
        edits: What a merge changes in its config.
        merged: The merged checkpoint.
    """
    checks = []
    for edit in edits:
        found = _lookup(merged.config, edit.path)
        if found == edit.value:
            continue
        name = ".".join(edit.path)
        finding = "stale-tie" if edit.path[-1] == _TIE else "stale-config"
        shown = "nothing" if found is _MISSING else repr(found)
        message = f"{name} should be {edit.value!r} ({edit.reason}), found {shown}"
        checks.append(
            Check("config", "config.json", Outcome.FAIL, message, finding=finding, hint="Change it in config.json.")
        )
    if base.config_text is None:
        return checks
    if merged.config_text is None:
        message = "it is missing: the checkpoint can't be loaded by its folder"
        return [Check("config", "config.json", Outcome.FAIL, message, Level.WARNING, "missing-file")]
    edited = {e.path[0] for e in edits}
    if _TIE not in edited and merged.config.get(_TIE) is True and base.config.get(_TIE) is False:
        message = "it ties the output head to the embedding, and the base's doesn't"
        checks.append(Check("config", "config.json", Outcome.FAIL, message, finding="stale-tie"))
    # Other programs add keys and their own marks; what is in both should say the same.
    for name, own, other in _differences(merged.config, base.config, edited):
        message = f"{name} is {_short(own)}, the base's is {_short(other)}"
        checks.append(Check("config", "config.json", Outcome.FAIL, message, Level.WARNING, "other-config"))
    return checks or [Check("config", "config.json", Outcome.PASS, "it says what the weights are")]


def _differences(
    own: Mapping[str, Any], other: Mapping[str, Any], left_out: Iterable[str] = (), above: str = ""
) -> Iterator[tuple[str, object, object]]:
    """Yield the keys that both configs have, and what each says where it differs."""
    for key in sorted((own.keys() & other.keys()) - _FREE_KEYS - set(left_out)):
        a, b = own[key], other[key]
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, (), f"{above}{key}.")
        elif a != b:
            yield above + key, a, b


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _lookup(config: Mapping[str, Any], path: Sequence[str]) -> object:
    value: object = config
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def check_names(rules: Sequence[Rule], merged: Checkpoint) -> list[Check]:
    """Check that tensors have the names that loaders look for; ``rules`` are those under which they were found."""
    if not rules:
        return []
    message = f"tensors have other names than the base's: {', '.join(map(str, rules))}"
    if merged.config_text is None:
        return [Check("layout", "names", Outcome.PASS, message)]
    hint = "Loaders that look for the base's names don't find these."
    return [Check("layout", "names", Outcome.FAIL, message, Level.WARNING, "other-names", hint)]


def check_side_files(expected: Sequence[PurePosixPath], merged: Checkpoint) -> list[Check]:
    """Check that the base's side files are there, and no adapter that loaders would apply once more.

    Args:
        expected: The side files that a merge takes along.
        merged: The merged checkpoint.
    """
    checks = []
    if left := [n for n in _ADAPTER_FILES if (merged.root / merged.folder / n).is_file()]:
        message = "an adapter lies beside the merged weights: transformers would apply it once more"
        checks.append(Check("files", left[0], Outcome.FAIL, message, finding="adapter-left", hint="Remove it."))
    if merged.config_text is None and not merged.side_files:
        return checks
    ours = {f.name for f in merged.side_files}
    for name in (f for f in expected if f.name not in {*ours, *OWN_FILES, "config.json"}):
        message = "the base has it, the merged checkpoint doesn't"
        checks.append(Check("files", str(name), Outcome.FAIL, message, Level.WARNING, "missing-file"))
    if not checks:
        checks.append(Check("files", "", Outcome.PASS, "config, tokenizer and other files of the base are there"))
    return checks


def check_manifest(
    recorded: Recorded, plan: FoldPlan | None, inputs: Mapping[str, str], files: Mapping[str, str]
) -> list[Check]:
    """Compare hashes with those that the manifest has.

    Args:
        recorded: What the manifest says.
        plan: The merge of the given base and adapters; None where there is no adapter.
        inputs: SHA-256 of the base's and the adapters' files, by the names that manifests give them.
        files: SHA-256 of the merged checkpoint's weight files.
    """
    checks = []
    for name, file in recorded.files.items():
        found = files.get(name)
        if found is None:
            message = "the manifest lists it, and it is missing"
            checks.append(_failed("manifest", name, "missing-file", message))
        elif found != file.sha256:
            message = f"its SHA-256 is {found[:12]}..., the manifest's is {file.sha256[:12]}..."
            checks.append(_failed("manifest", name, "changed-file", message, "It was changed after the merge."))
    unlisted = sorted(files.keys() - recorded.files.keys())
    checks += [_failed("manifest", n, "unlisted-file", "the manifest doesn't list it") for n in unlisted]
    checks += _compare_input("base", "other-base", recorded.base.sha256, _of(inputs, "base/"))
    if plan is not None:
        if len(recorded.adapters) != len(plan.adapters):
            message = f"{len(recorded.adapters)} adapters were merged, {len(plan.adapters)} are given"
            checks.append(_failed("manifest", "", "other-adapter", message))
        for i, adapter in enumerate(recorded.adapters[: len(plan.adapters)]):
            found_here = _of(inputs, f"adapter-{i}/")
            checks += _compare_input(f"adapter {adapter.name}", "other-adapter", adapter.sha256, found_here)
    if not checks:
        message = f"{len(files)} files are those that were written, from these inputs"
        checks.append(Check("manifest", "", Outcome.PASS, message))
    return checks


def _of(hashes: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {n.removeprefix(prefix): h for n, h in hashes.items() if n.startswith(prefix)}


def _compare_input(what: str, finding: str, recorded: Mapping[str, str], found: Mapping[str, str]) -> list[Check]:
    """Compare an input's files; the base may lie in other files than then, and only weights decide."""
    weights = {n: h for n, h in recorded.items() if not n.endswith(".json")}
    if weights and set(weights.values()) <= set(found.values()):
        return []
    if not set(weights) & set(found):
        message = "its files have other names than those that were merged, so their hashes say nothing"
        return [Check("manifest", what, Outcome.INCONCLUSIVE, message)]
    differ = [n for n, h in weights.items() if found.get(n) != h]
    message = (
        f"{len(differ)} of {len(weights)} files are not those that were merged, by SHA-256; the first: {differ[0]}"
    )
    return [_failed("manifest", what, finding, message, "Give what was merged, at its revision.")]


def _failed(check: str, subject: str, finding: str, message: str, hint: str | None = None) -> Check:
    return Check(check, subject, Outcome.FAIL, message, finding=finding, hint=hint)
