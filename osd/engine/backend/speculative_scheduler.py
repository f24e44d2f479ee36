"""SpeculativeScheduler: a pair whose student drafts several tokens, which the teacher verifies in one pass.

Both schedulers plan a request's next token and its drafts as vLLM plans speculative decoding: a scheduled draft counts as
computed, and the result of the step subtracts those that were rejected. Both sides always have the same number of drafts of a
request, so they stay in step whatever is rejected.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from osd.engine.backend.configuration import chooses_drafts, most_drafts
from osd.engine.backend.scheduler import PairScheduler, PairStep
from osd.engine.draft_choice import DraftChooser
from osd.engine.request import PairOptions


class SpeculativeScheduler(PairScheduler):
    """`PairScheduler` with drafts.

    Attributes:
        drafts: how many a request gets in its next step, at most.
        chooser: chooses how many, or None.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drafts = self.student.drafts = most_drafts(self.vllm_config)
        self.chooser = DraftChooser(self.drafts) if chooses_drafts(self.vllm_config) else None
        self._step_ended: float | None = None
        self._placeholders = [-1] * self.drafts
        self._without: set[str] = set()  # requests that get no drafts
        self._known_processors = not self.vllm_config.model_config.logits_processors

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        if request.request_id in self.requests and not (self._known_processors and can_draft(request.sampling_params)):
            self._without.add(request.request_id)
        # How far a request has come is known to the device alone while its drafts are verified.
        self._mix_limits.pop(request.request_id, None)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._without.discard(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def _pair_up(self, output: SchedulerOutput, step: PairStep, finishing: set[str]) -> None:
        self._level_drafts(output, step.student_output)
        super()._pair_up(output, step, finishing)
        drafts = self.drafts if self.chooser is None else self.chooser.choose(len(step.ready))
        for request_id in step.ready - self._without:
            for side in (self, self.student):
                request = side.requests[request_id]
                request.spec_token_ids = self._placeholders[:drafts]

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self.chooser is not None:
            self._observe(self.chooser, scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if not self.requests:
            self._step_ended = None  # the wait for the next request is not part of a step
        return outputs

    def _observe(self, chooser: DraftChooser, output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> None:
        """Let the chooser know of a step in which every request decoded, with the same number of drafts."""
        began, self._step_ended = self._step_ended, monotonic()
        scheduled, drafts = output.num_scheduled_tokens, output.scheduled_spec_decode_tokens
        kinds = {(count, len(drafts.get(i, ()))) for i, count in scheduled.items()}
        if began is None or len(kinds) != 1:
            return
        [(count, drafted)] = kinds
        tokens = [len(ids) for ids in model_runner_output.sampled_token_ids]
        if count == drafted + 1 and all(tokens):
            chooser.observe(drafted, self._step_ended - began, tokens)

    def _level_drafts(self, output: SchedulerOutput, student_output: SchedulerOutput) -> None:
        """Give both sides of a request as many drafts as the side with fewer has; none if one side does not sample it.

        The numbers differ where a side's step is full, its context ends, or it is still in its prompt.
        """
        sides = ((self, output), (self.student, student_output))
        for request_id in {i for _, of_side in sides for i in of_side.scheduled_spec_decode_tokens}:
            count = min(len(of_side.scheduled_spec_decode_tokens.get(request_id, ())) for _, of_side in sides)
            for side, of_side in sides:
                if request_id in of_side.num_scheduled_tokens:
                    _drop_drafts(side, of_side, request_id, count)

    def make_spec_decoding_stats(self, spec_decoding_stats: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM would count the drafts of its own draft models, of which there are none.
        return super().make_spec_decoding_stats(spec_decoding_stats or SpecDecodingStats.new(self.drafts), *args, **kwargs)


def can_draft(params: SamplingParams) -> bool:
    """Return whether a request can have drafts: whatever acts on q* can act at every position of a cycle.

    vLLM's sampling parameters do. A grammar cannot: it must read the drafts on the host.
    """
    return params.structured_outputs is None and not PairOptions.of(params).teacher_only


def _drop_drafts(scheduler: Scheduler, output: SchedulerOutput, request_id: str, count: int) -> None:
    """Leave a request ``count`` drafts in the step that was just scheduled."""
    drafts = output.scheduled_spec_decode_tokens
    dropped = len(drafts.get(request_id, ())) - count
    if not dropped:
        return
    request = scheduler.requests[request_id]
    drafts[request_id] = drafts[request_id][:count]
    if not count:
        del drafts[request_id]
    output.num_scheduled_tokens[request_id] -= dropped
    output.total_num_scheduled_tokens -= dropped
    request.num_computed_tokens -= dropped
    request.num_in_flight_tokens -= dropped
    request.num_output_placeholders -= dropped
