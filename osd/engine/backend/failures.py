"""Failed rows (NaN logits, or no token left to draw): taken from the worker's output and answered with an error."""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from osd.engine.mixture import NO_TOKEN

# Values of `num_nans_in_logits` that the pair's sampler reports, and what they mean.
FAILURES = {
    1: "NaN in the student's logits",
    2: "NaN in the teacher's logits",
    3: "NaN in the student and teacher's logits",
    NO_TOKEN: "the sampling parameters leave no token that can be drawn",
}


def take_failed_rows(output: ModelRunnerOutput) -> dict[str, str]:
    """Drop the last token of each failed row, the one at which it failed; return the reasons by request id."""
    sides, output.num_nans_in_logits = output.num_nans_in_logits or {}, None
    if not any(sides.values()):
        return {}
    failed = {}
    for i, (request_id, tokens) in enumerate(zip(output.req_ids, output.sampled_token_ids, strict=True)):
        if tokens and sides.get(request_id):
            failed[request_id] = FAILURES[int(sides[request_id])]
            output.sampled_token_ids[i] = tokens[:-1]
    return failed


def append_error(outputs: dict[int, EngineCoreOutputs], request: Request, reason: str) -> None:
    """Add an error, as the answer to a request, to the outputs of a step (a mapping by client)."""
    error = EngineCoreOutput(
        request_id=request.request_id, new_token_ids=[], finish_reason=FinishReason.ERROR, stop_reason=f"osd: {reason}"
    )
    outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[])).outputs.append(error)
