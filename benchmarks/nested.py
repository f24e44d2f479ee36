"""Nested design: a logits processor of the teacher's vLLM engine calls a second vLLM engine for every token.

The method was first published in this form. At each step the processor submits every full prefix (prompt and all tokens so
far) to an inner engine, which returns one token with its 20 highest log-probabilities. The processor mixes those. The prefix
cache of the inner engine avoids recomputation, but each token costs a pass through its front end, scheduler and output
processing. The student is truncated to 20 ids, so the benchmark measures the speed of this design with an inexact q.

Shape suffixes: B sequences, V ids that both models have, K kept log-probabilities.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, process_dict_updates

from benchmarks.systems import Job, sampling_kwargs
from osd.core import MixingConfig
from osd.mixing import mix

TOP = 20  # vLLM's default max_logprobs; the published design used it
# Shares of GPU memory: of 80 GB, 20 hold a 1.5B or 7B student, and 48 hold a teacher of up to 14B.
STUDENT_SHARE, TEACHER_SHARE = 0.25, 0.6


class AskStudent(LogitsProcessor):
    """Logits processor that replaces the teacher's logits by log q* over the student's 20 likeliest ids."""

    inner: ClassVar[LLM]
    mixing: ClassVar[MixingConfig]
    shared_vocab: ClassVar[int]

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, tuple[list[int], list[int]]] = {}  # row -> prompt, output so far (vLLM appends to it)
        self.params = SamplingParams(**sampling_kwargs(1), logprobs=TOP)

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.rows, batch_update, lambda params, prompt, output: (prompt or [], output))

    def apply(self, logits: Tensor) -> Tensor:
        prefixes = [prompt + output for prompt, output in (self.rows[row] for row in range(len(logits)))]
        student_BV = self._student(prefixes, logits)
        mixed = torch.full_like(logits, -torch.inf)
        mixed[:, : self.shared_vocab] = mix(student_BV, logits[:, : self.shared_vocab], self.mixing).logq_BV
        return mixed

    def _student(self, prefixes: list[list[int]], logits: Tensor) -> Tensor:
        """Return the student's highest log-probabilities after these prefixes, -inf elsewhere."""
        requests: list[Any] = [{"prompt_token_ids": prefix} for prefix in prefixes]
        rows, ids, values = [], [], []
        for row, output in enumerate(self.inner.generate(requests, self.params, use_tqdm=False)):
            for token_id, logprob in output.outputs[0].logprobs[0].items():  # type: ignore[index]
                rows.append(row)
                ids.append(token_id)
                values.append(logprob.logprob)
        student = logits.new_full((len(prefixes), self.shared_vocab), -torch.inf)
        index, kept = torch.tensor([rows, ids]), torch.tensor(ids) < self.shared_vocab
        rows_K, ids_K = index[:, kept].to(logits.device)
        student[rows_K, ids_K] = torch.tensor(values)[kept].to(student)
        return student


class Nested:
    """Two engines in one process; each step of the outer one calls the inner one.

    Needs VLLM_ENABLE_V1_MULTIPROCESSING=0. Both engines run without async scheduling: the processor needs the last token
    on the host, and requests of one token have no further step to overlap.
    """

    def __init__(self, job: Job) -> None:
        kwargs = job.llm_kwargs() | {"async_scheduling": False}
        shares: list[dict[str, Any]] = [{}, {}]
        if job.gpu:
            shares = [{"gpu_memory_utilization": share} for share in (STUDENT_SHARE, TEACHER_SHARE)]
        AskStudent.inner = LLM(model=job.student, **kwargs | shares[0])
        AskStudent.mixing = MixingConfig(alpha_method=job.alpha_method)
        AskStudent.shared_vocab = job.shared_vocab()
        self.outer = LLM(model=job.teacher, logits_processors=[AskStudent], **kwargs | shares[1])
        self.settings = {
            "outer": job.finish(self.outer),
            "inner": job.finish(AskStudent.inner),
            "student_logprobs": TOP,
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, *, record: bool = True) -> list[list[int]]:
        requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.outer.generate(requests, SamplingParams(**sampling_kwargs(new_tokens)), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def observed(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        for llm in (self.outer, AskStudent.inner):
            llm.llm_engine.engine_core.shutdown()
