"""Parts of diffusion pipelines in memory, through diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.errors import InputError, UsageError


def diffusion_class(config: Mapping[str, Any]) -> Any:  # noqa: ANN401  # diffusers is untyped here
    """Return the class that a config of diffusers names.

    Raises:
        UsageError: If diffusers is not installed.
        InputError: If it has no such class.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(
            f"parts of diffusion pipelines can't be run without diffusers: {error}.", hint="pip install diffusers"
        ) from error
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise InputError(f"diffusers {diffusers.__version__} has no class {name}.")
    return kind


def load_diffusion(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[nn.Module, frozenset[str]]:
    """Build a model and give it tensors; return it and the names of the parameters that there were none for."""
    with torch.random.fork_rng(devices=[]):
        # What the files lack is drawn at random, and must be the same each time.
        torch.manual_seed(0)
        model: nn.Module = diffusion_class(config).from_config(dict(config))
    found = model.load_state_dict(dict(state), strict=False, assign=True)
    return model, frozenset(found.missing_keys)
