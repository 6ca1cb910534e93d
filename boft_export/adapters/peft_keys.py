"""The keys of an adapter that PEFT saved, sorted: parts of layers, what replaces a tensor, what is left out."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from boft_export.adapters.adapter import Adapter, AdapterLayer, Replacement, ReplacementKind, TensorInfo
from boft_export.errors import Level, Notice

_PREFIX = "base_model.model."
_LEAKED = "belongs to another adapter ({}) that leaked into this file"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_METHODS = re.compile(r"\b(lora|boft|oft|hada|vera|ia3|loha|lokr|hra|road)_")
# Up to this release some settings of `bias` saved no bias at all.
_LOST_BIAS_UNTIL = (0, 20)


@dataclass
class PeftKeys:
    """An adapter's keys, sorted.

    Attributes:
        parts: The keys of each layer, by module and by the part's name.
        replacements: What is replaced.
        dropped: Keys that are left out, with the reason.
        leaked: Names of other adapters that leaked into the file.
        notices: What was found on the way, errors included.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    replacements: list[Replacement] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    leaked: set[str] = field(default_factory=set)
    notices: list[Notice] = field(default_factory=list)


def part_pattern(*parts: str, suffix: str = "") -> re.Pattern[str]:
    """Return the pattern of the keys of a layer's parts: ``MODULE.PART[.ADAPTER]SUFFIX``, without PEFT's prefix."""
    return re.compile(
        rf"(?:(?P<module>.+)\.)?(?P<part>{'|'.join(parts)})(?:\.(?P<adapter>[^.]+))??{re.escape(suffix)}$"
    )


def sort_keys(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    patterns: Sequence[re.Pattern[str]],
    redundant: Mapping[str, str] | None = None,
) -> PeftKeys:
    """Sort every key of an adapter.

    Args:
        config: The adapter's config.
        tensors: Its tensors' headers by key.
        patterns: From ``part_pattern``; a key that fits none is no part of a layer.
        redundant: Parts that are left out without a word, with the reason.
    """
    found = PeftKeys()
    others: dict[str, str] = {}
    for key in tensors:
        # A compiled module's wrapper shows in its parameters' names.
        name = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
        match = next((m for p in patterns if (m := p.match(name))), None)
        if match is None:
            _claim(others, name.removesuffix(".default"), key, found.notices)
        elif redundant and match["part"] in redundant:
            found.dropped[key] = redundant[match["part"]]
        elif match["adapter"] and (match["adapter"] != "default" or _without_adapter(key, match) in tensors):
            found.leaked.add(match["adapter"])
            found.dropped[key] = _LEAKED.format(match["adapter"])
        else:
            _claim(found.parts[match["module"] or ""], match["part"], key, found.notices)
    saved = set(config.get("modules_to_save") or ())
    found.replacements = [
        replace(r, may_add=_names_module(r.name, saved)) for r in _replacements(others, tensors, found)
    ]
    silent = set((redundant or {}).values())
    found.notices += [
        Notice(Level.INFO, "dropped-key", key, f"left out: {reason}")
        for key, reason in found.dropped.items()
        if reason not in silent
    ]
    return found


def make_adapter(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    keys: PeftKeys,
    layers: Sequence[AdapterLayer],
    expected: str,
) -> Adapter:
    """Return the adapter made of sorted keys; one without any effect is an error.

    Args:
        name: The format's name.
        config: The adapter's config.
        tensors: Its tensors' headers by key.
        keys: Its keys, sorted.
        layers: The layers that were made of them.
        expected: The parts of a layer, for the message that there is none.
    """
    notices = [*keys.notices, *_narrow(layers, tensors)]
    if keys.leaked and not layers:
        message = (
            f"all its rotations belong to other adapters that leaked into this file: {', '.join(sorted(keys.leaked))}"
        )
        notices.append(Notice(Level.ERROR, "empty-adapter", "adapter", message, "Save the adapter again."))
    if not layers and not keys.replacements and not any(n.level is Level.ERROR for n in notices):
        message = f"it holds no tensors: expected {expected} keys"
        notices.append(Notice(Level.ERROR, "empty-adapter", "adapter", message))
    mapping = config.get("auto_mapping")
    return Adapter(
        format=name,
        tensors=tensors,
        layers=tuple(layers),
        replacements=tuple(keys.replacements),
        dropped=keys.dropped,
        notices=tuple(notices),
        base_model=config.get("base_model_name_or_path") or None,
        base_revision=config.get("revision") or None,
        model_class=mapping.get("base_model_class") if isinstance(mapping, dict) else None,
        task=config.get("task_type") or None,
    )


def release(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the release of PEFT that a config names, as (0, 18); empty where it names none, as before 0.18."""
    return tuple(int(p) for p in re.findall(r"\d+", str(config.get("peft_version", "")))[:2])


def find_unsound(module: str, parts: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> Notice | None:
    """Return an error where a layer's tensors were not saved whole, or are not floating-point.

    Args:
        module: The layer.
        parts: The keys of its parts by name.
        tensors: The headers by key.
    """
    if any(len(tensors[k].shape) < 2 or prod(tensors[k].shape) == 0 for k in parts.values()):
        shapes = " and ".join(f"{part} has shape {list(tensors[k].shape)}" for part, k in parts.items())
        return Notice(
            Level.ERROR,
            "sharded-save",
            module,
            f"{shapes}: flat or empty tensors come from a DeepSpeed ZeRO-3 or FSDP run saved without gathering its "
            "parameters",
            "Gather the parameters (zero_to_fp32, or GatheredParameters around save_pretrained) and save again.",
        )
    bad = next((k for k in parts.values() if tensors[k].dtype not in _FLOATS), None)
    if bad is not None:
        message = f"{bad} is {tensors[bad].dtype}: expected a floating-point dtype"
        return Notice(Level.ERROR, "adapter-dtype", module, message)
    return None


def compare_with_config(
    layers: Sequence[AdapterLayer], config: Mapping[str, Any], settings: Mapping[str, tuple[str, str]], level: Level
) -> list[Notice]:
    """Note where the config says other numbers than the tensors, which are what counts.

    Args:
        layers: The layers.
        config: The config.
        settings: The config's keys, each with the attribute of a layer and what may be behind a difference.
        level: How much a difference matters.
    """
    notices = []
    for key, (attribute, why) in settings.items():
        said = config.get(key)
        others = [layer for layer in layers if said and said != getattr(layer, attribute)]
        if others:
            message = (
                f"the config says {key}={said}, the tensors of {len(others)} of {len(layers)} layers have "
                f"{getattr(others[0], attribute)}, as in {others[0].module}; the tensors count{why}"
            )
            notices.append(Notice(level, "config-disagrees", "adapter", message))
    return notices


def find_lost_biases(
    config: Mapping[str, Any], replacements: Sequence[Replacement], settings: AbstractSet[str]
) -> list[Notice]:
    """Warn where biases were trained but not saved, as releases up to 0.20 did with some ``settings`` of ``bias``."""
    bias = config.get("bias")
    if bias not in settings or any(r.kind is ReplacementKind.BIAS for r in replacements):
        return []
    if release(config) > _LOST_BIAS_UNTIL:
        return []
    return [
        Notice(
            Level.WARNING,
            "lost-bias",
            "adapter",
            f'it was trained with bias="{bias}" but holds no bias: PEFT up to 0.20 did not save them, so the merged '
            "model is not quite what was trained",
            "Save the adapter again with PEFT 0.21 or later, if the training run is still at hand.",
        )
    ]


def _without_adapter(key: str, match: re.Match[str]) -> str:
    """Return a key without the adapter's name that ``match`` found at its end."""
    tail = match.string[match.start("adapter") - 1 :]
    return key.removesuffix(tail) + match.string[match.end("adapter") :]


def _claim(keys: dict[str, str], name: str, key: str, notices: list[Notice]) -> None:
    """Note ``key`` as the one that holds ``name``; there may be only one."""
    if (first := keys.setdefault(name, key)) != key:
        message = f"and {first} are two spellings of one tensor"
        notices.append(Notice(Level.ERROR, "double-key", key, message, "Remove one of them."))


def _narrow(layers: Sequence[AdapterLayer], tensors: Mapping[str, TensorInfo]) -> list[Notice]:
    """Warn of blocks that were saved in half precision: small rotations lose much of themselves in it."""
    narrow = [layer for layer in layers if tensors[layer.blocks].dtype in {"BF16", "F16"}]
    if not narrow:
        return []
    message = (
        f"the rotations of {len(narrow)} of {len(layers)} layers are stored as {tensors[narrow[0].blocks].dtype}: what "
        "that rounding took from them is lost"
    )
    return [Notice(Level.WARNING, "narrow-adapter", "adapter", message, "Save adapters in float32.")]


def _replacements(others: Mapping[str, str], tensors: Mapping[str, TensorInfo], keys: PeftKeys) -> list[Replacement]:
    """Sort the keys that are no part of a rotation: whole modules, biases, base weights, stale and doubled ones."""
    found: list[Replacement] = []
    for saved, key in others.items():
        name = saved
        if ".original_module." in name:
            keys.dropped[key] = "the untrained original of a module that was trained in full"
            continue
        if ".modules_to_save." in name:
            # bias="all" saves a trained module's bias a second time under its inner name.
            adapter = name.partition(".modules_to_save.")[2].partition(".")[0]
            if adapter in keys.leaked:
                keys.dropped[key] = _LEAKED.format(adapter)
                continue
            plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            if plain in others:
                keys.dropped[key] = f"the same as {plain}"
                continue
            # The inner name is only another spelling.
            name = plain
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".base_layer") or owner == "base_layer":
            owner = owner.removesuffix("base_layer").removesuffix(".")
            kind = ReplacementKind.BASE_WEIGHT if leaf == "weight" else ReplacementKind.BIAS
            found.append(Replacement(f"{owner}.{leaf}", key, kind))
        elif _METHODS.search(name):
            message = "belongs to no layer that is rotated: another method's tensor"
            keys.notices.append(Notice(Level.ERROR, "foreign-key", key, message))
        elif 0 in tensors[key].shape:
            keys.notices.append(
                Notice(
                    Level.ERROR,
                    "sharded-save",
                    key,
                    f"has shape {list(tensors[key].shape)}: the save did not gather a sharded parameter",
                    "Gather the parameters (zero_to_fp32, or GatheredParameters around save_pretrained).",
                )
            )
        else:
            kind = ReplacementKind.BIAS if "bias" in leaf else ReplacementKind.MODULE
            if leaf == "weight" and owner in keys.parts:
                kind = ReplacementKind.BASE_WEIGHT
            found.append(Replacement(name, key, kind))
    names: dict[str, str] = {}
    for item in found:
        _claim(names, item.name, item.key, keys.notices)
    return found


def _names_module(name: str, modules: AbstractSet[str]) -> bool:
    """Tell whether one of ``modules`` is, or holds, the tensor.

    PEFT takes every module whose path ends with the text, wherever a part of the path begins: "classifier" takes
    "pre_classifier" too.
    """
    parts = name.split(".")[:-1]
    return any(".".join(parts[:i]).endswith(tuple(modules)) for i in range(1, len(parts) + 1))
