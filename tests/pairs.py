"""Drive a pair step by step: what the engine's tests need beyond ``PairEngine.generate``."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from math import prod
from typing import Any

import torch

from osd.core import TokenRecord
from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.request import PairOptions
from osd.validate_models import student_layout
from tests.exact import completion_logits
from tests.tiny import tiny_engine_kwargs


def start(paths: Sequence[Any], config: dict[str, Any] | None = None, **engine_kwargs: Any) -> PairEngine:
    """Start a pair of two model folders; ``config`` are arguments of `PairConfig`, the rest update `tiny_engine_kwargs`."""
    config = dict(config or {})
    kwargs = tiny_engine_kwargs(**config.pop("engine_kwargs", {}), **engine_kwargs)
    teacher, student = map(str, paths)
    return PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs, **config))


def submit(engine: PairEngine, prompts: Sequence[PairPrompt], sampling: Any, options: Any) -> dict[str, str]:
    """Queue requests; ``sampling`` and ``options`` are one for all or one each. Return vLLM's internal id by request name."""
    params = engine._params(prompts, sampling, options)
    names = [f"test-{next(engine._request_number)}" for _ in prompts]
    return {
        name: engine._frontend.add(name, prompt.teacher_token_ids, param)
        for name, prompt, param in zip(names, prompts, params, strict=True)
    }


def step(engine: PairEngine) -> dict[str, Any]:
    """Run one step; return the completions that it finished, by request name."""
    return {output.request_id: output.outputs[0] for output in engine._frontend.engine.step() if output.finished}


def run(engine: PairEngine, names: dict[str, str]) -> list[tuple[Any, TokenRecord]]:
    """Run until nothing is left; return each request's completion and record, in order."""
    finished: dict[str, Any] = {}
    while engine._frontend.busy:
        finished |= step(engine)
    return collect(engine, names, finished)


def collect(engine: PairEngine, names: dict[str, str], finished: dict[str, Any]) -> list[tuple[Any, TokenRecord]]:
    """Pair finished completions with their records, which are taken from the engine."""
    records = engine._take_records()
    return [(finished[name], records[internal].of_tokens(len(finished[name].token_ids))) for name, internal in names.items()]


MAX_TOKENS = 40


def prompt_pairs(count: int) -> list[PairPrompt]:
    """Prompts of 1 to 40 tokens, different on each side."""
    rng = torch.Generator().manual_seed(5)

    def ids() -> list[int]:
        return torch.randint(7, 64, (int(torch.randint(1, 41, (1,), generator=rng)),), generator=rng).tolist()

    return [PairPrompt(teacher_token_ids=ids(), student_token_ids=ids()) for _ in range(count)]


def hard_prompts(count: int = 24) -> list[PairPrompt]:
    """Return up to 150 tokens a side, in blocks of 32; some share a prefix of two blocks on one side only."""
    rng = random.Random(7)
    shared = [rng.randrange(7, 64) for _ in range(64)]
    pairs = []
    for n in range(count):
        sides = [[rng.randrange(7, 64) for _ in range(rng.randint(1, 80))] for _ in range(2)]
        if n % 3 == 0:
            side = (n // 3) % 2
            sides[side] = shared + sides[side]
        pairs.append(PairPrompt(teacher_token_ids=sides[0], student_token_ids=sides[1]))
    return pairs


def cramped(teacher_tokens: int, student_tokens: int, blocks: int = 13) -> dict[str, Any]:
    """Return a configuration whose sides split their prefills differently and hold about two of `hard_prompts` at once."""
    return dict(
        engine_kwargs=dict(max_num_seqs=8, num_gpu_blocks_override=blocks),
        teacher_kwargs={"max_num_batched_tokens": teacher_tokens},
        student_kwargs={"max_num_batched_tokens": student_tokens},
    )


def run_with_random_arrivals(
    engine: PairEngine, schedule: int, mix_tokens: int | None = None, count: int = 24, topk: int = 0, **sampling: Any
) -> dict[int, tuple[Any, TokenRecord]]:
    """Submit `hard_prompts` in random order and at random times; return each one's completion and record, by its index."""
    rng, prompts = random.Random(schedule), hard_prompts(count)
    order, options = rng.sample(range(count), count), PairOptions(record=True, mix_tokens=mix_tokens, topk=topk)
    pending, names, finished = list(order), {}, {}
    while pending or engine._frontend.busy:
        for _ in range(min(rng.randint(0, 3), len(pending))):
            names |= submit(engine, [prompts[pending.pop(0)]], dict(max_tokens=MAX_TOKENS) | sampling, options)
        for _ in range(rng.randint(1, 10)):
            finished |= step(engine)
    return dict(zip(order, collect(engine, names, finished), strict=True))


def preempted(seen: Counter) -> bool:
    """Return whether `watch` saw a preemption on both sides."""
    return bool(seen["teacher preempted"] and seen["student preempted"])


def runners(engine: PairEngine) -> dict[str, Any]:
    """Return vLLM's model runner of each side."""
    worker = engine._frontend.worker
    return {"teacher": worker.model_runner, "student": worker.student_runner}


def watch(engine: PairEngine, monkeypatch: Any) -> Counter:
    """Count preemptions, prefix hits, requests that wait and reorderings of either side from here on."""
    seen: Counter = Counter()
    scheduler = engine._frontend.scheduler
    schedule = scheduler.schedule

    def scheduled(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for event in _events(scheduler, output):
            seen[event] += 1
        return output

    monkeypatch.setattr(scheduler, "schedule", scheduled)
    return seen


def _events(scheduler: Any, output: Any) -> Iterator[str]:
    step = output.osd
    for name, side, of_side in (("teacher", scheduler, output), ("student", scheduler.student, step.student_output)):
        yield from [f"{name} preempted"] * len(of_side.preempted_req_ids or ())
        for request_id in of_side.num_scheduled_tokens.keys() - step.ready:
            request = side.requests[request_id]
            # Taken back to its last known token but one, or still inside its prompt.
            if request.num_computed_tokens == request.num_tokens + request.num_output_placeholders - 1:
                yield f"{name} ahead in {'decoding' if request.num_output_tokens else 'prefill'}"
        for new in of_side.scheduled_new_reqs:
            if new.num_computed_tokens:
                yield f"{name} hits"
    if step.ready and list(output.num_scheduled_tokens) != list(step.student_output.num_scheduled_tokens):
        yield "rows in another order"


def errors(models: Any, results: dict[int, tuple[Any, Any]], prompts: Any = None, of: Any = torch.amax) -> dict[str, float]:
    """Return the largest difference of recorded log-probabilities from transformers' by column; ``of``: of each completion."""
    prompts, worst = prompts or hard_prompts(), {"logp_teacher": 0.0, "logp_theta": 0.0}
    for i, (output, record) in results.items():
        token = torch.tensor(output.token_ids)[:, None]
        sides = prompts[i].teacher_token_ids, prompts[i].student_token_ids
        for model, prompt, name in zip(models, sides, worst, strict=True):
            expected = completion_logits(model, prompt, output.token_ids).log_softmax(-1).gather(-1, token)[:, 0]
            worst[name] = max(worst[name], of((getattr(record, name).double() - expected).abs()).item())
    return worst


def on_disk(engine: PairEngine, model: torch.nn.Module) -> Any:
    """Yield a model's parameters as they are in its checkpoint, as the trainer does."""
    layout = student_layout(engine.config)
    return (stored for name, p in model.named_parameters() for stored in layout.as_on_disk(name, p.detach()).items())


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model with every parameter changed."""
    torch.manual_seed(0)
    copy = deepcopy(model)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return copy


def planned(spec: Any) -> tuple[int, int | None]:
    """Return the bytes of a layer's cache, per token or of a state, and its window."""
    if hasattr(spec, "shapes"):
        return sum(prod(shape) * dtype.itemsize for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)), None
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return spec.page_size_bytes // spec.block_size, window


def compare_caches(engine: PairEngine) -> None:
    """Compare the caches that `osd check` counts with those of the running models."""
    from osd.engine.backend.layers import model_facts

    for side, runner in runners(engine).items():
        layers = model_facts(engine.config, side, gpus=1).layers
        assert sorted((layer.size, layer.tokens or 0) for layer in layers or ()) == sorted(
            (size, window or 0) for size, window in map(planned, runner.get_kv_cache_spec().values())
        )
