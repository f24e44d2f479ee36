"""Steady decoding: what need not be worked out again while a batch only grows by a token per row and step.

Most steps of a run are the step before, one token on: the same requests in the same rows, one new position each. vLLM
works every step out from scratch, on the host, in milliseconds that the GPU spends waiting. The two classes here derive such
a step from the last one and leave every other step to vLLM's own code, to which theirs must be equivalent:
``tests/test_engine_async.py`` compares what both produce.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
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


class SteadyInputs:
    """A runner's ``_prepare_inputs`` that moves last step's inputs on by one position, on the device.

    vLLM gathers token ids and positions of the batch on the host and uploads a dozen small tensors. In steady decoding all
    of that is known to the device: the token each row sampled, and each row's position.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.stock = runner._prepare_inputs
        self.advanced = 0  # how many steps were moved on, for whoever wants to know
        self._supported = runner.use_async_scheduling and not (
            runner.uses_mrope
            or getattr(runner, "uses_xdrope_dim", 0)  # gone in vLLM 0.31
            or runner.enable_prompt_embeds
            or runner.num_spec_tokens
            or len(runner.kv_cache_config.kv_cache_groups) != 1
        )
        self._result: Any = None  # what the last steady step returned
        self._req_ids: list[str] = []
        self._computed = np.empty(0, dtype=np.int32)

    def __call__(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> Any:
        batch = self.runner.input_batch
        num_rows = batch.num_reqs
        steady = self._supported and scheduler_output.total_num_scheduled_tokens == num_rows
        computed = batch.num_computed_tokens_cpu[:num_rows]
        if steady and self._result is not None and self._follows(batch, computed):
            self._advance(scheduler_output, num_rows)
        else:
            self._result = None
            result = self.stock(scheduler_output, num_scheduled_tokens)
            if not steady:
                return result
            self._result, self._req_ids = result, list(batch.req_ids)
        self._computed = computed.copy()
        return self._result

    def _follows(self, batch: Any, computed: np.ndarray) -> bool:
        """The same rows, each one position on, each fed the token that it sampled in the last step."""
        return (
            batch.prev_sampled_token_ids is not None
            and len(batch.prev_req_id_to_index) == batch.num_reqs
            and batch.req_ids == self._req_ids
            and np.array_equal(computed, self._computed + 1)
        )

    def _advance(self, scheduler_output: SchedulerOutput, num_rows: int) -> None:
        runner, batch = self.runner, self.runner.input_batch
        if any(scheduler_output.scheduled_cached_reqs.new_block_ids):
            batch.block_table.commit_block_table(num_rows)
        positions = runner.positions[:num_rows]
        torch._foreach_add_([positions, runner.num_computed_tokens[:num_rows], runner.seq_lens[:num_rows]], 1)
        batch.block_table.compute_slot_mapping(num_rows, runner.query_start_loc.gpu[: num_rows + 1], positions)
        runner.input_ids.gpu[:num_rows].copy_(batch.prev_sampled_token_ids[:, 0], non_blocking=True)
        runner.optimistic_seq_lens_cpu[:num_rows] += 1
        runner.discard_request_mask.np[:num_rows] = False
        self.advanced += 1
