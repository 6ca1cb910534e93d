"""PEFT's BOFT adapters, from the first release that had them (0.11) on."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from math import prod
from typing import Any

from boft_export.adapters.adapter import (
    Adapter,
    AdapterLayer,
    ReadOptions,
    Replacement,
    ReplacementKind,
    TensorInfo,
    View,
)
from boft_export.errors import Level, Notice

_PREFIX = "base_model.model."
_PARTS = ("boft_R", "boft_s", "boft_P")
_PART = re.compile(rf"(?:(?P<module>.+)\.)?(?P<part>{'|'.join(_PARTS)})(?:\.(?P<adapter>[^.]+))?$")
_LEAKED = "belongs to another adapter ({}) that leaked into this file"
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Up to this release `bias="boft_only"` saved no bias at all.
_LOST_BIAS_UNTIL = (0, 20)


class PeftBoft:
    """Reader of PEFT's BOFT."""

    name = "PEFT BOFT"

    def recognises(self, config: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Tell by ``peft_type``, or by the keys where the config has none."""
        kind = config.get("peft_type")
        return kind == "BOFT" if kind else any(_PART.match(k) for k in keys)

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], options: ReadOptions) -> Adapter:
        """Sort every key into layers, replacements and what is dropped; collect all problems."""
        parts: dict[str, dict[str, str]] = defaultdict(dict)
        others: dict[str, str] = {}
        dropped: dict[str, str] = {}
        leaked: set[str] = set()
        notices: list[Notice] = []
        for key in tensors:
            # A compiled module's wrapper shows in its parameters' names.
            name = key.removeprefix(_PREFIX).replace("_orig_mod.", "")
            match = _PART.match(name)
            if match is None:
                _claim(others, name.removesuffix(".default"), key, notices)
            elif match["part"] == "boft_P":
                dropped[key] = "a permutation, which follows from the shapes"
            elif match["adapter"] and (match["adapter"] != "default" or key.removesuffix(".default") in tensors):
                leaked.add(match["adapter"])
                dropped[key] = _LEAKED.format(match["adapter"])
            else:
                _claim(parts[match["module"] or ""], match["part"], key, notices)

        has_p = any(k.endswith("boft_P") or ".boft_P." in k for k in tensors)
        views, ambiguous = _views(config, options, has_p=has_p)
        layers = [
            layer
            for module, keys in parts.items()
            if (layer := _layer(module, keys, tensors, views, ambiguous, notices)) is not None
        ]
        notices += _compare_with_config(layers, config)
        notices += _narrow(layers, tensors)
        replacements = _replacements(others, set(parts), leaked, tensors, dropped, notices)
        saved = set(config.get("modules_to_save") or ())
        replacements = [replace(r, may_add=_names_module(r.name, saved)) for r in replacements]
        notices += [
            Notice(Level.INFO, "dropped-key", key, f"left out: {reason}")
            for key, reason in dropped.items()
            if "permutation" not in reason
        ]
        notices += _lost_biases(config, replacements)
        if leaked and not layers:
            message = (
                f"all its rotations belong to other adapters that leaked into this file: {', '.join(sorted(leaked))}"
            )
            notices.append(Notice(Level.ERROR, "empty-adapter", "adapter", message, "Save the adapter again."))
        if not layers and not replacements and not any(n.level is Level.ERROR for n in notices):
            notices.append(
                Notice(Level.ERROR, "empty-adapter", "adapter", "it holds no tensors: expected boft_R and boft_s keys")
            )
        mapping = config.get("auto_mapping")
        return Adapter(
            format=self.name,
            tensors=tensors,
            layers=tuple(layers),
            replacements=tuple(replacements),
            dropped=dropped,
            notices=tuple(notices),
            base_model=config.get("base_model_name_or_path") or None,
            base_revision=config.get("revision") or None,
            model_class=mapping.get("base_model_class") if isinstance(mapping, dict) else None,
            task=config.get("task_type") or None,
        )


def _claim(keys: dict[str, str], name: str, key: str, notices: list[Notice]) -> None:
    """Note ``key`` as the one that holds ``name``; there may be only one."""
    if (first := keys.setdefault(name, key)) != key:
        message = f"and {first} are two spellings of one tensor"
        notices.append(Notice(Level.ERROR, "double-key", key, message, "Remove one of them."))


def _views(config: Mapping[str, Any], options: ReadOptions, *, has_p: bool) -> tuple[dict[int, View], dict[int, str]]:
    """Return the meaning of linear and convolution weights; convolutions changed theirs in PEFT 0.14."""
    views = {2: View.INPUT}
    if options.conv_view is not None:
        return {**views, 4: options.conv_view}, {}
    since_014 = "exclude_modules" in config or "peft_version" in config
    if since_014 and has_p:
        why = "its config is of PEFT 0.14 or later, but it holds boft_P, which only 0.11 and 0.12 saved"
        return views, {4: why}
    if not since_014 and "peft_type" not in config:
        return views, {4: "it has no config that would tell PEFT's version"}
    return {**views, 4: View.INPUT if since_014 else View.RESHAPED}, {}


def _layer(
    module: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
    views: Mapping[int, View],
    ambiguous: Mapping[int, str],
    notices: list[Notice],
) -> AdapterLayer | None:
    """Read one layer from its tensors' shapes."""

    def problem(code: str, message: str, hint: str | None = None) -> None:
        notices.append(Notice(Level.ERROR, code, module, message, hint))

    if set(keys) != {"boft_R", "boft_s"}:
        (present,) = set(keys) & {"boft_R", "boft_s"}
        absent = "boft_s" if present == "boft_R" else "boft_R"
        problem(
            "incomplete-layer",
            f"has {present} but no {absent}",
            "PEFT drops boft_R when it loads several factors without its CUDA extension: save the adapter again "
            "where it was trained."
            if absent == "boft_R"
            else "Save the adapter again.",
        )
        return None
    blocks, scale = tensors[keys["boft_R"]], tensors[keys["boft_s"]]
    if any(len(t.shape) < 2 or prod(t.shape) == 0 for t in (blocks, scale)):
        problem(
            "sharded-save",
            f"boft_R has shape {list(blocks.shape)} and boft_s {list(scale.shape)}: flat or empty tensors come from a "
            "DeepSpeed ZeRO-3 or FSDP run saved without gathering its parameters",
            "Gather the parameters (zero_to_fp32, or GatheredParameters around save_pretrained) and save again.",
        )
        return None
    bad = [k for k in keys.values() if tensors[k].dtype not in _FLOATS]
    if bad:
        problem("adapter-dtype", f"{bad[0]} is {tensors[bad[0]].dtype}: expected a floating-point dtype")
        return None
    if len(blocks.shape) != 4 or blocks.shape[2] != blocks.shape[3]:
        problem("layer-shape", f"boft_R has shape {list(blocks.shape)}: expected (factors, blocks, size, size)")
        return None
    factors, count, size, _ = blocks.shape
    if factors > 1 and (count % 2 ** (factors - 1) or size % 2):
        problem(
            "layer-shape",
            f"boft_R has shape {list(blocks.shape)}: {factors} butterfly factors need blocks of even size, and a "
            f"multiple of {2 ** (factors - 1)} of them",
        )
        return None
    if prod(scale.shape) != max(scale.shape):
        problem("layer-shape", f"boft_s has shape {list(scale.shape)}: expected (out, 1) or (1, out)")
        return None
    return AdapterLayer(
        module=module,
        blocks=keys["boft_R"],
        scale=keys["boft_s"],
        num_factors=factors,
        num_blocks=count,
        block_size=size,
        num_outputs=prod(scale.shape),
        views=views,
        ambiguous_view=ambiguous,
    )


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


def _compare_with_config(layers: Sequence[AdapterLayer], config: Mapping[str, Any]) -> list[Notice]:
    """Warn where the config says other numbers than the tensors, which are what counts."""
    notices = []
    for key, attribute, why in (
        ("boft_n_butterfly_factor", "num_factors", " (PEFT trains one factor where its CUDA extension is missing)"),
        ("boft_block_size", "block_size", ""),
        ("boft_block_num", "num_blocks", ""),
    ):
        said = config.get(key)
        others = [layer for layer in layers if said and said != getattr(layer, attribute)]
        if others:
            message = (
                f"the config says {key}={said}, the tensors of {len(others)} of {len(layers)} layers have "
                f"{getattr(others[0], attribute)}, as in {others[0].module}; the tensors count{why}"
            )
            notices.append(Notice(Level.WARNING, "config-disagrees", "adapter", message))
    return notices


def _replacements(
    others: Mapping[str, str],
    modules: AbstractSet[str],
    leaked: AbstractSet[str],
    tensors: Mapping[str, TensorInfo],
    dropped: dict[str, str],
    notices: list[Notice],
) -> list[Replacement]:
    """Sort the keys that are no part of a rotation: whole modules, biases, base weights, stale and doubled ones."""
    found: list[Replacement] = []
    for name, key in others.items():
        if ".original_module." in name:
            dropped[key] = "the untrained original of a module that was trained in full"
            continue
        if ".modules_to_save." in name:
            # bias="all" saves a trained module's bias a second time under its inner name.
            adapter = name.partition(".modules_to_save.")[2].partition(".")[0]
            if adapter in leaked:
                dropped[key] = _LEAKED.format(adapter)
                continue
            plain = name.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
            if plain in others:
                dropped[key] = f"the same as {plain}"
                continue
            name = plain  # noqa: PLW2901  # the inner name is only another spelling
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".base_layer") or owner == "base_layer":
            owner = owner.removesuffix("base_layer").removesuffix(".")
            kind = ReplacementKind.BASE_WEIGHT if leaf == "weight" else ReplacementKind.BIAS
            found.append(Replacement(f"{owner}.{leaf}", key, kind))
        elif re.search(r"\b(lora|oft|hada|vera|ia3|loha|lokr|hra|road)_", name):
            notices.append(Notice(Level.ERROR, "foreign-key", key, "belongs to no BOFT layer: another method's tensor"))
        elif 0 in tensors[key].shape:
            notices.append(
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
            if leaf == "weight" and owner in modules:
                kind = ReplacementKind.BASE_WEIGHT
            found.append(Replacement(name, key, kind))
    names: dict[str, str] = {}
    for item in found:
        _claim(names, item.name, item.key, notices)
    return found


def _names_module(name: str, modules: AbstractSet[str]) -> bool:
    """Tell whether one of ``modules`` is, or holds, the tensor.

    PEFT takes every module whose path ends with the text, wherever a part of the path begins: "classifier" takes
    "pre_classifier" too.
    """
    parts = name.split(".")[:-1]
    return any(".".join(parts[:i]).endswith(tuple(modules)) for i in range(1, len(parts) + 1))


def _lost_biases(config: Mapping[str, Any], replacements: Sequence[Replacement]) -> list[Notice]:
    if config.get("bias") not in {"boft_only", "all"} or any(r.kind is ReplacementKind.BIAS for r in replacements):
        return []
    version = tuple(int(p) for p in re.findall(r"\d+", str(config.get("peft_version", "")))[:2])
    if config["bias"] == "all" or (version and version > _LOST_BIAS_UNTIL):
        return []
    return [
        Notice(
            Level.WARNING,
            "lost-bias",
            "adapter",
            'it was trained with bias="boft_only" but holds no bias: PEFT up to 0.20 did not save them, so the merged '
            "model is not quite what was trained",
            "Save the adapter again with PEFT 0.21 or later, if the training run is still at hand.",
        )
    ]
