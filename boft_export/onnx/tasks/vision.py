"""Image encoders: pixels in, features or classes out."""

from __future__ import annotations

from typing import Any

from boft_export.onnx.tasks.inputs import images
from boft_export.onnx.tasks.single import fields, single
from boft_export.onnx.tasks.task import Tensors

_features = fields("last_hidden_state", "pooler_output")


def _trained_features(model: Any, inputs: Tensors) -> Tensors:  # noqa: ANN401  # transformers is untyped here
    """Run a model; without what its pooler says where that was not trained along with it."""
    found = dict(_features(model, inputs))
    pooler = getattr(model, "pooler", None)
    own = type(model).__name__ in (model.config.architectures or ())
    if pooler is not None and not own and next(pooler.parameters(), None) is not None:
        found.pop("pooler_output", None)
    return found


IMAGE_FEATURES = single("image-feature-extraction", "AutoModel", ("Model",), "pixel_values", images, _trained_features)
IMAGE_CLASSIFICATION = single(
    "image-classification",
    "AutoModelForImageClassification",
    ("ForImageClassification",),
    "pixel_values",
    images,
    fields("logits"),
)
