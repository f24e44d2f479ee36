"""Complete model folders with random weights and a tokenizer, for trainers, which load models from a path.

    python -m benchmarks.checkpoints FOLDER --teacher 3B --student 0.5B

Writes FOLDER/teacher and FOLDER/student. Runs as a separate process, so no memory stays allocated on the GPU.
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
    """Return a text that has one token per digit."""
    return "".join(map(str, digits))


def save_tokenizer(path: Path, vocab_size: int) -> None:
    """Save a tokenizer with ``vocab_size`` ids that encodes digits.

    transformers splits text the same way for every Qwen2 tokenizer, and that makes each digit a token. All other ids
    occur only in decoding.
    """
    words = [*SPECIAL, *(f" w{i}" for i in range(len(SPECIAL), vocab_size))]
    Qwen2Tokenizer(vocab={text: i for i, text in enumerate(words)}, merges=[]).save_pretrained(path)


def save_model(name: str, folder: Path, side: str, *, dtype: torch.dtype, logit_std: float, seed: int) -> Path:
    """Save random weights of this shape in FOLDER/SIDE, with logits of about this standard deviation. Returns the path."""
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
