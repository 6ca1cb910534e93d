"""A model under an adapter, by hooks that rotate activations: a path of its own, apart from the fold.

W' x = diag(s) W (R^T x): a linear layer's input is rotated block by block on its way in, its output scaled on its way
out, and its weight is left alone. A convolution's kernel reads each activation at several places, so there the
kernel is rotated instead, by the formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from boft_export.adapters import AdapterLayer, Pairing, Parametrization, View
from boft_export.adapters.adapter import Storage
from boft_export.linalg.batched_lu import inverse
from boft_export.models.loading import CannotTellError
from boft_export.pipeline.torch_io import read_tensor
from boft_export.planning import SourcedAdapter


@dataclass(frozen=True)
class PlainLayer:
    """One adapter layer as the formula has it.

    Attributes:
        blocks: The orthogonal blocks Q, shape (m, D, b, b), float64.
        scale: s, shape (out,), float64; ones where there is none.
        view: How the weight is seen.
    """

    blocks: Tensor
    scale: Tensor
    view: View


def read_plain_layer(source: SourcedAdapter, layer: AdapterLayer, view: View, outputs: int) -> PlainLayer:
    """Read a layer's blocks and form Q = (I - S)(I + S)^-1 with S = (A - A^T) / 2.

    Raises:
        CannotTellError: If the layer's blocks mean something else.
    """
    plain = layer.storage is Storage.MATRIX and layer.max_norm is None and not layer.shared and not layer.transposed
    if not plain or layer.parametrization is not Parametrization.CAYLEY or layer.pairing is not Pairing.BUTTERFLY:
        raise CannotTellError(f"{layer.module}: {layer.parametrization} blocks are not known to the hooks.")
    trained = read_tensor(source.refs[layer.blocks])
    skew = (trained - trained.mT) / 2
    eye = torch.eye(layer.block_size, dtype=torch.float64)
    blocks = (eye - skew) @ inverse(eye + skew)
    scale = torch.ones(outputs, dtype=torch.float64)
    if layer.scale is not None:
        scale = read_tensor(source.refs[layer.scale]).reshape(-1)
    return PlainLayer(blocks, scale, view)


def times_rotation(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x R for rows x of shape (..., n), which is R^T x for columns; R = M_{m-1} ... M_0."""
    for level in reversed(range(len(blocks))):
        x = _times_factor(x, blocks[level], level)
    return x


def times_transpose(x: Tensor, blocks: Tensor) -> Tensor:
    """Return x R^T for rows x of shape (..., n)."""
    for level in range(len(blocks)):
        x = _times_factor(x, blocks[level].mT, level)
    return x


def _times_factor(x: Tensor, blocks: Tensor, level: int) -> Tensor:
    """Return x M for one factor M with diagonal ``blocks`` (D, b, b), whose block mixes two half-blocks 2^level apart.

    Seen as (groups, 2, 2^level, b / 2), the halves of a block differ in the second index.
    """
    count, size, _ = blocks.shape
    shape, stride = x.shape, 1 << level
    if level:
        x = x.reshape(*shape[:-1], count // stride, 2, stride, size // 2).transpose(-3, -2)
    x = torch.einsum("...db,dbc->...dc", x.reshape(*shape[:-1], count, size), blocks)
    if level:
        x = x.reshape(*shape[:-1], count // stride, stride, 2, size // 2).transpose(-3, -2)
    return x.reshape(shape)


def rotate_kernel(weight: Tensor, layers: Sequence[PlainLayer]) -> Tensor:
    """Return a convolution's weight under layers in order, by the formula, float64."""
    rotated = weight.double()
    for layer in layers:
        blocks, scale = layer.blocks.to(weight.device), layer.scale.to(weight.device)
        if layer.view is View.INPUT:
            rotated = times_transpose(rotated.reshape(len(scale), -1), blocks) * scale[:, None]
        else:
            rotated = times_transpose(rotated.reshape(-1, len(scale)).T, blocks).T * scale
    return rotated.reshape(weight.shape)


@dataclass(frozen=True)
class ActivationHooks:
    """The hooks of a linear layer.

    Attributes:
        module: The layer.
        blocks: Each adapter's blocks, in the order in which the adapters apply, in the activations' dtype.
        scale: All scales together.
    """

    module: nn.Linear
    blocks: list[Tensor]
    scale: Tensor

    @classmethod
    def install(cls, module: nn.Linear, layers: Sequence[PlainLayer]) -> None:
        """Hook a layer; W (R_2 R_1)^T x = W R_1^T (R_2^T x), so the last adapter's rotation comes first."""
        scale = torch.stack([layer.scale for layer in layers]).prod(0)
        hooks = cls(module, [layer.blocks.to(module.weight) for layer in layers], scale.to(module.weight))
        module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        module.register_forward_hook(hooks.after)

    def before(self, _module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401  # what torch expects of a hook
        """Rotate what goes in."""
        x = args[0] if args else kwargs["input"]
        for blocks in reversed(self.blocks):
            x = times_rotation(x, blocks)
        return (x,), {}

    def after(self, _module: nn.Module, _args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """Scale what comes out, but for the bias: s (y - b) + b."""
        scaled, bias = y * self.scale, self.module.bias
        return scaled if bias is None else scaled + bias * (1 - self.scale)
