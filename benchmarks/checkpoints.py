"""Whole model folders with random weights and a tokenizer, for what loads models by their path: trainers.

    python -m benchmarks.checkpoints FOLDER --teacher 3B --student 0.5B

Writes FOLDER/teacher and FOLDER/student. A process of its own, so that none of its memory is left on the GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

from benchmarks.logits import spread_logits
from benchmarks.shapes import config, write_model

SPECIAL = ["<|endoftext|>", *"0123456789"]


def text_of(digits: Iterable[int]) -> str:
    """A text of one token per digit."""
    return "".join(map(str, digits))


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """A tokenizer of that many ids that reads digits: transformers gives every Qwen2 its own way to split text, and that
    makes each digit a token. All other ids are words that only decoding knows."""
    words = [*SPECIAL, *(f" w{i}" for i in range(len(SPECIAL), vocab_size))]
    Qwen2Tokenizer(vocab={text: i for i, text in enumerate(words)}, merges=[]).save_pretrained(path)


def save_model(name: str, folder: Path, side: str, *, dtype: torch.dtype, logit_std: float, seed: int) -> Path:
    """Random weights of this shape, with logits of about this standard deviation, in FOLDER/SIDE; returns that."""
    path = write_model(name, folder, as_=side)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    spread_logits(model, logit_std)
    model.save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--logit-std", type=float, default=4.0)
    args = parser.parse_args()
    vocab_size = min(config(name)["vocab_size"] for name in (args.teacher, args.student))
    for seed, side in enumerate(("teacher", "student")):
        name, dtype = getattr(args, side), getattr(torch, args.dtype)
        path = save_model(name, args.folder, side, dtype=dtype, logit_std=args.logit_std, seed=seed)
        save_tokenizer(path, vocab_size)


if __name__ == "__main__":
    main()
