"""Effect of the privileged context on the teacher: a sample of the drawn tokens, scored with it and without it.

A student distilled from a teacher that knows the answer can learn to write as if it knew the answer too. The gap measures how
much of the supervision depends on text that the student cannot see. With the context, log π_t(y_n | teacher's prompt, y_<n) is
in the record of every token. Without it, the engine's teacher scores the token again: one request per token, whose prompt is
the student's prompt and y_<n, and whose only allowed token is y_n. Its record has log π_t(y_n | ·) over the whole vocabulary,
under the same weights, numerics and temperature. No second teacher is needed.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from osd.generation import OSDGeneration

if TYPE_CHECKING:
    from osd.engine.engine import PairCompletion


def privilege_gap(
    generation: OSDGeneration, accelerator: Any, plain_prompts: list[list[int]], *, tokens: int, seed: str
) -> dict[str, float]:
    """Return metrics of the last batch, in nats per token over `tokens` of its tokens per process; a collective operation.

    `osd/privilege/gap`      mean of log π_t(y | teacher's prompt) - log π_t(y | plain prompt)
    `osd/privilege/gap_abs`  mean of its absolute value, in which gains and losses do not cancel

    Args:
        plain_prompts: the prompt without privileged context of every completion in the batch, as token ids.
        seed: of the choice of tokens. The global random state does not change, so the measurement does not change the run.
    """
    batch = generation.last_batch
    assert batch is not None, "called after generate()"
    completions = [c if c.record is not None and not c.error else None for c in batch.completions]
    places = [(i, t) for i, c in enumerate(completions) if c is not None for t in range(len(c.token_ids))]
    chosen = random.Random(seed).sample(places, min(tokens, len(places)))
    plain_N = _scored(generation, [(completions[i], plain_prompts[i], t) for i, t in chosen])  # type: ignore[misc]
    with_N = torch.tensor([completions[i].record.logp_teacher[t] for i, t in chosen])  # type: ignore[union-attr]
    gap_N = with_N.double() - plain_N
    sums = torch.tensor([[len(gap_N), gap_N.sum(), gap_N.abs().sum()]], device=accelerator.device)
    count, gap, gap_abs = accelerator.gather(sums).sum(0).tolist()
    return {} if not count else {"osd/privilege/gap": gap / count, "osd/privilege/gap_abs": gap_abs / count}


def _scored(generation: OSDGeneration, places: list[tuple[PairCompletion, list[int], int]]) -> torch.Tensor:
    """Return log π_t(y_t | prompt, y_<t) by the engine's teacher, [N] float64."""
    from osd.engine.engine import PairPrompt

    prompts = [[*prompt, *completion.token_ids[:t]] for completion, prompt, t in places]
    allowed = [[completion.token_ids[t]] for completion, _, t in places]
    device = generation.accelerator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        scored = generation.engine.generate(
            [PairPrompt(teacher_token_ids=ids, student_token_ids=ids) for ids in prompts],
            sampling=[
                {"max_tokens": 1, "temperature": generation.sampling_temperature, "allowed_token_ids": ids} for ids in allowed
            ],
            teacher_only=True,
        )
    failed = [c.error for c in scored if c.error or c.record is None]
    if failed:
        raise RuntimeError(f"the teacher could not score {len(failed)} tokens without its privileged context: {failed[0]}")
    return torch.tensor([c.record.logp_teacher[0] for c in scored], dtype=torch.float64)  # type: ignore[union-attr]
