"""Python that runs an exported folder, for its model card: complete, and in terms of ONNX Runtime alone."""

from __future__ import annotations

from collections.abc import Collection

_TEXT = """\
import onnxruntime
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
tokens = tokenizer(["A first text.", "Another, longer one."], padding=True, return_tensors="np")
outputs = session.run(None, {i.name: tokens[i.name] for i in session.get_inputs()})
for output, value in zip(session.get_outputs(), outputs):
    print(output.name, value.shape)
"""

_IMAGE = """\
import onnxruntime
from PIL import Image
from transformers import AutoImageProcessor

folder = "."
processor = AutoImageProcessor.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
image = Image.new("RGB", (640, 480))  # or Image.open(...)
pixels = processor(images=image, return_tensors="np")["pixel_values"]
for output, value in zip(session.get_outputs(), session.run(None, {"pixel_values": pixels})):
    print(output.name, value.shape)
"""

_CAUSAL = """\
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
ids = tokenizer(["Once upon a time"], return_tensors="np")["input_ids"]
types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
past = {
    i.name: np.zeros((len(ids), *[n if isinstance(n, int) else 0 for n in i.shape[1:]]), types[i.type])
    for i in session.get_inputs()
    if i.name.startswith("past_key_values")
}
text, step = ids, ids
for _ in range(20):
    positions = np.arange(text.shape[1] - step.shape[1], text.shape[1])[None]
    feeds = {"input_ids": step, "attention_mask": np.ones_like(text), "position_ids": positions}
    names = {i.name for i in session.get_inputs()}
    logits, *present = session.run(None, {n: v for n, v in feeds.items() if n in names} | past)
    past = dict(zip(past, present))
    step = logits[:, -1:].argmax(-1)
    text = np.concatenate([text, step], axis=1)
print(tokenizer.decode(text[0]))
"""

_SEQ2SEQ = """\
import json

import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder)
encoder = onnxruntime.InferenceSession(f"{folder}/encoder_model.onnx")
decoder = onnxruntime.InferenceSession(f"{folder}/decoder_model.onnx")
config = json.load(open(f"{folder}/config.json"))
tokens = tokenizer(["translate English to German: A text."], return_tensors="np")
asked = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
(states,) = encoder.run(None, asked)
# decoder_with_past_model.onnx takes the keys and values that come out, and the last token alone.
text = np.full((1, 1), config["decoder_start_token_id"])
for _ in range(20):
    fed = {"input_ids": text, "encoder_hidden_states": states, "encoder_attention_mask": asked["attention_mask"]}
    logits = decoder.run(["logits"], {i.name: fed[i.name] for i in decoder.get_inputs()})[0]
    text = np.concatenate([text, logits[:, -1:].argmax(-1)], axis=1)
print(tokenizer.decode(text[0]))
"""

# Where there is no tokenizer or processor, or it is not known what the inputs mean.
_ANY = """\
import numpy as np
import onnxruntime

folder = "."
session = onnxruntime.InferenceSession(f"{folder}/%s")
types = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}
shapes = {i.name: [n if isinstance(n, int) else 2 for n in i.shape] for i in session.get_inputs()}
feeds = {i.name: np.ones(shapes[i.name], types[i.type]) for i in session.get_inputs()}
for output, value in zip(session.get_outputs(), session.run(None, feeds)):
    print(output.name, value.shape)
"""

_TOKENIZER, _PROCESSOR = "tokenizer_config.json", "preprocessor_config.json"
_SNIPPETS = {
    **dict.fromkeys(
        (
            "feature-extraction", "fill-mask", "question-answering", "sentence-similarity", "text-classification",
            "token-classification",
        ),
        (_TOKENIZER, _TEXT),
    ),
    "image-classification": (_PROCESSOR, _IMAGE),
    "image-feature-extraction": (_PROCESSOR, _IMAGE),
    "text-generation": (_TOKENIZER, _CAUSAL),
    "text2text-generation": (_TOKENIZER, _SEQ2SEQ),
}  # fmt: skip


def snippet(task: str, files: Collection[str], graph: str) -> str:
    """Return Python that runs a folder's graph as it is.

    Args:
        task: What it was exported for.
        files: The names of what lies beside it.
        graph: The first graph's file.
    """
    needed, text = _SNIPPETS.get(task, ("", ""))
    return text if needed in files else _ANY % graph
