"""Comparison of the engine's student with the live one: log π_θ of a few tokens, computed by both.

A sync copies tensors by name. It cannot see a live model that computes something else with the same tensors: untied embeddings,
a changed configuration, an adapter that PEFT does not merge. The two models' probabilities can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl.models import unwrap_model_for_generation

from osd.validate_models import shared_vocabulary

if TYPE_CHECKING:
    from osd.engine.engine import PairEngine
    from osd.engine.remote import RemoteEngine

_SEQUENCES, _PROMPT, _TOKENS = 8, 8, 4
# Mean |difference| of log π_θ in nats. Measured: 1e-6 in float32; in 16 bits 0.06 (SmolLM2) and 0.004 to 0.04 (tiny models).
_LIMIT_32_BIT, _LIMIT_16_BIT = 0.03, 0.3


def check_same_student(engine: PairEngine | RemoteEngine, model: Any, accelerator: Any) -> None:
    """Raise if the engine's student is not the live one; a collective operation, in which every process raises or none.

    The engine's student continues short prompts by itself, and the live student scores the tokens. Some milliseconds.

    Raises:
        RuntimeError: the mean difference of log π_θ is beyond what the dtypes of the two explain.
    """
    device = getattr(model, "device", accelerator.device)
    prompts = _prompts(engine)
    sampled = _continued(engine, prompts, accelerator.device)
    with _whole(model, accelerator):
        gap, worst = _gap(model, prompts, sampled, shared_vocabulary(engine.config), device)
    gathered = accelerator.gather(torch.tensor([[gap, worst]], device=accelerator.device)).max(0).values
    gap, worst = gathered.tolist()
    limit = _LIMIT_32_BIT if _is_32_bit(engine, model, accelerator) else _LIMIT_16_BIT
    if gap > limit:
        raise RuntimeError(
            "the engine's student is not the student in training: after a weight sync their log-probabilities of the same "
            f"tokens differ by {gap:.3g} nats on average and {worst:.3g} at most, where rounding explains {limit}. Nothing is "
            "sampled. Possible causes: a model changed in memory (save it and start from the saved one), an adapter whose "
            "effect is not in the merged weights, an attention implementation that leaves out a part of the model. If the "
            "difference is wanted, set check_sync=False on OSDGeneration"
        )


def _prompts(engine: PairEngine | RemoteEngine) -> list[list[int]]:
    size = shared_vocabulary(engine.config)
    if engine.tokenizer is not None:
        size = min(size, len(engine.tokenizer))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (_SEQUENCES, _PROMPT), generator=generator).tolist()


def _continued(engine: PairEngine | RemoteEngine, prompts: list[list[int]], device: torch.device) -> list[Any]:
    from osd.engine.engine import PairPrompt

    sampling = {"max_tokens": _TOKENS, "temperature": 1.0, "ignore_eos": True, "detokenize": False}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # a run is the same with and without a check
        return engine.generate(
            [PairPrompt(teacher_token_ids=ids, student_token_ids=ids) for ids in prompts],
            sampling=[{**sampling, "seed": seed} for seed in range(len(prompts))],
            alpha=0.0,
        )


def _gap(
    model: Any, prompts: list[list[int]], sampled: list[Any], vocabulary: int, device: torch.device
) -> tuple[float, float]:
    """Mean and maximum of |log π_θ (engine) - log π_θ (live)| over the tokens, in nats; 0 if every completion failed."""
    # One shape for every process, since a sharded forward pass is collective. S sequences, T completion tokens.
    completions = [(c.token_ids + [0] * _TOKENS)[:_TOKENS] for c in sampled]
    ids = torch.tensor([p + c for p, c in zip(prompts, completions, strict=True)], device=device)
    logp_STV = _live_logits(model, ids)[:, _PROMPT - 1 : -1, :vocabulary].float().log_softmax(-1)
    live_ST = logp_STV.gather(-1, ids[:, _PROMPT:, None])[..., 0].cpu()
    good = [c.record is not None and not c.error for c in sampled]
    pairs = [(live_ST[i, : len(c.token_ids)], c.record.logp_theta) for i, c in enumerate(sampled) if good[i]]
    gaps = [(live_T - engine_T.to(live_T)).abs() for live_T, engine_T in pairs]
    gap_N = torch.cat(gaps) if gaps else torch.empty(0)
    gap_N = gap_N.nan_to_num(nan=float("inf"))
    return (gap_N.mean().item(), gap_N.max().item()) if len(gap_N) else (0.0, 0.0)


@torch.no_grad()
def _live_logits(model: Any, ids: Tensor) -> Tensor:
    with _evaluating(model), torch.compiler.set_stance("force_eager"):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _whole(model: Any, accelerator: Any) -> AbstractContextManager[Any]:
    """Return a context in which a model that ZeRO-3 shards is whole and without DeepSpeed's hooks.

    With the hooks, a forward pass outside of training leaves parameters in shards in the next backward pass.
    """
    deepspeed = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return nullcontext() if deepspeed is None else unwrap_model_for_generation(deepspeed.engine, accelerator)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, and every module back to its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _is_32_bit(engine: PairEngine | RemoteEngine, model: Any, accelerator: Any) -> bool:
    kwargs = {**engine.config.engine_kwargs, **engine.config.student_kwargs}
    wide = kwargs.get("dtype") in ("float32", "float", torch.float32)
    return wide and accelerator.mixed_precision == "no" and next(model.parameters()).dtype == torch.float32
