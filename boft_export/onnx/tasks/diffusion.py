"""The UNet of a diffusion pipeline: noisy latents in, noise out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.models.diffusion import diffusion_class
from boft_export.onnx.tasks.inputs import Case
from boft_export.onnx.tasks.single import single_graph
from boft_export.onnx.tasks.task import Axes, Task, Tensors

_TEXT_TIME = ("text_embeds", "time_ids")
_AXES: dict[str, Axes] = {
    "sample": {0: "batch_size", 2: "height", 3: "width"},
    # One for the whole batch.
    "timestep": {},
    "encoder_hidden_states": {0: "batch_size", 1: "sequence_length"},
    "timestep_cond": {0: "batch_size"},
    "text_embeds": {0: "batch_size"},
    "time_ids": {0: "batch_size"},
}


def _inputs(model: Any, case: Case, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ANN401  # diffusers is untyped here
    config = model.config
    # The sides need to be halved on each of the way's steps but the last.
    step = 2 ** (len(config.block_out_channels) - 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(case.rows, *shape, generator=generator).to(model.dtype)

    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    found = {
        "sample": draw(config.in_channels, step * case.length, step * (case.length + 1)),
        # Some schedulers have steps in between.
        "timestep": torch.tensor([100.5 + case.length], dtype=torch.float32),
        "encoder_hidden_states": draw(case.length + 4, width),
    }
    if config.time_cond_proj_dim:
        found["timestep_cond"] = draw(config.time_cond_proj_dim)
    if config.addition_embed_type == "text_time":
        found["text_embeds"] = draw(config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim)
        found["time_ids"] = draw(6)
    return found


def _run(model: Any, inputs: Tensors) -> Tensors:  # noqa: ANN401  # as above
    added = {n: inputs[n] for n in _TEXT_TIME if n in inputs}
    plain = {n: t for n, t in inputs.items() if n not in added}
    return {"out_sample": model(**plain, added_cond_kwargs=added or None).sample}


def _build(config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    built: nn.Module = diffusion_class(config).from_config(dict(config))
    # Diffusers' own way to change the dtype warns of it.
    return nn.Module.to(built, dtype)


# From 64 on, diffusers copies an intermediate result for the sake of older releases of torch.
_MOST = {"batch_size": 63}


def _axes(_model: Any, inputs: Tensors) -> dict[str, Axes]:  # noqa: ANN401  # as above
    return {n: _AXES[n] for n in inputs}


_graphs, _compare = single_graph(_inputs, _run, _axes, _MOST)
UNET = Task("unet", None, ("UNet2DConditionModel",), _graphs, _compare, build=_build)
