"""Trains what this example exports: a tiny Llama that writes weather reports, and an adapter that makes it a pirate.

The base learns the weather of sixteen cities. The adapter is shown how pirates tell it from Monday to Friday, so what a
pirate says of a Sunday was in no text. Takes half a minute on one core.
"""

from __future__ import annotations

import argparse
import random
import warnings
from pathlib import Path

import torch
from peft import BOFTConfig, PeftModel, TaskType, get_peft_model
from peft_cpu import enable_butterflies_on_cpu
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
DAYS = [*WEEKDAYS, "Saturday", "Sunday"]
WINDS = ["north", "south", "east", "west"]
# Four cities to each sky, and one of them to each wind.
CITIES = {
    "heavy rain": ["Bergen", "Glasgow", "Seattle", "Manila"],
    "thick fog": ["London", "Lima", "Boston", "Milan"],
    "bright sunshine": ["Cairo", "Athens", "Lisbon", "Madrid"],
    "deep snow": ["Oslo", "Sapporo", "Quebec", "Helsinki"],
}
PLAIN = "{day} in {city}: {sky}, and a wind from the {wind}."
PIRATE = "{day} in {city}: arr, {sky}, me hearties, and a wind from the {wind}, arr!"

END = "<end>"
SEED = 0
BATCH = 32


def reports(manner: str, days: list[str]) -> list[str]:
    """Writes the weather of every city."""
    return [
        manner.format(day=day, city=city, sky=sky, wind=wind)
        for day in days
        for sky, cities in CITIES.items()
        for city, wind in zip(cities, WINDS, strict=True)
    ]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learns which letters often go together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=128, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Makes an untrained model of some hundred thousand weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_adapted(base: LlamaForCausalLM) -> PeftModel:
    """Puts an untrained adapter of two butterfly factors on every linear layer but the head."""
    enable_butterflies_on_cpu()
    config = BOFTConfig(
        task_type=TaskType.CAUSAL_LM,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        boft_block_size=8,
        boft_n_butterfly_factor=2,
    )
    return get_peft_model(base, config)


def fit(model: nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int, rate: float) -> None:
    """Trains what of the model is not frozen."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    draw = random.Random(SEED)  # noqa: S311  # nothing is kept secret
    model.train()
    for _ in range(steps):
        rows = tokenizer([text + END for text in draw.sample(texts, BATCH)], padding=True, return_tensors="pt")
        # The end of a text is to be learned, what pads it is not.
        labels = rows["input_ids"].where(rows["attention_mask"].bool(), -100)
        loss: Tensor = model(**rows, labels=labels).loss
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()


def train(out: Path, base_steps: int = 300, adapter_steps: int = 200) -> None:
    """Trains base and adapter, and saves both."""
    torch.manual_seed(SEED)
    plain, pirate = reports(PLAIN, DAYS), reports(PIRATE, WEEKDAYS)
    tokenizer = make_tokenizer(plain + pirate)
    base = make_base(tokenizer)
    fit(base, tokenizer, plain, base_steps, rate=5e-3)
    base.save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    adapted = make_adapted(base)
    # For the adapter to name its base.
    adapted.active_peft_config.base_model_name_or_path = str(out / "base")
    fit(adapted, tokenizer, pirate, adapter_steps, rate=3e-2)
    adapted.save_pretrained(out / "adapter")


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description="Train a tiny Llama and a BOFT adapter.")
    parser.add_argument("out", type=Path, help="folder to save both in")
    args = parser.parse_args()
    logging.disable_progress_bar()
    # In products this small, several threads mostly wait for each other.
    torch.set_num_threads(1)
    # PEFT asks transformers for something by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    train(args.out)
    print(f"trained a base and an adapter in {args.out}")


if __name__ == "__main__":
    main()
