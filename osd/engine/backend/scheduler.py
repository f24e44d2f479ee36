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
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from osd.engine.backend.admission import Admission
from osd.engine.backend.configuration import StudentCache, student_vllm_config
from osd.engine.backend.failures import append_error, take_failed_rows
from osd.engine.backend.returned import Returned, return_record, row_width, take_record
from osd.engine.backend.side_scheduler import SideScheduler, position
from osd.engine.request import PairOptions


@dataclass
class PairStep:
    """The student's half of a step; travels on the teacher's ``SchedulerOutput`` as its ``osd`` attribute.

    Attributes:
        student_output: the student scheduler's own output for this step.
        ready: ids of the requests that are sampled in this step: both sides compute logits for the same position.
        unmixed: of those, the requests past their ``mix_tokens``, sampled from the student alone.
        resets: how often the student's prefix cache was emptied. All blocks between two resets have KV of the same weights.
        weights_version: the version of the student's weights that requests name; None: no request has named one.
        returned: requests whose record is returned with their tokens.
    """

    student_output: SchedulerOutput
    resets: int
    ready: set[str] = field(default_factory=set)
    unmixed: set[str] = field(default_factory=set)
    weights_version: int | None = None
    returned: dict[str, Returned] = field(default_factory=dict)


class PairScheduler(SideScheduler):
    """vLLM's scheduler for the teacher, holding another one for the student (``self.student``)."""

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        student_config = student_vllm_config(vllm_config)
        cache = StudentCache.of(kv_cache_config)
        student_config.cache_config = cache.config
        planned, block_size = cache.plan(student_config, vllm_config, kv_cache_config)
        own = {"block_size": block_size, "hash_block_size": planned.hash_block_size}
        own |= {"include_finished_set": False, "log_stats": False}  # nobody asks the student
        with set_current_vllm_config(student_config):
            self.student = SideScheduler(student_config, planned, *args, **{**kwargs, **own})
        self._admission = Admission(vllm_config, student_config, planned)
        self.weights_version: int | None = None
        seed = vllm_config.model_config.seed, vllm_config.parallel_config.data_parallel_index
        self._seeds = random.Random(str(seed))
        self._mix_limits: dict[str, int] = {}
        self._returned: dict[str, Returned] = {}
        self._signals: dict[str, PairOptions] = {}  # of the requests that want hidden states or top-k
        self._refused: list[tuple[Request, str]] = []

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        self.student.may_finish = self._within_reach().__contains__
        self.cornered, self.student.cornered = set(), set()
        step = PairStep(self.student.schedule(*args, **kwargs), self.student.resets, weights_version=self.weights_version)
        finishing = self.student.finishing(step.student_output)
        self.may_finish = self._teacher_may_finish(finishing).__contains__
        output = super().schedule(*args, **kwargs)
        self._pair_up(output, step, finishing)
        for new in step.student_output.scheduled_new_reqs if self._returned else ():
            if (returned := self._returned.get(new.req_id)) is not None and returned.cached is None:
                returned.cached = new.num_computed_tokens
        step.returned = {i: self._returned[i] for i in self._returned.keys() & step.ready}
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

    def _teacher_may_finish(self, finishing: set[str]) -> set[str]:
        """Return the requests that the student finishes in this step or has no part in."""
        return finishing | (self.requests.keys() - self.student.requests.keys())

    def _pair_up(self, output: SchedulerOutput, step: PairStep, finishing: set[str]) -> None:
        """Find the requests that are sampled in a scheduled step; preempt the student's half where the teacher's is missing."""
        student = self.student.requests
        step.ready = self.finishing(output)
        for request_id in step.ready & student.keys():
            # Logits of two positions must never meet: the distribution would be wrong, and nothing would show it.
            assert request_id in finishing, f"{request_id}: the student is behind"
            assert position(self.requests[request_id]) == position(student[request_id]), f"{request_id}: out of step"
        if alone := finishing - step.ready:
            for request_id in step.student_output.num_scheduled_tokens:  # not a set's order, which differs between processes
                if request_id in alone:
                    self.student.preempt(student[request_id])
        if not (output.num_scheduled_tokens or step.student_output.num_scheduled_tokens):
            self._make_way()
        if self._mix_limits:
            limits = self._mix_limits
            step.unmixed = {i for i in step.ready & limits.keys() if position(self.requests[i]) >= limits[i]}

    def _make_way(self) -> None:
        """Preempt the youngest request that waits for its other half, if nothing else can go on.

        A request may be admitted out of turn (an older one's grammar was being compiled). Then each side's cache can be held by
        requests that the other side has no room for.
        """
        if self.step_in_flight or self.student.step_in_flight or self.pause_state == PauseState.PAUSED_ALL:
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
            side.preempt(request)
            in_turn = sorted(side.waiting, key=lambda request: request.arrival_time)
            side.waiting.remove_requests(in_turn)
            for request in in_turn:
                side.waiting.add_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step: PairStep = scheduler_output.osd  # type: ignore[attr-defined]
        failed = take_failed_rows(model_runner_output)
        tokens = dict(zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=True))
        record = take_record(model_runner_output, step.returned.values()) if step.returned else None
        for request_id in failed:
            self._evict(request_id)  # before the update: an accepted draft may end the request there, which frees its blocks
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if record is not None:
            return_record(outputs, step.returned, model_runner_output.req_id_to_index, record)
        self._update_student(step.student_output, tokens)
        for request_id, reason in failed.items():
            self._evict(request_id)
            for request in self.finish_requests(request_id, RequestStatus.FINISHED_ERROR):  # none if it was aborted meanwhile
                append_error(outputs, request, reason)
        for request, reason in self._refused:
            append_error(outputs, request, reason)
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

    def _evict(self, request_id: str) -> None:
        self.evict(request_id)
        self.student.evict(request_id)

    # -- a request's life -------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        try:
            options = PairOptions.of(request.sampling_params)
            self._admission.check(request, options)
            self._check_signals(options)
            self.adopt_weights_version(options.weights_version)
        except (ValueError, TypeError) as error:
            # Raising here would end the engine because of one bad request: answer the request with an error instead.
            self._refused.append((request, str(error)))
            return
        request.sampling_params = params = copy(request.sampling_params)  # vLLM shares one between the n of a request
        self._admission.add_student_eos(params)
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
            self.student.add_request(self._admission.student_request(request, options))

    def _check_signals(self, options: PairOptions) -> None:
        """Raise a ValueError unless the running requests want the same of hidden states and top-k: rows of a step are alike."""
        other = next(iter(self._signals.values()), options)
        if (options.hidden or options.topk) and (options.hidden, options.topk) != (other.hidden, other.topk):
            raise ValueError(
                f"hidden={options.hidden}, topk={options.topk}: other requests run with hidden={other.hidden}, "
                f"topk={other.topk}, and all rows of a step are alike; ask for the same, or wait until they have ended"
            )

    def adopt_weights_version(self, version: int | None) -> None:
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
        if self.step_in_flight or self.student.step_in_flight:
            raise ValueError(f"{what} only while no step is in flight; wait for the running requests to finish first")

    def report_finished(self, teacher_known: Iterable[str], student_known: Iterable[str]) -> None:
        """Report again the requests that ended, of those that each side's runner still knows.

        A step that fails before a runner has read which requests ended is not sent again.
        """
        self.finished_req_ids |= set(teacher_known) - self.requests.keys()
        self.student.finished_req_ids |= set(student_known) - self.student.requests.keys()

    def set_pause_state(self, pause_state: PauseState) -> None:
        """Pause or resume both sides. After a pause that kept its requests, the student recomputes their KV.

        Its weights may have changed meanwhile; the teacher's never change. If a step is still in flight, nobody waited
        for the pause, so nobody loaded weights in it.
        """
        was_kept = self.pause_state == PauseState.PAUSED_ALL
        if was_kept and pause_state != PauseState.PAUSED_ALL and not (self.step_in_flight or self.student.step_in_flight):
            self.student.reset_prefix_cache(reset_running_requests=True)
        super().set_pause_state(pause_state)
        self.student.set_pause_state(pause_state)

    def shutdown(self) -> None:
        super().shutdown()
        self.student.shutdown()
