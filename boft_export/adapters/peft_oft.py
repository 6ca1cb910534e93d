"""PEFT's OFT adapters, from release 0.14 on: block-diagonal rotations of a layer's inputs.

========== ============================== ==================================================== ==================
PEFT       keys                           blocks                                               weight
========== ============================== ==================================================== ==================
0.7-0.13   ``oft_r`` (r, c, c)            (I - S)(I + S)^-1, S = (A - A^T) / 2                 Q^T W: refused
0.14-0.15  ``oft_r`` (r, b, b), ``oft_s`` the same                                             diag(s) W R^T
0.16-0.17  ``oft_R.weight``               (I - S)(I + S)^-1, S from its upper triangle; or     W R^T; Embedding
           (r, b (b - 1) / 2)             I + 2 S + ... + 2 S^(t-1), about the inverse of that (from 0.19) W R
from 0.18  the same                       the same, but S^(t-1) with coefficient 1 where t > 3 the same
                                          and t = 3 the same as t = 4
========== ============================== ==================================================== ==================

Source: ``peft/tuners/oft/layer.py`` of these releases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boft_export.adapters.adapter import (
    Adapter,
    AdapterLayer,
    Parametrization,
    ReadOptions,
    Storage,
    TensorInfo,
    View,
)
from boft_export.adapters.peft_keys import (
    compare_with_config,
    find_lost_biases,
    find_unsound,
    make_adapter,
    part_pattern,
    release,
    sort_keys,
)
from boft_export.errors import Level, Notice

_PATTERNS = (part_pattern("oft_R", "oft_embedding_R", suffix=".weight"), part_pattern("oft_r", "oft_s"))
_ADJUSTED = " (PEFT takes the nearest number that divides a layer's inputs)"
_SETTINGS = {"oft_block_size": ("block_size", _ADJUSTED), "r": ("num_blocks", _ADJUSTED)}
_FOLDED = (
    "PEFT trains an OFT convolution by unfolding its input, rotating the patches and folding them back, which adds up "
    "where they overlap; no weight of the convolution does the same"
)
_SAVE_AGAIN = "Save the adapter again."
# The parts of a layer that is stored as triangles.
_TRIANGLES = ({"oft_R"}, {"oft_embedding_R"})


@dataclass(frozen=True)
class _Form:
    """What an adapter's config says of its blocks.

    Attributes:
        shared: Whether a layer's blocks are one.
        eps: COFT's bound, before it is divided among the blocks; None without a bound.
        series: The coefficients of the Neumann series; empty for exact Cayley transforms.
    """

    shared: bool
    eps: float | None
    series: tuple[float, ...]


class PeftOft:
    """Reader of PEFT's OFT."""

    name = "PEFT OFT"

    def recognises(self, config: Mapping[str, Any], keys: Sequence[str]) -> bool:
        """Tell by ``peft_type``, or by the keys where the config has none."""
        kind = config.get("peft_type")
        return kind == "OFT" if kind else any(p.match(k) for k in keys for p in _PATTERNS)

    def read(self, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], options: ReadOptions) -> Adapter:  # noqa: ARG002  # every reader's are the same; OFT leaves nothing to the user
        """Sort every key into layers, replacements and what is dropped; collect all problems."""
        keys = sort_keys(config, tensors, _PATTERNS)
        form = _form(config, {part for parts in keys.parts.values() for part in parts})
        layers: list[AdapterLayer] = []
        name = self.name
        if isinstance(form, Notice):
            keys.notices.append(form)
        else:
            found = [_layer(module, parts, tensors, form) for module, parts in keys.parts.items()]
            layers += [x for x in found if isinstance(x, AdapterLayer)]
            keys.notices += [x for x in found if isinstance(x, Notice)]
            if form.series:
                name += f", Neumann series {' '.join(f'{c:g}' for c in form.series)}"
                message = "its blocks are cut-off Neumann series, only nearly orthogonal; they are merged as trained"
                keys.notices.append(Notice(Level.INFO, "neumann-series", "adapter", message))
        apart = [x for x in layers if not x.shared]
        keys.notices += compare_with_config(apart, config, _SETTINGS, Level.INFO)
        keys.notices += find_lost_biases(config, keys.replacements, {"oft_only", "all"})
        return make_adapter(name, config, tensors, keys, layers, "oft_R.weight")


def _form(config: Mapping[str, Any], parts: set[str]) -> _Form | Notice:
    """Return what the config says of the blocks; an error where it doesn't tell."""

    def problem(code: str, message: str, hint: str) -> Notice:
        return Notice(Level.ERROR, code, "adapter", message, hint)

    if not config.get("peft_type"):
        return problem(
            "no-config",
            "it has no config, which says how PEFT's OFT makes rotations of its tensors",
            "Put its adapter_config.json beside it.",
        )
    if "oft_r" in parts and "oft_s" not in parts and "oft_block_size" not in config:
        return problem(
            "output-side",
            "it is of PEFT 0.7 to 0.13, where OFT rotated a layer's outputs; only rotations of inputs can be merged",
            "Merge it with the PEFT release that trained it (merge_and_unload), or train it again.",
        )
    eps = None
    if config.get("coft"):
        eps = config.get("eps", 6e-5)
        if not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            return problem("config-value", f"eps in its config is {eps!r}: expected a number of 0 or more", _SAVE_AGAIN)
    series = _series(config) if parts & {"oft_R", "oft_embedding_R"} else ()
    if isinstance(series, str):
        return problem(
            "ambiguous-version",
            series,
            'Add to its adapter_config.json what trained it: "peft_version", as in "0.17.0" or "0.18.0", and '
            '"use_cayley_neumann".',
        )
    return _Form(bool(config.get("block_share")), eps, series)


def _series(config: Mapping[str, Any]) -> tuple[float, ...] | str:
    """Return the coefficients of the series from S^0 on, none for exact transforms; or why they can't be told."""
    version = release(config)
    if not version and (config.get("peft_version") or "use_cayley_neumann" not in config):
        return "its config names neither PEFT's release nor use_cayley_neumann, so what its blocks mean can't be told"
    if not config.get("use_cayley_neumann", True):
        return ()
    terms = config.get("num_cayley_neumann_terms", 5)
    if not isinstance(terms, int):
        return f"num_cayley_neumann_terms in its config is {terms!r}: expected a whole number"
    # What differs between releases begins with the third term.
    if terms <= 2:
        return (1.0, 2.0)[: max(terms, 1)]
    # The release has been in the config since 0.18, where the series changed; between the two were others.
    if (0, 0) < version < (0, 18) and "dev" in str(config["peft_version"]):
        return (
            f"it is of PEFT {config['peft_version']}, between 0.17 and 0.18, which end their Neumann series otherwise"
        )
    if version < (0, 18):
        return 1.0, *[2.0] * (terms - 1)
    return 1.0, *[2.0] * (max(terms, 4) - 2), 1.0


def _layer(
    module: str, parts: Mapping[str, str], tensors: Mapping[str, TensorInfo], form: _Form
) -> AdapterLayer | Notice:
    """Read one layer from its tensors' shapes; an error says why there is none."""
    if parts.keys() not in (*_TRIANGLES, {"oft_r", "oft_s"}):
        message = f"has {' and '.join(parts)}: expected oft_R.weight, or oft_r and oft_s"
        return Notice(Level.ERROR, "incomplete-layer", module, message, _SAVE_AGAIN)
    if parts.keys() not in _TRIANGLES:
        return find_unsound(module, parts, tensors) or _of_matrices(module, parts, tensors, form)
    # Blocks of size 1, which PEFT takes where no other size divides a layer's inputs, have nothing to store.
    (shape,) = (tensors[key].shape for key in parts.values())
    is_trivial = len(shape) == 2 and shape[0] > 0 and shape[1] == 0
    unsound = None if is_trivial else find_unsound(module, parts, tensors)
    return unsound or _of_triangles(module, parts, shape, form)


def _of_triangles(module: str, parts: Mapping[str, str], shape: tuple[int, ...], form: _Form) -> AdapterLayer | Notice:
    """Read a layer of PEFT 0.16 or later."""
    ((part, key),) = parts.items()
    size = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    if len(shape) != 2 or size * (size - 1) // 2 != shape[1]:
        message = f"{part} has shape {list(shape)}: expected (blocks, size (size - 1) / 2)"
        return Notice(Level.ERROR, "layer-shape", module, message)
    is_embedding = part == "oft_embedding_R"
    return AdapterLayer(
        module=module,
        blocks=key,
        scale=None,
        num_factors=1,
        num_blocks=shape[0],
        block_size=size,
        num_outputs=None,
        parametrization=Parametrization.NEUMANN if form.series else Parametrization.CAYLEY,
        storage=Storage.TRIANGLE,
        series=form.series,
        max_norm=None if form.eps is None else form.eps / math.sqrt(shape[0]),
        transposed=is_embedding,
        shared=form.shared and shape[0] == 1,
        views={2: View.INPUT} if is_embedding else {2: View.INPUT, 4: View.INPUT},
        pointwise=_FOLDED,
    )


def _of_matrices(
    module: str, parts: Mapping[str, str], tensors: Mapping[str, TensorInfo], form: _Form
) -> AdapterLayer | Notice:
    """Read a layer of PEFT 0.14 or 0.15."""
    shape, scale = tensors[parts["oft_r"]].shape, tensors[parts["oft_s"]].shape
    outputs = math.prod(scale)
    if len(shape) != 3 or shape[1] != shape[2] or outputs != max(scale):
        message = f"oft_r has shape {list(shape)} and oft_s {list(scale)}: expected (blocks, size, size) and (out, 1)"
        return Notice(Level.ERROR, "layer-shape", module, message)
    shared = form.shared and shape[0] == 1
    if shared and form.eps is not None:
        message = "it was trained with coft and block_share, whose bound in PEFT 0.14 and 0.15 no tensor tells"
        return Notice(Level.ERROR, "shared-bound", module, message, "Merge it with PEFT 0.15.")
    return AdapterLayer(
        module=module,
        blocks=parts["oft_r"],
        scale=parts["oft_s"],
        num_factors=1,
        num_blocks=shape[0],
        block_size=shape[1],
        num_outputs=outputs,
        max_norm=None if form.eps is None else form.eps * math.ceil(outputs / shape[0]) ** 2 / math.sqrt(shape[0]),
        shared=shared,
        views={2: View.INPUT, 4: View.INPUT},
    )
