"""What is known of how models name, tie and fuse their weights: data, to be added to."""

from __future__ import annotations

# Prefixes that a model has in memory (where adapters are trained) and on disk, where they differ by more than a prefix
# that one of the two lacks. Vision-language models were renamed in transformers 4.52.
PREFIX_RENAMES = (
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.language_model.", "language_model."),
    ("model.language_model.", "model.text_model."),
    ("model.visual.", "visual."),
    ("language_model.model.", "model.language_model."),
    ("language_model.model.", "model."),
)

# Names that old checkpoints have for today's parameters.
LEAF_RENAMES = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))

# Weights that some models keep as one on disk: the fused module and its parts, in the order of their rows.
FUSED_ROWS = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("W_pack", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
)

# An input embedding (a pattern), the output head that may be tied to it, and the classes that have this head even where
# the files leave it to the embedding (a regular expression).
_LANGUAGE_MODEL = r"ForCausalLM|LMHead|ForConditionalGeneration"
TIED_HEADS = (
    ("model.language_model.embed_tokens.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight", _LANGUAGE_MODEL),
    ("model.text_model.embed_tokens.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("model.decoder.embed_tokens.weight", "lm_head.weight", r"^(?!Whisper).*(ForCausalLM|ForConditionalGeneration)"),
    ("model.decoder.embed_tokens.weight", "proj_out.weight", r"^Whisper"),
    ("model.embed_tokens.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("transformer.wte.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("transformer.word_embeddings.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("gpt_neox.embed_in.weight", "embed_out.weight", _LANGUAGE_MODEL),
    ("backbone.embeddings.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("model.shared.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("shared.weight", "lm_head.weight", _LANGUAGE_MODEL),
    ("*.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", r"^\w*Bert(ForMaskedLM|ForPreTraining)"),
    ("*.embeddings.word_embeddings.weight", "lm_head.decoder.weight", r"Roberta\w*(ForMaskedLM|ForCausalLM)"),
    ("*.embeddings.word_embeddings.weight", "vocab_projector.weight", r"^DistilBertForMaskedLM"),
)

# Heads that transformers 5 calls otherwise in memory, by their names on disk.
HEADS_IN_MEMORY = {"embed_out.weight": "lm_head.weight"}

# Models that scale the head's input where the head is tied, so that untying it would change what they compute.
SCALED_TIED_HEADS = {"t5", "mt5", "umt5", "longt5", "switch_transformers", "udop"}

# How a class name ends for what it is used for, by PEFT's task type.
CLASS_SUFFIX_OF_TASK = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
    "CAUSAL_LM": "ForCausalLM",
    "SEQ_2_SEQ_LM": "ForConditionalGeneration",
    "FEATURE_EXTRACTION": "Model",
}

# The last weight of a classification head: its rows are the labels.
LABEL_WEIGHTS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "classifier.1.weight")

# Files that an adapter saved with a larger vocabulary brings along.
TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json",
}  # fmt: skip

# Those of them that hold the vocabulary itself.
VOCABULARY_FILES = {
    "tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
}  # fmt: skip
