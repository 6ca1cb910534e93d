"""Merge an adapter as PEFT's documentation says: ``merge_and_unload`` and ``save_pretrained``; a program to measure.

For more than one butterfly factor PEFT needs its CUDA extension, which examples/minilm/peft_cpu.py stands in for.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from peft import PeftModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "minilm"))
from peft_cpu import enable_butterflies_on_cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    """Load, merge and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=[*DTYPES, "auto"], default="auto", help="to load the base in")
    parser.add_argument("--adapter-dtype", choices=DTYPES, help="to hold the adapter in; PEFT's default is float32")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    config = json.loads((args.adapter / "adapter_config.json").read_text())
    if config["boft_n_butterfly_factor"] > 1:
        enable_butterflies_on_cpu()
    architecture = json.loads((args.base / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, architecture).from_pretrained(args.base, dtype=DTYPES.get(args.dtype, "auto"))
    adapted = PeftModel.from_pretrained(model, args.adapter)
    if args.adapter_dtype:
        for name, parameter in adapted.named_parameters():
            if "boft_" in name:
                parameter.data = parameter.data.to(DTYPES[args.adapter_dtype])
    adapted.merge_and_unload().save_pretrained(args.output)


if __name__ == "__main__":
    main()
