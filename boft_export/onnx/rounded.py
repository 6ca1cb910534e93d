"""A model run as in a smaller dtype, in float32: what its results are rounded to, and nothing else, is that dtype's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's is
    """Rounds each operator's result to a dtype, as a context; what that has no number for stays as it is.

    Args:
        dtype: The smaller dtype.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's is
        self._dtype = dtype

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401  # an operator, for which torch has no public type
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401  # whatever it returns
        """Run an operator, and round what it computes."""
        found = func(*args, **(kwargs or {}))
        if func.is_view:
            return found
        in_place = func._schema.is_mutable  # noqa: SLF001  # nothing public tells

        def rounded(values: Tensor) -> Tensor:
            if values.dtype is not torch.float32:
                return values
            near = values.to(self._dtype).float()
            near = torch.where(near.isfinite(), near, values)
            return values.copy_(near) if in_place else near

        return tree_map_only(Tensor, rounded, found)
