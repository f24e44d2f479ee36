"""PairScheduler: the teacher's stock scheduler, a second stock scheduler for the student, and the rewind rule.

Every request exists in both, with its own prompt and its own KV blocks. A request advances only on a step where both
sides computed logits for the same output position. Where one side got there first (chunked prefill, a prefix-cache hit,
a preemption on the other side), its sample is discarded and its ``num_computed_tokens`` goes back by one, so that its own
stock scheduler recomputes just that token next step. Nothing waits, so nothing deadlocks: both schedulers serve requests
in arrival order, and the oldest request always progresses on both sides.

Whether a request is sampled in a step is known when the step is scheduled, before any token arrives, so the rule also
holds with vLLM's async scheduling, where a step is scheduled while the one before it runs. Both sides are async, or neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from osd.engine.adapter import ADAPTER
from osd.engine.config import student_vllm_config
from osd.engine.request import PairOptions
from osd.engine.steady import SteadyScheduler

# A row whose logits are not numbers is "sampled" as one of these ids; no vocabulary has negative ids.
FAILED_TOKEN = {-2: "student", -3: "teacher", -4: "student and teacher"}


@dataclass
class PairStep:
    """What the student does in a step; rides on the teacher's ``SchedulerOutput`` as its ``osd`` attribute.

    Attributes:
        student_output: the student scheduler's own output for this step.
        ready: ids of the requests that are sampled in this step: both sides compute logits for the same position.
        teacher_ahead, student_ahead: ids whose logits this side computed too early; it computes the same token again.
        weights_version: the student weights that these KV blocks belong to.
    """

    student_output: SchedulerOutput
    ready: set[str] = field(default_factory=set)
    teacher_ahead: set[str] = field(default_factory=set)
    student_ahead: set[str] = field(default_factory=set)
    weights_version: int = 0


def student_kv_cache_config(student_config: VllmConfig, num_blocks: int) -> KVCacheConfig:
    """The student's KV cache as its scheduler needs it: one group of full attention, as many blocks as the teacher.

    The scheduler has no model to ask; :class:`osd.engine.worker.PairWorker` checks the model's own specs against this.
    """
    model = student_config.model_config
    spec = FullAttentionSpec(
        block_size=student_config.cache_config.block_size,
        num_kv_heads=model.get_num_kv_heads(student_config.parallel_config),
        head_size=model.get_head_size(),
        dtype=model.dtype,
    )
    group = KVCacheGroupSpec(layer_names=["student"], kv_cache_spec=spec)
    return KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=[group])


class PairScheduler(Scheduler):
    """vLLM's scheduler for the teacher, holding another one for the student (``self.student``).

    Built for a config with async scheduling, it is an :class:`AsyncPairScheduler`.
    """

    _student_class: type[Scheduler] = Scheduler

    def __new__(cls, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> PairScheduler:
        return object.__new__(AsyncPairScheduler if vllm_config.scheduler_config.async_scheduling else cls)

    def __init__(self, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        self._refuse_unsupported()
        student_config = student_vllm_config(vllm_config)
        student_config.cache_config.num_gpu_blocks = kv_cache_config.num_blocks
        student_kv = student_kv_cache_config(student_config, kv_cache_config.num_blocks)
        with set_current_vllm_config(student_config):
            self.student = self._student_class(student_config, student_kv, *args, **kwargs)
        self.student_eos_ids = _eos_ids(student_config)
        self.weights_version = 0
        self._refused: list[tuple[Request, str]] = []
        self._to_zero: dict[Scheduler, set[int]] = {self: set(), self.student: set()}

    def _refuse_unsupported(self) -> None:
        unsupported = (self.connector, self.num_spec_tokens, self.use_pp, self.lora_config)
        assert not any(unsupported), "PairConfig refuses these"

    # -- one step ---------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        step = PairStep(self.student.schedule(), weights_version=self.weights_version)
        self._apply_rewind_rule(output, step)
        self._zero_scrubbed_blocks(output, step.student_output)
        output.osd = step  # type: ignore[attr-defined]
        return output

    def _apply_rewind_rule(self, output: SchedulerOutput, step: PairStep) -> None:
        """Find out which of a scheduled step's requests are sampled in it, and take the others back by one token."""
        teacher_ready = _with_logits(self, output)
        student_ready = _with_logits(self.student, step.student_output)
        paired = self.student.requests.keys()
        step.ready = {i for i in teacher_ready if i in student_ready or i not in paired}
        for request_id in step.ready & paired:
            # Logits of two positions must never meet: that would be a wrong distribution, and nothing would show it.
            assert _position(self, request_id) == _position(self.student, request_id), f"{request_id}: out of step"
        step.teacher_ahead, step.student_ahead = teacher_ready - step.ready, student_ready - step.ready
        for side, ahead in ((self, step.teacher_ahead), (self.student, step.student_ahead)):
            for request_id in ahead:
                _take_back(side.requests[request_id])

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        step: PairStep = scheduler_output.osd  # type: ignore[attr-defined]
        failed = _take_failed_rows(model_runner_output)
        sampled = dict(zip(model_runner_output.req_ids, model_runner_output.sampled_token_ids, strict=True))
        # The stock update trims and owns these lists; the student needs its own.
        student_tokens = {i: list(sampled.get(i, ())) for i in step.student_output.num_scheduled_tokens}
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._update_student(step.student_output, student_tokens)
        for request_id, side in failed.items():
            self._scrub(request_id)
            self._end_in_error(outputs, request_id, f"NaN in the {side}'s logits")
        for request, reason in self._refused:
            _append(outputs, request, reason)
        self._refused.clear()
        return outputs

    def _update_student(self, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
        self.student.update_from_output(output, _student_runner_output(tokens))

    def _scrub(self, request_id: str) -> None:
        """Take a failed request's own KV blocks out of the prefix caches and have them zeroed before they are reused.

        Attention multiplies a masked slot's value by zero, and NaN times zero is NaN: what a failed request leaves behind
        would fail the next owner of its blocks. Blocks that others share are theirs to lose.
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
            _append(outputs, request, reason)

    # -- a request's life -------------------------------------------------------------------------------------------

    def add_request(self, request: Request) -> None:
        try:
            options = PairOptions.of(request.sampling_params)
            self._check(request, options)
            self._adopt_weights_version(options.weights_version)
        except ValueError as error:
            # Raising here would take the whole engine down with one bad request: answer it with an error instead.
            self._refused.append((request, str(error)))
            return
        self._add_student_eos(request.sampling_params)
        super().add_request(request)
        if not options.teacher_only:
            self.student.add_request(self._student_request(request, options))

    def _check(self, request: Request, options: PairOptions) -> None:
        if request.sampling_params is None or request.mm_features or request.prompt_embeds is not None or request.resumable:
            raise ValueError("the paired engine serves text completion only (no pooling, images, embeddings, streaming input)")
        if request.sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not supported by the paired engine; it has logprobs of the completion")
        if options.student_prompt_token_ids is not None and not options.student_prompt_token_ids:
            raise ValueError("student_prompt_token_ids is empty; give the student at least one token")
        if options.teacher_only:
            return
        prompt = options.student_prompt_token_ids or request.prompt_token_ids
        vocab_size = self.student.vllm_config.model_config.get_vocab_size()
        if max(prompt) >= vocab_size:
            raise ValueError(f"the student's prompt has token id {max(prompt)}, and its vocabulary ends at {vocab_size - 1}")
        longest, limit = len(prompt) + request.max_tokens, self.student.max_model_len
        if longest > limit:
            raise ValueError(
                f"the student's prompt ({len(prompt)} tokens) plus max_tokens ({request.max_tokens}) is {longest}, over its "
                f"max_model_len {limit}"
            )

    def _student_request(self, request: Request, options: PairOptions) -> Request:
        """The student's half: its own prompt, and nothing that could make it stop or draw by itself."""
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
            block_hasher=request._block_hasher,
            lora_request=ADAPTER if self.student.lora_config else None,
        )

    def _add_student_eos(self, params: SamplingParams) -> None:
        """A completion ends at either model's end-of-sequence id."""
        extra = self.student_eos_ids - {params.eos_token_id, *(params.stop_token_ids or ())}
        if params.ignore_eos or not extra:
            return
        params.stop_token_ids = [*(params.stop_token_ids or ()), *sorted(extra)]
        params.all_stop_token_ids.update(extra)

    def _adopt_weights_version(self, version: int | None) -> None:
        """The student's weights are now those of ``version`` (None: as they were): its KV blocks are of others."""
        if version is not None and version != self.weights_version:
            self._reset_student_cache()
            self.weights_version = version

    def _reset_student_cache(self) -> None:
        """Forget every KV block of the student's, and only its: its weights are about to be others."""
        self._refuse_in_flight("the student's weights can change")
        if not self.student.reset_prefix_cache(reset_running_requests=bool(self.student.running)):
            raise RuntimeError("the student's prefix cache could not be reset after a weight sync: blocks are still in use")

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """Only the teacher's side decides that a request ends; the student's half goes with it, however it ended."""
        self.student.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
        return super()._free_request(request, *args, **kwargs)

    # -- what vLLM asks of a scheduler as a whole -------------------------------------------------------------------

    def has_requests(self) -> bool:
        # A step must run to answer refused requests, and to tell the worker which of the student's requests ended.
        return super().has_requests() or self.student.has_finished_requests() or bool(self._refused)

    def reset_prefix_cache(self, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> bool:
        if reset_running_requests:
            self._refuse_in_flight("running requests can be reset")
        teacher_reset = super().reset_prefix_cache(reset_running_requests, *args, **kwargs)
        return self.student.reset_prefix_cache(reset_running_requests, *args, **kwargs) and teacher_reset

    def _refuse_in_flight(self, what: str) -> None:
        """vLLM drops the token of a step in flight when it resets a request; the record already has it."""
        if any(request.num_in_flight_tokens for side in (self, self.student) for request in side.requests.values()):
            raise ValueError(f"{what} only while no step is in flight; wait for the running requests to finish first")

    def tell_again_who_ended(self, requests: Iterable[str], student_requests: Iterable[str]) -> None:
        """Of the requests that each side's runner still knows, those that have ended are named in the next step.

        A step that failed before a runner had read who ended is not sent again.
        """
        self.finished_req_ids |= set(requests) - self.requests.keys()
        self.student.finished_req_ids |= set(student_requests) - self.student.requests.keys()

    def set_pause_state(self, pause_state: Any) -> None:
        super().set_pause_state(pause_state)
        self.student.set_pause_state(pause_state)

    def shutdown(self) -> None:
        super().shutdown()
        self.student.shutdown()


class AsyncPairScheduler(PairScheduler, SteadyScheduler):
    """The pair with async scheduling, which derives the steps of steady decoding (see :mod:`osd.engine.steady`)."""

    _student_class = SteadyScheduler
    student: SteadyScheduler

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._last_ready: set[str] = set()

    def _apply_rewind_rule(self, output: SchedulerOutput, step: PairStep) -> None:
        if self.derived and self.student.derived and len(self._last_ready) == output.total_num_scheduled_tokens:
            step.ready = self._last_ready  # both sides moved on by one token from a step in which all rows were ready
        else:
            super()._apply_rewind_rule(output, step)
        self._last_ready = step.ready

    def _update_student(self, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
        if not self.student.append_tokens(output, tokens):
            super()._update_student(output, tokens)


def _position(scheduler: Scheduler, request_id: str) -> int:
    """How many tokens of its completion a request has computed, with those of the step being scheduled."""
    request = scheduler.requests[request_id]
    return request.num_computed_tokens - request.num_prompt_tokens


def _take_back(request: Request) -> None:
    """Undo the last token of a request's share in the step that was just scheduled; it is computed again in the next."""
    request.num_computed_tokens -= 1
    request.is_prefill_chunk = True  # nothing is sampled for it, as for an unfinished prefill
    if request.num_output_placeholders:
        request.num_output_placeholders -= 1  # async scheduling had made room for the sample


def _with_logits(scheduler: Scheduler, output: SchedulerOutput) -> set[str]:
    """Ids of the scheduled requests whose last known token is computed in this step, so that logits follow it."""
    return {i for i in output.num_scheduled_tokens if not scheduler.requests[i].is_prefill_chunk}


def _student_runner_output(tokens: dict[str, list[int]]) -> ModelRunnerOutput:
    ids: Iterable[str] = tokens
    return ModelRunnerOutput(
        req_ids=list(ids),
        req_id_to_index={request_id: i for i, request_id in enumerate(tokens)},
        sampled_token_ids=list(tokens.values()),
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def _take_failed_rows(output: ModelRunnerOutput) -> dict[str, str]:
    """Take the rows whose logits were not numbers out of a runner's output; return which side failed, by request id."""
    failed = {}
    for i, (request_id, tokens) in enumerate(zip(output.req_ids, output.sampled_token_ids, strict=True)):
        if tokens and tokens[0] < 0:
            failed[request_id] = FAILED_TOKEN[int(tokens[0])]
            output.sampled_token_ids[i] = []
    return failed


def _append(outputs: dict[int, EngineCoreOutputs], request: Request, reason: str) -> None:
    error = EngineCoreOutput(
        request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=f"osd: {reason}"
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(error)


def _eos_ids(config: VllmConfig) -> set[int]:
    """The end-of-sequence ids that a model declares: its generation config's, or else its config's."""
    declared = config.model_config.try_get_generation_config().get("eos_token_id")
    if declared is None:
        declared = getattr(config.model_config.hf_text_config, "eos_token_id", None)
    if declared is None:
        return set()
    return {declared} if isinstance(declared, int) else set(declared)
