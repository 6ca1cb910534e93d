"""Text encoders: tokens in, embeddings or logits out."""

from __future__ import annotations

from boft_export.onnx.tasks.inputs import text
from boft_export.onnx.tasks.single import fields, single

FEATURE_EXTRACTION = single(
    "feature-extraction", "AutoModel", ("Model",), "input_ids", text, fields("last_hidden_state")
)
FILL_MASK = single("fill-mask", "AutoModelForMaskedLM", ("ForMaskedLM",), "input_ids", text, fields("logits"))
TEXT_CLASSIFICATION = single(
    "text-classification",
    "AutoModelForSequenceClassification",
    ("ForSequenceClassification",),
    "input_ids",
    text,
    fields("logits"),
)
TOKEN_CLASSIFICATION = single(
    "token-classification",
    "AutoModelForTokenClassification",
    ("ForTokenClassification",),
    "input_ids",
    text,
    fields("logits"),
)
QUESTION_ANSWERING = single(
    "question-answering",
    "AutoModelForQuestionAnswering",
    ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
    "input_ids",
    text,
    fields("start_logits", "end_logits"),
)
