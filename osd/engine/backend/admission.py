"""Admission of requests to a pair: their checks, the student's half of each, and the ids that end it."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from osd.engine.backend.configuration import eos_ids, side_limits
from osd.engine.request import PairOptions, PairPrompt, check_request


class Admission:
    """Checks requests, and makes the student's half of each.

    Args:
        teacher, student: vLLM's configuration of each side.
        kv_cache_config: the student's KV cache.
    """

    def __init__(self, teacher: VllmConfig, student: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
        self._limits = side_limits(teacher, student)
        self._student_eos_ids = eos_ids(student)
        self._student_hasher = _block_hasher(student, kv_cache_config)

    def check(self, request: Request, options: PairOptions) -> None:
        """Raise a ValueError if a pair cannot serve a request."""
        if request.sampling_params is None or request.mm_features or request.prompt_embeds is not None or request.resumable:
            raise ValueError("the paired engine serves text completion only (no pooling, images, embeddings, streaming input)")
        teacher, student = request.prompt_token_ids, options.student_prompt_token_ids
        prompt = PairPrompt(teacher_token_ids=teacher, student_token_ids=teacher if student is None else student)
        check_request(prompt, request.sampling_params, self._limits, options=options)

    def student_request(self, request: Request, options: PairOptions) -> Request:
        """Return the student's half of a request: its own prompt, and nothing that could make it stop or draw by itself."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args=PairOptions(record=options.record).to_extra_args(),
        )
        return Request(
            request_id=request.request_id,
            prompt_token_ids=list(options.student_prompt_token_ids or request.prompt_token_ids),
            sampling_params=params,
            pooling_params=None,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            priority=request.priority,
            block_hasher=self._student_hasher,
        )

    def add_student_eos(self, params: SamplingParams) -> None:
        """Make a completion end at either model's end-of-sequence id."""
        extra = self._student_eos_ids - {params.eos_token_id, *(params.stop_token_ids or ())}
        if params.ignore_eos or not extra:
            return
        params.stop_token_ids = [*(params.stop_token_ids or ()), *sorted(extra)]
        params.all_stop_token_ids.update(extra)


def _block_hasher(config: VllmConfig, kv_cache_config: KVCacheConfig) -> Any:
    """Return the function that names a request's blocks in the student's prefix cache; None if it has no such cache."""
    if not config.cache_config.enable_prefix_caching:
        return None
    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    return get_request_block_hasher(kv_cache_config.hash_block_size, function)
