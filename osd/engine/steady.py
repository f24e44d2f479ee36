"""Steady decoding in the scheduler: what need not be planned again while a batch only grows by a token per row and step.

Most steps of a run are the step before, one token on: the same requests in the same rows, one new position each. vLLM
plans every step from scratch, on the host, in milliseconds that the GPU spends waiting. Here such a step is derived from
the last one, and every other step left to vLLM's own code, to which this must be equivalent. :mod:`osd.engine.forward` does the
same for the forward pass.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request, RequestStatus


class SteadyScheduler(AsyncScheduler):
    """vLLM's async scheduler; ``derived`` says whether the last step was derived from the one before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = self.kv_cache_config.kv_cache_groups
        plain_cache = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        self._can_derive = plain_cache and not (self.connector or self.ec_connector)
        self._last: SchedulerOutput | None = None
        self.derived = False

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = self._derive() if self._last is not None else None
        self.derived = output is not None
        if output is None:
            output = super().schedule(*args, **kwargs)
        self._last = output if self._can_derive and self._is_steady(output) else None
        return output

    def _is_steady(self, output: SchedulerOutput) -> bool:
        """Every running request decoded one token, and nothing else happened."""
        cached = output.scheduled_cached_reqs
        return (
            0 < len(cached.req_ids) == output.total_num_scheduled_tokens == len(self.running)
            and not cached.resumed_req_ids
            and not output.has_structured_output_requests
            and not moves_blocks(output)
        )

    def _derive(self) -> SchedulerOutput | None:
        """The next step if it is one more token for each request of the last, else None and nothing has changed."""
        last = self._last
        assert last is not None
        running = self.running
        if (
            self.finished_req_ids
            or self.reset_preempted_req_ids
            or self._pause_state != PauseState.UNPAUSED
            or self.get_request_counts()[1]
            or [request.request_id for request in running] != last.scheduled_cached_reqs.req_ids
            or not all(map(self._is_next, running))
        ):
            return None
        size = self.block_size
        full = [i for i, request in enumerate(running) if request.num_computed_tokens % size == 0]
        if len(full) > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        new_block_ids: list[Any] = [None] * len(running)
        for i in full:
            new_block_ids[i] = self.kv_cache_manager.allocate_slots(running[i], 1).get_block_ids(allow_none=True)
        cached = CachedRequestData(
            req_ids=last.scheduled_cached_reqs.req_ids,
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=new_block_ids,
            num_computed_tokens=[request.num_computed_tokens for request in running],
            num_output_tokens=[request.num_output_tokens + request.num_output_placeholders for request in running],
        )
        output = dataclasses.replace(
            last,
            scheduled_cached_reqs=cached,
            num_common_prefix_blocks=self.kv_cache_manager.get_num_common_prefix_blocks(running[0].request_id),
            finished_req_ids=set(),
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        for request in running:
            request.num_computed_tokens += 1
            request.num_in_flight_tokens += 1
            request.num_output_placeholders += 1
            request.is_prefill_chunk = False
        return output

    def _is_next(self, request: Request) -> bool:
        """Exactly one known token is not computed, and there is room for the one that will follow it."""
        computed, placeholders = request.num_computed_tokens, request.num_output_placeholders
        return (
            request.num_tokens + placeholders - computed == 1
            and computed + 1 < self.max_model_len
            and (not placeholders or computed + 2 - placeholders < request.num_prompt_tokens + request.max_tokens)
        )

    def append_tokens(self, output: SchedulerOutput, tokens: dict[str, list[int]]) -> bool:
        """What ``update_from_output`` comes to for requests that neither stop nor stream; False if it takes vLLM's own.

        Args:
            output: a step whose tokens have arrived.
            tokens: by request id, the token sampled in it (none where it was not sampled).
        """
        requests = self.requests
        if any(i in requests and requests[i].status != RequestStatus.RUNNING for i in output.num_scheduled_tokens):
            return False
        for request_id, scheduled in output.num_scheduled_tokens.items():
            request = requests.get(request_id)
            if request is None:
                continue
            request.num_in_flight_tokens -= scheduled
            for token in tokens[request_id]:
                request.append_output_token_ids(token)
                request.num_output_placeholders -= 1
                known = request.num_computed_tokens - request.num_output_placeholders
                if known % self.block_size == 0:
                    self.kv_cache_manager.cache_blocks(request, known)
        return True


def moves_blocks(output: SchedulerOutput) -> bool:
    """Whether a step changes KV blocks or their table by other means than new blocks at a row's end (which no row of a
    plain cache does)."""
    return any(getattr(output, name, None) for name in ("kv_cache_block_copies", "block_table_updates"))
