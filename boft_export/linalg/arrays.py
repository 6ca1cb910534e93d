"""What numpy and torch share, so that the same few lines of mathematics take the arrays of either."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

# A numpy array or a torch tensor: neither has the type of the other, and the protocol that both follow has none yet.
Array: TypeAlias = Any


def namespace(x: Array) -> Any:  # noqa: ANN401  # a module
    """Return numpy for its arrays and torch for its tensors: the functions of one name that are used do the same.

    torch takes ``axis`` and ``keepdims`` for ``dim`` and ``keepdim``, and numpy 2 takes ``device``. Importing torch
    takes a second, so that nobody does who has no tensor.
    """
    return np if isinstance(x, np.ndarray | np.generic) else sys.modules["torch"]
