"""PEFT's BOFT adapters, from the first release that had them (0.11) on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from boft_export.adapters.adapter import Adapter, AdapterLayer, ReadOptions, TensorInfo, View
from boft_export.adapters.peft_keys import (
    compare_with_config,
    find_lost_biases,
    find_unsound,
    make_adapter,
    part_pattern,
    sort_keys,
)
from boft_export.errors import Level, Notice

_PART = part_pattern("boft_R", "boft_s", "boft_P")
_REDUNDANT = {"boft_P": "a permutation, which follows from the shapes"}
_SETTINGS = {
    "boft_n_butterfly_factor": ("num_factors", " (PEFT trains one factor where its CUDA extension is missing)"),
    "boft_block_size": ("block_size", ""),
    "boft_block_num": ("num_blocks", ""),
}


class PeftBoft:
    """Reader of PEFT's BOFT."""

    name = "PEFT BOFT"

    def recognises(self, config: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Tell by ``peft_type``, or by the keys where the config has none."""
        kind = config.get("peft_type")
        return kind == "BOFT" if kind else any(_PART.match(k) for k in keys)

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], options: ReadOptions) -> Adapter:
        """Sort every key into layers, replacements and what is dropped; collect all problems."""
        keys = sort_keys(config, tensors, [_PART], _REDUNDANT)
        has_p = any(k.endswith("boft_P") or ".boft_P." in k for k in tensors)
        views, ambiguous = _views(config, options, has_p=has_p)
        layers = [
            layer
            for module, parts in keys.parts.items()
            if (layer := _layer(module, parts, tensors, views, ambiguous, keys.notices)) is not None
        ]
        keys.notices += compare_with_config(layers, config, _SETTINGS, Level.WARNING)
        keys.notices += find_lost_biases(config, keys.replacements, {"boft_only"})
        return make_adapter(self.name, config, tensors, keys, layers, "boft_R and boft_s")


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
    unsound = find_unsound(module, {p: keys[p] for p in ("boft_R", "boft_s")}, tensors)
    if unsound is not None:
        notices.append(unsound)
        return None
    blocks, scale = tensors[keys["boft_R"]], tensors[keys["boft_s"]]
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
