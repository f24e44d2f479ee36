"""PairScheduler: a stock vLLM scheduler for the teacher, another for the student, and the rule that keeps them in step.

Every request exists in both, with its own prompt and KV blocks. Computing a request's newest token gives the logits to sample
from, so a side may compute it only in a step where the other side computes its own. A side that gets there first (chunked
prefill, a prefix-cache hit, a preemption on the other side) waits with one token left. Nothing is computed twice, which a
recurrent state could not take.

The student is scheduled first, and only requests that the teacher can finish in this step may finish. The teacher follows, and
may finish those that the student did. Where it cannot after all (its cache is full), the student's half is preempted.

Which requests a step samples is known when it is scheduled, before any token arrives. So the rule holds with async scheduling,
where a step is scheduled while the one before it runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from osd.engine.backend.configuration import StudentCache, eos_ids, student_vllm_config
from osd.engine.backend.returned import Returned, return_record, row_width, take_record
from osd.engine.mixture import NO_TOKEN
from osd.engine.request import PairOptions, check_topk

# Values of `num_nans_in_logits` that the pair's sampler reports, and the side that they name.
FAILURES = {
    1: "NaN in the student's logits",
    2: "NaN in the teacher's logits",
    3: "NaN in the student and teacher's logits",
    NO_TOKEN: "the sampling parameters leave no token that can be drawn",
}


@dataclass
class PairStep:
    """The student's half of a step; travels on the teacher's ``SchedulerOutput`` as its ``osd`` attribute.

    Attributes:
        student_output: the student scheduler's own output for this step.
        ready: ids of the requests that are sampled in this step: both sides compute logits for the same position.
        unmixed: of those, the requests past their ``mix_tokens``, sampled from the student alone.
        weights_version: the student weights that these KV blocks belong to; None: no request has named one.
        returned: requests whose record is returned with their tokens.
    """

    student_output: SchedulerOutput
    ready: set[str] = field(default_factory=set)
    unmixed: set[str] = field(default_factory=set)
    weights_version: int | None = None
    returned: dict[str, Returned] = field(default_factory=dict)


class SideScheduler(AsyncScheduler):
    """vLLM's scheduler, for one side of a pair."""

    may_finish: Callable[[str], bool]  # whether a request's newest token may be computed in the step being scheduled
    cornered: set[str]  # requests that were not admitted, because they had no other token left to compute

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Return how many tokens of a request to schedule.

        vLLM calls it for every request, after all other limits, to leave room for a draft model, which a pair has not.
        """
        known = request.num_tokens + request.num_output_placeholders
        if num_computed_tokens + num_new_tokens < known or self.may_finish(request.request_id):
            return num_new_tokens
        if num_computed_tokens >= known - 1 and request.status != RequestStatus.RUNNING:
            self.cornered.add(request.request_id)
        return max(known - 1 - num_computed_tokens, 0)


class PairScheduler(SideScheduler):
    """vLLM's scheduler for the teacher, holding another one for the student (``self.student``)."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        # num_spec_tokens counts the drafts of vLLM's own draft models.
        assert not any((self.connector, self.num_spec_tokens, self.use_pp, self.lora_config)), "PairConfig refuses these"
        student_config = student_vllm_config(vllm_config)
        cache = StudentCache.of(kv_cache_config)
        student_config.cache_config = cache.config
        planned, block_size = cache.plan(student_config, vllm_config, kv_cache_config)
        # Nobody asks the student which of its requests ended.
        own = {"block_size": block_size, "hash_block_size": planned.hash_block_size, "include_finished_set": False}
        with set_current_vllm_config(student_config):
            self.student = SideScheduler(student_config, planned, *args, **{**kwargs, **own})
        self._student_hasher = _block_hasher(student_config, planned)
        for side in (self, self.student):
            _allocate_quickly(side)
        self.student_eos_ids = eos_ids(student_config)
        self.weights_version: int | None = None
        seed = vllm_config.model_config.seed, vllm_config.parallel_config.data_parallel_index
        self._seeds = random.Random(str(seed))
        self._mix_limits: dict[str, int] = {}
        self._returned: dict[str, Returned] = {}
        self._signals: dict[str, PairOptions] = {}  # of the requests that want hidden states or top-k
        self.cornered = set()
        self._refused: list[tuple[Request, str]] = []
        self._to_zero: dict[Scheduler, set[int]] = {self: set(), self.student: set()}

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.student.may_finish = self._within_reach().__contains__
        self.cornered, self.student.cornered = set(), set()
        step = PairStep(self.student.schedule(*args, **kwargs), weights_version=self.weights_version)
        finishing = _finishing(self.student, step.student_output)
        self.may_finish = partial(self._teacher_may_finish, finishing)
        output = super().schedule(*args, **kwargs)
        self._pair_up(output, step, finishing)
        for new in step.student_output.scheduled_new_reqs if self._returned else ():
            if (returned := self._returned.get(new.req_id)) is not None and returned.cached is None:
                returned.cached = new.num_computed_tokens
        step.returned = {i: self._returned[i] for i in self._returned.keys() & step.ready}
        self._zero_scrubbed_blocks(output, step.student_output)
        output.osd = step  # type: ignore[attr-defined]
        return output

    def _within_reach(self) -> set[str]:
        """Return the requests of which the teacher has one token left, and room for it in the next step."""
        room, reach = self.max_num_scheduled_tokens, self.cornered
        longest = self.scheduler_config.long_prefill_token_threshold or room
        for request in self.running:
            left = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            if left == 1 and room > 0:
                reach.add(request.request_id)
            room -= min(left + len(request.spec_token_ids), longest)
        return reach

    def _teacher_may_finish(self, finishing: set[str], request_id: str) -> bool:
        return request_id in finishing or request_id not in self.student.requests

    def _pair_up(self, output: SchedulerOutput, step: PairStep, finishing: set[str]) -> None:
        """Find the requests that are sampled in a scheduled step; preempt the student's half where the teacher's is missing."""
        student = self.student.requests
        step.ready = _finishing(self, output)
        for request_id in step.ready & student.keys():
            # Logits of two positions must never meet: the distribution would be wrong, and nothing would show it.
            assert request_id in finishing, f"{request_id}: the student is behind"
            assert _position(self.requests[request_id]) == _position(student[request_id]), f"{request_id}: out of step"
        for request_id in step.student_output.num_scheduled_tokens:  # not in a set's order, which differs between processes
            if request_id in finishing and request_id not in step.ready:
                _preempt(self.student, student[request_id])
        if not (output.num_scheduled_tokens or step.student_output.num_scheduled_tokens):
            self._make_way()
        if self._mix_limits:
            limits = self._mix_limits
            step.unmixed = {i for i in step.ready & limits.keys() if _position(self.requests[i]) >= limits[i]}

    def _make_way(self) -> None:
        """Preempt the youngest request that waits for its other half, if nothing else can go on.

        A request may be admitted out of turn (an older one's grammar was being compiled). Then each side's cache can be held by
        requests that the other side has no room for.
        """
        if any(request.num_in_flight_tokens for side in (self, self.student) for request in side.requests.values()):
            return
        waiting = RequestStatus.WAITING, RequestStatus.PREEMPTED
        alone = [
            (request.arrival_time, side, request)
            for side, other in ((self, self.student), (self.student, self))
            for request in side.running
            if (half := other.requests.get(request.request_id)) is not None and half.status in waiting
        ]
        if alone:
            _, side, request = max(alone, key=lambda item: item[0])
            _preempt(side, request)
            in_turn = sorted(side.waiting, key=lambda request: request.arrival_time)
            side.waiting.remove_requests(in_turn)
            for request in in_turn:
                side.waiting.add_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step: PairStep = scheduler_output.osd  # type: ignore[attr-defined]
        failed = _take_failed_rows(model_runner_output)
        # The stock update trims and owns these lists.
        tokens = {i: list(t) for i, t in zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=True)}
        record = take_record(model_runner_output, step.returned.values()) if step.returned else None
        for request_id in failed:
            self._scrub(request_id)  # vLLM frees its blocks if a draft accepted before the failure ends it
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if record is not None:
            return_record(outputs, step.returned, model_runner_output.req_id_to_index, record)
        self._update_student(step.student_output, tokens)
        for request_id, reason in failed.items():
            self._scrub(request_id)
            self._end_in_error(outputs, request_id, reason)
        for request, reason in self._refused:
            _append_error(outputs, request, reason)
        self._refused.clear()
        return outputs

    def _update_student(self, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
        """Append the drawn tokens to the student's requests.

        Equivalent to ``self.student.update_from_output`` for requests that never stop by themselves and return nothing
        (`tests/test_scheduler.py` compares the two), at a third of its host time.
        """
        student = self.student
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            request = student.requests.get(request_id)
            if request is None:  # ended while the step ran
                continue
            request.num_in_flight_tokens -= num_scheduled
            stale = request.num_stale_output_tokens > 0  # preempted while the step ran
            if stale:
                request.num_stale_output_tokens -= num_scheduled
            new_tokens = tokens.get(request_id)
            if not new_tokens:
                continue
            request.append_output_token_ids(new_tokens)
            if not stale:
                rejected = len(output.scheduled_spec_decode_tokens.get(request_id, ())) + 1 - len(new_tokens)
                request.num_computed_tokens -= rejected
                request.num_output_placeholders -= len(new_tokens) + rejected
                computed = request.num_computed_tokens - request.num_in_flight_tokens
                if computed % student.hash_block_size < len(new_tokens):  # a block became full
                    student.kv_cache_manager.cache_blocks(request, computed)

    # -- failed rows ------------------------------------------------------------------------------------------------

    def _scrub(self, request_id: str) -> None:
        """Evict a failed request's own KV blocks from both prefix caches, and zero them before their next use.

        Attention multiplies masked slots by 0, and 0 × NaN is NaN, so NaN in a freed block would fail its next owner.
        Blocks shared with other requests stay.
        """
        for side, to_zero in self._to_zero.items():
            if request_id not in side.requests:
                continue
            groups = side.kv_cache_manager.get_blocks(request_id).blocks
            own = {block.block_id for group in groups for block in group if block.ref_cnt == 1 and not block.is_null}
            side.kv_cache_manager.evict_blocks(own)
            to_zero |= own

    def _zero_scrubbed_blocks(self, *outputs: SchedulerOutput) -> None:
        for output, block_ids in zip(outputs, self._to_zero.values(), strict=True):
            if block_ids:
                output.new_block_ids_to_zero = sorted({*(output.new_block_ids_to_zero or ()), *block_ids})
                block_ids.clear()

    def _end_in_error(self, outputs: dict[int, EngineCoreOutputs], request_id: str, reason: str) -> None:
        # Nothing is returned for a request that was aborted while the step ran.
        for request in self.finish_requests(request_id, RequestStatus.FINISHED_ERROR):
            _append_error(outputs, request, reason)

    # -- a request's life -------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        try:
            options = PairOptions.of(request.sampling_params)
            self._check(request, options)
            self._adopt_weights_version(options.weights_version)
        except (ValueError, TypeError) as error:
            # Raising here would end the engine because of one bad request: answer the request with an error instead.
            self._refused.append((request, str(error)))
            return
        request.sampling_params = params = copy(request.sampling_params)  # vLLM shares one between the n of a request
        self._add_student_eos(params)
        if params.seed is None:
            params.seed = self._seeds.getrandbits(63)  # here, so that all tensor-parallel ranks draw the same
        if options.hidden or options.topk:
            self._signals[request.request_id] = options
        if options.mix_tokens is not None:
            self._mix_limits[request.request_id] = options.mix_tokens
        if options.return_record:
            width = row_width(self.vllm_config.model_config, options)
            self._returned[request.request_id] = Returned(width=width)
        super().add_request(request)
        if not options.teacher_only:
            self.student.add_request(self._student_request(request, options))

    def _check(self, request: Request, options: PairOptions) -> None:
        if request.sampling_params is None or request.mm_features or request.prompt_embeds is not None or request.resumable:
            raise ValueError("the paired engine serves text completion only (no pooling, images, embeddings, streaming input)")
        if request.sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not supported by the paired engine; it has logprobs of the completion")
        if options.topk:
            check_topk(options.topk, min(side.vllm_config.model_config.get_vocab_size() for side in (self, self.student)))
        if options.hidden or options.topk:
            other = next(iter(self._signals.values()), options)
            if (options.hidden, options.topk) != (other.hidden, other.topk):
                raise ValueError(
                    f"hidden={options.hidden}, topk={options.topk}: other requests run with hidden={other.hidden}, "
                    f"topk={other.topk}, and all rows of a step are alike; ask for the same, or wait until they have ended"
                )
        if options.teacher_only:
            return
        if options.student_prompt_token_ids is not None and not options.student_prompt_token_ids:
            raise ValueError("student_prompt_token_ids is empty; give the student at least one token")
        prompt = options.student_prompt_token_ids or request.prompt_token_ids
        vocab_size = self.student.vllm_config.model_config.get_vocab_size()
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < vocab_size)
            raise ValueError(f"the student's prompt has token id {wrong}, which is not one of its {vocab_size} ids")
        longest, limit = len(prompt) + request.max_tokens, self.student.max_model_len
        if longest > limit:
            raise ValueError(
                f"the student's prompt ({len(prompt)} tokens) plus max_tokens ({request.max_tokens}) is {longest}, over its "
                f"max_model_len {limit}"
            )

    def _student_request(self, request: Request, options: PairOptions) -> Request:
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
            client_index=request.client_index,
            arrival_time=request.arrival_time,
            cache_salt=request.cache_salt,
            priority=request.priority,
            block_hasher=self._student_hasher,
        )

    def _add_student_eos(self, params: SamplingParams) -> None:
        """Make a completion end at either model's end-of-sequence id."""
        extra = self.student_eos_ids - {params.eos_token_id, *(params.stop_token_ids or ())}
        if params.ignore_eos or not extra:
            return
        params.stop_token_ids = [*(params.stop_token_ids or ()), *sorted(extra)]
        params.all_stop_token_ids.update(extra)

    def _adopt_weights_version(self, version: int | None) -> None:
        """Move to weights ``version`` (None: keep the current one). A new version invalidates the student's prefix cache."""
        if version is None:
            return
        if version == (self.weights_version or 0):
            self.weights_version = version
            return
        if self.weights_version is not None and version < self.weights_version:
            raise ValueError(f"weights_version={version} is older than {self.weights_version}, which is loaded")
        self._refuse_in_flight("the student's weights can change")
        if not self.student.reset_prefix_cache(reset_running_requests=bool(self.student.running)):
            raise RuntimeError("the student's prefix cache could not be reset after a weight sync: blocks are still in use")
        self.weights_version = version

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Free both halves of a request. Only the teacher's side decides that a request ends."""
        self._mix_limits.pop(request.request_id, None)
        self._returned.pop(request.request_id, None)
        self._signals.pop(request.request_id, None)
        self.student.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        return super()._free_request(request, *args, **kwargs)

    # -- the scheduler as a whole -----------------------------------------------------------------------------------

    def has_requests(self) -> bool:
        # A step must run to answer refused requests, and to tell the worker which of the student's requests ended.
        return super().has_requests() or self.student.has_finished_requests() or bool(self._refused)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        if reset_running_requests:
            self._refuse_in_flight("running requests can be reset")
        teacher_reset = super().reset_prefix_cache(reset_running_requests, *args, **kwargs)
        return self.student.reset_prefix_cache(reset_running_requests, *args, **kwargs) and teacher_reset

    def _refuse_in_flight(self, what: str) -> None:
        """Raise while a step is in flight: vLLM drops its tokens when it resets a request, and the record already has them."""
        if any(request.num_in_flight_tokens for side in (self, self.student) for request in side.requests.values()):
            raise ValueError(f"{what} only while no step is in flight; wait for the running requests to finish first")

    def report_finished(self, teacher_known: Iterable[str], student_known: Iterable[str]) -> None:
        """Report again the requests that ended, of those that each side's runner still knows.

        A step that fails before a runner has read which requests ended is not sent again.
        """
        self.finished_req_ids |= set(teacher_known) - self.requests.keys()
        self.student.finished_req_ids |= set(student_known) - self.student.requests.keys()

    def set_pause_state(self, pause_state: Any) -> None:
        super().set_pause_state(pause_state)
        self.student.set_pause_state(pause_state)

    def shutdown(self) -> None:
        super().shutdown()
        self.student.shutdown()


def _allocate_quickly(scheduler: Scheduler) -> None:
    """Skip vLLM's block allocation for a token whose block a request already has: half of a step's scheduling time.

    Only for one group of full attention, where vLLM would allocate nothing. A block that becomes full enters the prefix cache
    when its last token is known, in ``update_from_output``; the student's last block does not where the request ends with it.
    """
    groups = scheduler.kv_cache_config.kv_cache_groups
    if len(groups) != 1 or type(groups[0].kv_cache_spec) is not FullAttentionSpec:
        return
    # The scheduler's own block size is that of all the teacher's groups together, for the student too.
    manager, block_size = scheduler.kv_cache_manager, groups[0].kv_cache_spec.block_size
    allocate = manager.allocate_slots

    def allocate_slots(request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if num_new_tokens == 1 and request.num_computed_tokens % block_size:
            return manager.empty_kv_cache_blocks
        return allocate(request, num_new_tokens, *args, **kwargs)

    manager.allocate_slots = allocate_slots


def _position(request: Request) -> int:
    """Return how many tokens of its completion a request has computed, with those of the step being scheduled."""
    return request.num_computed_tokens - request.num_prompt_tokens


def _block_hasher(config: VllmConfig, kv_cache_config: KVCacheConfig) -> Any:
    """Return what names a request's blocks in the prefix cache, or None without one; vLLM's engine core makes the teacher's."""
    if not config.cache_config.enable_prefix_caching:
        return None
    function = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
    init_none_hash(function)
    return get_request_block_hasher(kv_cache_config.hash_block_size, function)


def _finishing(side: Scheduler, output: SchedulerOutput) -> set[str]:
    """Return the requests whose newest token a scheduled step computes."""
    requests = side.requests
    return {i for i in output.num_scheduled_tokens if not requests[i].is_prefill_chunk}


def _preempt(side: Scheduler, request: Request) -> None:
    """Free a running request's KV blocks, and queue it to be computed from its start; a step that has it computes it still."""
    side.running.remove(request)
    side._preempt_request(request, monotonic())


def _take_failed_rows(output: ModelRunnerOutput) -> dict[str, str]:
    """Drop the last token of rows that failed, at which they failed; return the reasons by request id."""
    sides, output.num_nans_in_logits = output.num_nans_in_logits or {}, None
    failed = {}
    for i, (request_id, tokens) in enumerate(zip(output.req_ids, output.sampled_token_ids, strict=True)):
        if tokens and sides.get(request_id):
            failed[request_id] = FAILURES[int(sides[request_id])]
            output.sampled_token_ids[i] = tokens[:-1]
    return failed


def _append_error(outputs: dict[int, EngineCoreOutputs], request: Request, reason: str) -> None:
    error = EngineCoreOutput(
        request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=f"osd: {reason}"
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(error)
