"""SideScheduler: vLLM's scheduler for one side of a pair."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic
from typing import Any
from unittest import mock

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.request import Request, RequestStatus


class SideScheduler(AsyncScheduler):
    """vLLM's scheduler for one side of a pair.

    Attributes:
        may_finish: returns whether a request's newest token may be computed in the step being scheduled.
        cornered: requests that were not admitted, because their only token left to compute is the newest one.
        resets: how often the prefix cache was emptied, with no request left that has blocks.
    """

    may_finish: Callable[[str], bool]
    cornered: set[str]
    resets = 0
    drafts = 0  # that a step accepts at most

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with zeroed_blocks():
            super().__init__(*args, **kwargs)
        self.cornered = set()
        self._allocate_quickly()

    def _allocate_quickly(self) -> None:
        """Skip vLLM's block allocation for a token whose block a request already has: half of a step's scheduling time.

        Only for one group of full attention, where vLLM would allocate nothing. A block that becomes full enters the prefix
        cache when its last token is known, in ``update_from_output``, where steps that fill no block are skipped as well. The
        student's last block does not enter it if the request ends with that token.
        """
        groups = self.kv_cache_config.kv_cache_groups
        if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
            return
        # Not self.block_size, which need not be that of the one group.
        manager, block_size = self.kv_cache_manager, groups[0].kv_cache_spec.block_size
        allocate, cache = manager.allocate_slots, manager.cache_blocks

        def allocate_slots(request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
            if num_new_tokens == 1 and request.num_computed_tokens % block_size:
                return manager.empty_kv_cache_blocks
            return allocate(request, num_new_tokens, *args, **kwargs)

        def cache_blocks(request: Request, num_computed_tokens: int) -> None:
            if num_computed_tokens % block_size <= self.drafts:
                cache(request, num_computed_tokens)

        manager.allocate_slots = allocate_slots
        manager.cache_blocks = cache_blocks

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Return how many tokens of a request to schedule.

        vLLM calls it for every request, after all other limits, to leave room for a draft model, which a pair does not have.
        """
        if self.may_finish(request.request_id):
            return num_new_tokens
        known = request.num_tokens + request.num_output_placeholders
        if num_computed_tokens + num_new_tokens < known:
            return num_new_tokens
        if num_computed_tokens >= known - 1 and request.status != RequestStatus.RUNNING:
            self.cornered.add(request.request_id)
        return max(known - 1 - num_computed_tokens, 0)

    @property
    def step_in_flight(self) -> bool:
        """True if a scheduled step has not come back yet."""
        return any(request.num_in_flight_tokens for request in self.requests.values())

    def finishing(self, output: SchedulerOutput) -> set[str]:
        """Return the requests whose newest token a scheduled step computes."""
        requests = self.requests
        return {i for i in output.num_scheduled_tokens if not requests[i].is_prefill_chunk}

    def preempt(self, request: Request) -> None:
        """Free a running request's KV blocks and queue it to be computed anew; a step already scheduled still computes it."""
        self.running.remove(request)
        self._preempt_request(request, monotonic())

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        self.resets += done
        return done

    def evict(self, request_id: str) -> None:
        """Evict a failed request's own KV blocks from the prefix cache, so that no other request reads NaN from them."""
        if request_id in self.requests:
            groups = self.kv_cache_manager.get_blocks(request_id).blocks
            own = {block.block_id for group in groups for block in group if block.ref_cnt == 1 and not block.is_null}
            self.kv_cache_manager.evict_blocks(own)


def zeroed_blocks() -> AbstractContextManager:
    """Make the schedulers and workers that are built meanwhile zero every KV block that a request gets.

    Attention multiplies masked slots by 0, and 0 × NaN is NaN: NaN that one request left in a block would fail its next owner.
    Not every NaN is noticed: nothing is sampled between the chunks of a prompt, and no later token reads what has left a
    sliding window. By itself vLLM zeroes the blocks of some models only.
    """
    return mock.patch.object(KVCacheConfig, "needs_kv_cache_zeroing", True)


def position(request: Request) -> int:
    """Return how many completion tokens a request has computed, including those of the step being scheduled."""
    return request.num_computed_tokens - request.num_prompt_tokens
