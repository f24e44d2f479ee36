"""The rule that keeps both sides in step, without a model: two real schedulers, random prompts, budgets and cache sizes.

The simulation plays the workers: it "samples" a token for every row that the step says is ready, and checks, row by row,
what a worker would have computed: both sides end this step's computation at the same output position.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import FinishReason
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from osd.engine.backend.configuration import StudentCache, student_vllm_config
from osd.engine.backend.scheduler import PairScheduler
from osd.engine.backend.speculative_scheduler import SpeculativeScheduler
from osd.engine.config import PairConfig
from osd.engine.request import PairOptions
from tests.tiny import tiny_engine_kwargs

BLOCK = 4
HASH_FN = get_hash_fn_by_name("sha256")
LONG = {"max_position_embeddings": 32768}
init_none_hash(HASH_FN)  # once: it may be random, and prefixes match only under the same one


@pytest.fixture(params=[(False, 0), (True, 0), (False, 3), (True, 3)], ids=["sync", "async", "sync drafts", "async drafts"])
def pair(tiny_pair, request) -> tuple[str, str, bool, int]:
    """Teacher, student, whether scheduling is async, and the number of drafts."""
    return (*map(str, tiny_pair), *request.param)


def make_scheduler(
    pair, *, blocks: int, budget: int, student_budget: int, max_num_seqs: int = 8, window: int | None = None
) -> PairScheduler:
    """Return a scheduler of a pair; each side has a layer of full attention and, with ``window``, one of a sliding window."""
    teacher, student, asynchronous, drafts = pair
    config = PairConfig(
        teacher=teacher,
        student=student,
        engine_kwargs=tiny_engine_kwargs(
            block_size=BLOCK, max_num_seqs=max_num_seqs, max_model_len=64, async_scheduling=asynchronous
        ),
        teacher_kwargs={"max_num_batched_tokens": budget},
        student_kwargs={"max_num_batched_tokens": student_budget},
        num_speculative_tokens=drafts,
    )
    vllm_config = EngineArgs(**config.teacher_engine_args()).create_engine_config()
    vllm_config.cache_config.num_gpu_blocks = blocks
    manager = StructuredOutputManager(vllm_config)
    with set_current_vllm_config(vllm_config):
        scheduler_class = SpeculativeScheduler if drafts else PairScheduler
        cache = kv_cache(vllm_config, blocks, window)
        return scheduler_class(vllm_config, cache, manager, block_size=BLOCK, hash_block_size=BLOCK)


def kv_cache(vllm_config: VllmConfig, blocks: int, window: int | None) -> KVCacheConfig:
    """Return the KV cache of a teacher, which carries that of a student."""
    student = student_vllm_config(vllm_config).cache_config
    student.kv_cache_layout = "LBNHC"
    sides = []
    for num_kv_heads in (1, 2):
        shape = dict(block_size=BLOCK, num_kv_heads=num_kv_heads, head_size=8, dtype=torch.float32)
        sides.append({"full": FullAttentionSpec(**shape)})
        if window is not None:
            sides[-1]["window"] = SlidingWindowSpec(**shape, sliding_window=window)
    teacher = StudentCache(sides[0], student).carried_by(sides[1])
    groups = [KVCacheGroupSpec(layer_names=[name], kv_cache_spec=spec) for name, spec in teacher.items()]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize(
    ("shared", "own", "limits"),
    [
        ({}, {}, (1024, 16384)),
        ({"max_num_seqs": None, "max_num_batched_tokens": None}, {"max_num_batched_tokens": None}, (1024, 16384)),
        ({"max_num_seqs": 32}, {}, (32, 8192)),  # as long as 32 sequences can be
        ({}, {"max_num_batched_tokens": 512}, (512, 512)),
        ({"max_num_seqs": 32}, {"max_num_batched_tokens": 512}, (32, 512)),
        ({}, {"enable_chunked_prefill": False, "max_model_len": 20000, "hf_overrides": LONG}, (1024, 20000)),
        ({}, {"enable_chunked_prefill": False}, (1024, 16384)),  # each of its prompts is shorter
        ({"max_num_seqs": 4096}, {"enable_chunked_prefill": False}, (4096, 16384)),
    ],
)
def test_a_step_admits_as_much_of_the_student_as_of_the_teacher(tiny_pair, monkeypatch, shared, own, limits):
    """vLLM's defaults depend on the caller; these are its defaults for `LLM` on an H100."""
    of_llm = {UsageContext.LLM_CLASS: 16384}, {UsageContext.LLM_CLASS: 1024}
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", classmethod(lambda cls, world_size: of_llm))
    kwargs = {name: value for name, value in tiny_engine_kwargs().items() if name != "max_num_seqs"}
    teacher, student = map(str, tiny_pair)
    config = PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs | shared, student_kwargs=own)
    vllm_config = EngineArgs(**config.teacher_engine_args()).create_engine_config(UsageContext.LLM_CLASS)
    scheduler = student_vllm_config(vllm_config).scheduler_config
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == limits
    alone = EngineArgs(**kwargs, model=student).create_engine_config().scheduler_config
    assert (alone.max_num_seqs, alone.max_num_batched_tokens) == (128, 2048)


def request(name: str, prompt: list[int], student_prompt: list[int], max_tokens: int, **options) -> Request:
    extra = PairOptions(student_prompt_token_ids=student_prompt, **options).to_extra_args()
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=extra)
    hasher = get_request_block_hasher(BLOCK, HASH_FN)
    return Request(name, prompt, params, None, block_hasher=hasher)


class Workers:
    """Plays both workers; keeps each request's output and counts what happened on either side.

    With async scheduling a step is scheduled before the tokens of the one before it are known, as vLLM's engine core does.
    """

    def __init__(self, scheduler: PairScheduler, vocabulary: int = 50) -> None:
        self.scheduler = scheduler
        self.depth = 2 if scheduler.scheduler_config.async_scheduling else 1
        self.in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.scheduled: list[SchedulerOutput] = []
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, object] = {}
        self.seen = Counter()
        self.computed: dict[tuple[Any, str], int] = {}
        self.rng = random.Random(0)
        self.vocabulary = vocabulary

    def step(self) -> None:
        if self.scheduler.has_requests():
            self.scheduled.append(self.scheduler.schedule())
            self.in_flight.appendleft(self.execute(self.scheduled[-1]))
        if (len(self.in_flight) == self.depth or not self.scheduler.has_requests()) and self.in_flight:
            self.deliver(*self.in_flight.pop())

    def execute(self, output: SchedulerOutput) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        self.check_positions(output, output.osd)
        ids = list(output.num_scheduled_tokens)
        runner_output = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={i: n for n, i in enumerate(ids)},
            sampled_token_ids=[self.sample(output, i) for i in ids],
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        return output, runner_output

    def sample(self, output: SchedulerOutput, i: str) -> list[int]:
        """Return one token of a ready request, and as many as its drafts allow."""
        if i not in output.osd.ready:
            return []
        drafts = len(output.scheduled_spec_decode_tokens.get(i, ()))
        self.seen["drafts"] += drafts
        return [self.rng.randrange(self.vocabulary) for _ in range(1 + self.rng.randint(0, drafts))]

    def deliver(self, output: SchedulerOutput, runner_output: ModelRunnerOutput) -> None:
        for i, tokens in zip(runner_output.req_ids, runner_output.sampled_token_ids, strict=True):
            if (request := self.scheduler.requests.get(i)) is not None:  # else it ended while this step was in flight
                left = request.max_tokens - request.num_output_tokens
                self.outputs.setdefault(i, []).extend(tokens[:left])
                rejected = len(output.scheduled_spec_decode_tokens.get(i, ())) + 1 - len(tokens) if tokens else 0
                for side in (self.scheduler, self.scheduler.student):
                    if (side, i) in self.computed:
                        self.computed[side, i] -= rejected
        for client in self.scheduler.update_from_output(output, runner_output).values():
            for done in client.outputs:
                if done.finish_reason is not None:
                    self.finished[done.request_id] = done

    def check_positions(self, output, step) -> None:
        teacher, student = self.scheduler, self.scheduler.student
        for i in step.ready:
            t, s = teacher.requests[i], student.requests.get(i)
            assert t.num_computed_tokens == known_tokens(t), "a sampled row must end at its last known token"
            if s is not None:
                assert i in step.student_output.num_scheduled_tokens
                assert s.num_computed_tokens == known_tokens(s)
                drafts = [of_side.scheduled_spec_decode_tokens.get(i) for of_side in (output, step.student_output)]
                assert drafts[0] == drafts[1]
                assert t.num_computed_tokens - t.num_prompt_tokens == s.num_computed_tokens - s.num_prompt_tokens
                assert list(t.output_token_ids) == list(s.output_token_ids) == self.outputs.get(i, [])
        for side, scheduled in ((teacher, output), (student, step.student_output)):
            self.check_that_nothing_is_computed_twice(side, scheduled)
            for i in set(scheduled.num_scheduled_tokens) - step.ready:
                request = side.requests[i]
                assert request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
                self.seen["waited"] += 1
        self.seen["preempted teacher"] += len(output.preempted_req_ids or ())
        self.seen["preempted student"] += len(step.student_output.preempted_req_ids or ())
        for side, scheduled in (("teacher", output), ("student", step.student_output)):
            self.seen[f"hits {side}"] += sum(r.num_computed_tokens > 0 for r in scheduled.scheduled_new_reqs)

    def check_that_nothing_is_computed_twice(self, side: Any, scheduled: SchedulerOutput) -> None:
        for new in scheduled.scheduled_new_reqs:  # or resumed
            self.computed[side, new.req_id] = new.num_computed_tokens
        cached = scheduled.scheduled_cached_reqs
        for i, start in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            assert start == self.computed[side, i]
        for i, count in scheduled.num_scheduled_tokens.items():
            self.computed[side, i] += count

    def run(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps: {self.scheduler.requests}")


class SickWorkers(Workers):
    """Workers with a KV cache, in which some requests write NaN.

    A row fails if it meets NaN in a block that it reads, also in slots that are masked: attention multiplies those by 0. What a
    row that fails writes is NaN.

    Args:
        sick: by request, the side (0: teacher, 1: student) and the first position of its NaN.
    """

    def __init__(self, scheduler: PairScheduler, sick: dict[str, tuple[int, int]]) -> None:
        super().__init__(scheduler)
        self.sick = sick
        self.tables: dict[tuple[int, str], list[list[int]]] = {}  # by side and request: the blocks of each group
        self.nan: dict[tuple[int, int], set[int]] = {}  # slots by side and block
        self.harmed: set[str] = set()

    def execute(self, output: SchedulerOutput) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        failed = self.compute(0, output) | self.compute(1, output.osd.student_output)
        self.harmed |= failed - self.sick.keys()
        output, runner_output = super().execute(output)
        runner_output.num_nans_in_logits = dict.fromkeys(failed, 2)
        return output, runner_output

    def compute(self, side: int, output: SchedulerOutput) -> set[str]:
        """Write the tokens of a step into the cache of one side; return the requests that meet NaN."""
        start = {}
        scheduler = self.scheduler.student if side else self.scheduler
        windows = [getattr(group.kv_cache_spec, "sliding_window", None) for group in scheduler.kv_cache_config.kv_cache_groups]
        for new in output.scheduled_new_reqs:
            self.tables[side, new.req_id], start[new.req_id] = [list(ids) for ids in new.block_ids], new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for i, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            for table, more in zip(self.tables[side, i], blocks or (), strict=bool(blocks)):
                table += more
            start[i] = computed
        for block in output.new_block_ids_to_zero or ():
            self.nan.pop((side, block), None)
        failed = set()
        for i, count in output.num_scheduled_tokens.items():
            written = range(start[i], start[i] + count)
            sick_side, position = self.sick.get(i, (None, 0))
            nan = written[max(position - start[i], 0) :] if sick_side == side else range(0)
            read = set()
            for table, window in zip(self.tables[side, i], windows, strict=True):
                self.write(side, table, written, nan)
                first = 0 if window is None else max(written.start - window + 1, 0)
                read.update(table[first // BLOCK : -(-written.stop // BLOCK)])
            if any(self.nan.get((side, block)) for block in read):
                failed.add(i)
                for table in self.tables[side, i]:
                    self.write(side, table, written, written)
        return failed

    def write(self, side: int, table: list[int], written: range, nan: range) -> None:
        for position in written:
            slots = self.nan.setdefault((side, table[position // BLOCK]), set())
            (slots.add if position in nan else slots.discard)(position % BLOCK)


def known_tokens(request: Request) -> int:
    """Tokens of a scheduled request that the device knows: not the one that this step samples."""
    return request.num_tokens + max(request.num_output_placeholders - 1, 0)


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Prompts of both sides from 1 to 40 tokens; half of them share a prefix on one side only."""
    shared = [rng.randrange(50) for _ in range(24)]
    requests = []
    for n in range(count):
        prompts = [[rng.randrange(50) for _ in range(rng.randint(1, 40))] for _ in range(2)]
        if rng.random() < 0.5:
            side = rng.randrange(2)
            prompts[side] = shared + prompts[side][:8]
        requests.append(request(f"r{n}", *prompts, max_tokens=rng.randint(1, 20)))
    return requests


@pytest.mark.parametrize("seed", range(12))
def test_every_request_finishes_in_step_under_random_schedules(pair, seed):
    rng = random.Random(seed)
    # 17 blocks of 4 hold one longest sequence (32 + 8 + 20 tokens), so preemption on either side is the rule.
    scheduler = make_scheduler(
        pair, blocks=rng.choice([18, 24, 60]), budget=rng.choice([8, 9, 64]), student_budget=rng.choice([8, 11, 64])
    )
    workers = Workers(scheduler)
    requests = random_requests(rng, 14)
    wanted = {r.request_id: r.max_tokens for r in requests}
    while requests:  # they arrive while others run
        for _ in range(rng.randint(1, 4)):
            if requests:
                scheduler.add_request(requests.pop(0))
        for _ in range(rng.randint(0, 6)):
            if scheduler.has_requests():
                workers.step()
    workers.run()
    assert {i: len(tokens) for i, tokens in workers.outputs.items()} == wanted
    assert set(workers.finished) == set(wanted)
    assert not scheduler.requests
    assert not scheduler.student.requests
    assert workers.seen["waited"] > 0


def test_random_schedules_cover_the_cases_of_the_rule(pair):
    """Chunked prefill, preemption and prefix hits on one side only must all occur, or the test above proves nothing."""
    seen = Counter()
    for seed in range(6):
        rng = random.Random(seed)
        scheduler = make_scheduler(pair, blocks=18, budget=9, student_budget=11)
        workers = Workers(scheduler)
        for r in random_requests(rng, 14):
            scheduler.add_request(r)
        workers.run()
        seen += workers.seen
    assert min(seen[k] for k in ("waited", "preempted teacher", "preempted student", "hits teacher", "hits student")) > 0, seen
    assert (seen["drafts"] > 0) == (pair[3] > 0)


def harmed_by_others(pair, seed: int, window: int | None) -> set[str]:
    """Return the requests that met NaN of another request, whose prompts have nothing in common with theirs."""
    rng = random.Random(seed)
    budgets = dict(budget=rng.choice([9, 64]), student_budget=rng.choice([11, 64]))
    scheduler = make_scheduler(pair, blocks=18 if window is None else 34, window=window, **budgets)
    requests, sick = [], {}
    for n in range(14):
        prompts = [[n, *(rng.randrange(50) for _ in range(rng.randint(0, 39)))] for _ in range(2)]
        requests.append(request(f"r{n}", *prompts, max_tokens=rng.randint(1, 20)))
        if rng.random() < 0.4:
            side = rng.randrange(2)
            sick[f"r{n}"] = side, rng.randint(0, len(prompts[side]) + 5)
    workers = SickWorkers(scheduler, sick)
    while requests or workers.in_flight or scheduler.has_requests():
        if requests and rng.random() < 0.5:
            scheduler.add_request(requests.pop(0))
        if rng.random() < 0.05 and scheduler.requests:
            scheduler.finish_requests(rng.choice(list(scheduler.requests)), RequestStatus.FINISHED_ABORTED)
        workers.step()
    assert any(done.finish_reason == FinishReason.ERROR for done in workers.finished.values())
    return workers.harmed


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("seed", range(6))
def test_nan_of_a_request_never_reaches_another(pair, seed, window):
    """Regression: blocks were used again as they were if their request was preempted or aborted while its step ran, or if they
    left through the window between two chunks of a prompt.
    """
    assert not harmed_by_others(pair, seed, window)


@pytest.mark.parametrize("window", [None, 8])
def test_nan_in_blocks_that_are_not_zeroed_is_seen(pair, monkeypatch, window):
    """The planted error: vLLM's own choice, which is to zero no blocks of these models."""
    monkeypatch.setattr("osd.engine.backend.side_scheduler.zeroed_blocks", nullcontext)
    assert any(harmed_by_others(pair, seed, window) for seed in range(6))


@pytest.mark.parametrize("pair", [(True, 3)], ids=["async drafts"], indirect=True)
def test_sides_with_different_numbers_of_drafts_are_seen(pair, monkeypatch):
    """The planted error: each side keeps the drafts that its own step has room for."""
    monkeypatch.setattr(SpeculativeScheduler, "_level_drafts", lambda self, output, student_output: None)
    workers = Workers(make_scheduler(pair, blocks=24, budget=64, student_budget=11))
    for r in random_requests(random.Random(1), 14):
        workers.scheduler.add_request(r)
    with pytest.raises(AssertionError):
        workers.run()


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_side_that_does_not_wait_falls_out_of_step(pair, monkeypatch, side):
    """The planted error: one side computes its newest token whenever it can, and its row counts as sampled."""
    if side == "teacher":
        monkeypatch.setattr(PairScheduler, "_teacher_may_finish", lambda self, finishing: set(self.requests))
    else:
        monkeypatch.setattr(PairScheduler, "_within_reach", lambda self: set(self.requests))
        monkeypatch.setattr("osd.engine.backend.side_scheduler.SideScheduler.preempt", lambda side, request: None)
    scheduler = make_scheduler(pair, blocks=24, budget=64 if side == "teacher" else 8, student_budget=12)
    workers = Workers(scheduler)
    for r in random_requests(random.Random(0), 6):
        scheduler.add_request(r)
    with pytest.raises(AssertionError):
        workers.run()


def test_prompts_cached_but_for_one_token_and_prompts_of_one_token(pair):
    """Neither may be admitted with its newest token held back, since nothing else is left of it."""
    cached, one = list(range(4 * BLOCK + 1)), [7]
    for prompts in ((cached, one), (one, cached), (cached, cached), (one, one)):
        scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=64)
        for n in range(3):
            workers = Workers(scheduler)
            scheduler.add_request(request(f"r{n}", *prompts, max_tokens=4))
            workers.run(limit=30)
            assert len(workers.outputs[f"r{n}"]) == 4


@pytest.mark.parametrize("makes_way", [True, False])
def test_requests_admitted_out_of_turn_do_not_block_each_other(pair, monkeypatch, makes_way):
    """The teacher's cache is full of one request, the student's of another: each waits for the other's half."""
    if not makes_way:
        monkeypatch.setattr(PairScheduler, "_make_way", lambda self: None)
    scheduler = make_scheduler(pair, blocks=17, budget=64, student_budget=64)
    workers = Workers(scheduler)
    prompts = [list(range(n, n + 40)) for n in range(4)]
    scheduler.add_request(request("first", *prompts[:2], max_tokens=6))
    scheduler.requests["first"].status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    scheduler.add_request(request("second", *prompts[2:], max_tokens=6))
    workers.step()
    assert [[r.request_id for r in side.running] for side in (scheduler, scheduler.student)] == [["second"], ["first"]]
    scheduler.requests["first"].status = RequestStatus.WAITING
    if makes_way:
        workers.run(limit=60)
        assert {i: len(tokens) for i, tokens in workers.outputs.items()} == {"first": 6, "second": 6}
    else:
        with pytest.raises(AssertionError, match="not finished"):
            workers.run(limit=60)


def test_aborting_in_mid_flight_frees_both_sides(pair):
    scheduler = make_scheduler(pair, blocks=60, budget=16, student_budget=8)
    workers = Workers(scheduler)
    rng = random.Random(3)
    requests = random_requests(rng, 10)
    for r in requests:
        scheduler.add_request(r)
    while scheduler.requests:
        workers.step()
        if scheduler.requests and rng.random() < 0.3:
            victim = rng.choice(list(scheduler.requests))
            scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
            assert victim not in scheduler.student.requests
    workers.run()
    for side in (scheduler, scheduler.student):
        assert not side.requests
        assert not side.running
        assert side.kv_cache_manager.usage == 0


def test_one_bad_request_is_answered_and_the_others_go_on(pair):
    scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=64)
    workers = Workers(scheduler)
    scheduler.add_request(request("good", [1, 2, 3], [4, 5], 5))
    scheduler.add_request(request("long", [1, 2, 3], [4] * 120, 20))
    scheduler.add_request(request("empty", [1, 2, 3], [], 5))
    workers.run()
    assert len(workers.outputs["good"]) == 5
    assert workers.finished["long"].finish_reason == FinishReason.ERROR
    assert "student's prompt has 120 tokens" in workers.finished["long"].stop_reason
    assert "empty" in workers.finished["empty"].stop_reason


def test_a_teacher_only_request_never_reaches_the_student(pair):
    scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=64)
    workers = Workers(scheduler)
    scheduler.add_request(request("solo", [1, 2, 3], [4, 5], 5, teacher_only=True))
    assert "solo" not in scheduler.student.requests
    workers.run()
    assert len(workers.outputs["solo"]) == 5


def test_new_weights_reset_only_the_students_prefix_cache(pair):
    scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=64)
    prompt, student_prompt = list(range(20)), list(range(20, 40))
    hits = []
    for n, version in enumerate([0, 0, 1, 1]):
        workers = Workers(scheduler)
        scheduler.add_request(request(f"v{n}", prompt, student_prompt, 2, weights_version=version))
        workers.run()
        hits.append((workers.seen["hits teacher"], workers.seen["hits student"]))
    assert hits == [(0, 0), (1, 1), (1, 0), (1, 1)]


def test_weights_change_only_while_no_step_is_in_flight(pair):
    scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=64)
    workers = Workers(scheduler)
    scheduler.add_request(request("old", [1, 2, 3], [4, 5], 9))
    for _ in range(3):
        workers.step()
    scheduler.add_request(request("new", [1, 2, 3], [4, 5], 9, weights_version=1))
    workers.run()
    assert len(workers.outputs["old"]) == 9
    if workers.depth == 1:
        assert len(workers.outputs["new"]) == 9
    else:
        assert "only while no step is in flight" in workers.finished["new"].stop_reason


def test_after_a_pause_that_keeps_requests_the_student_alone_computes_them_anew(pair):
    """Also if one of them is aborted meanwhile, of which a step without tokens tells the workers."""
    scheduler = make_scheduler(pair, blocks=60, budget=64, student_budget=32)
    workers = Workers(scheduler)
    for n in range(4):
        scheduler.add_request(request(f"r{n}", list(range(20)), list(range(20, 30 + n)), 24))
    while len(workers.outputs.get("r3", [])) < 3:
        workers.step()
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    while workers.in_flight:
        workers.step()
    scheduler.finish_requests("r1", RequestStatus.FINISHED_ABORTED)
    workers.run()
    before, drawn = scheduler.student.resets, {i: len(tokens) for i, tokens in workers.outputs.items()}
    assert [r.request_id for r in scheduler.running] == ["r0", "r2", "r3"]
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.student.resets == before + 1
    assert [r.num_computed_tokens for r in scheduler.student.waiting] == [0, 0, 0]
    workers.run()
    assert workers.seen["preempted student"] == 3
    assert workers.seen["preempted teacher"] == 0
    assert [len(workers.outputs[i]) for i in ("r0", "r1", "r2", "r3")] == [24, drawn["r1"], 24, 24]


STATE = ["num_computed_tokens", "num_output_placeholders", "num_in_flight_tokens", "num_stale_output_tokens", "num_tokens"]
STATE += ["num_preemptions", "status", "is_prefill_chunk"]


def state(side: Any) -> dict:
    """Return everything of one side's requests and caches that scheduling reads."""
    requests = {i: [getattr(r, name) for name in STATE] + [list(r.all_token_ids)] for i, r in side.requests.items()}
    pool = side.kv_cache_manager.block_pool
    blocks = {block.block_id: (block.ref_cnt, block.block_hash) for block in pool.blocks}
    return {"requests": requests, "running": [r.request_id for r in side.running], "blocks": blocks}


def check_students_update(pair, seed: int) -> None:
    """Run two pairs side by side, one of which updates its student by the stock ``update_from_output``."""
    rng = random.Random(seed)
    shape = dict(blocks=rng.choice([18, 24, 60]), budget=rng.choice([9, 64]), student_budget=rng.choice([11, 64]))
    ours, stock = (make_scheduler(pair, **shape) for _ in range(2))
    stock._update_student = lambda output, tokens: stock_update(stock.student, output, tokens)
    workers = [Workers(scheduler) for scheduler in (ours, stock)]
    requests = [random_requests(random.Random(seed), 14) for _ in workers]
    seen: Counter = Counter()
    while requests[0] or workers[0].in_flight or ours.has_requests():
        if requests[0] and rng.random() < 0.3:
            for scheduler, waiting in zip((ours, stock), requests, strict=True):
                scheduler.add_request(waiting.pop(0))
        if rng.random() < 0.03 and ours.requests:
            victim = rng.choice(list(ours.requests))
            for scheduler in (ours, stock):
                scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
        for worker in workers:
            worker.step()
        assert state(ours.student) == state(stock.student)
        seen["placeholders"] += any(r.num_output_placeholders for r in ours.student.requests.values())
        seen["stale"] += any(r.num_stale_output_tokens for r in ours.student.requests.values())
        seen["cached"] += any(block.block_hash for block in ours.student.kv_cache_manager.block_pool.blocks)
    assert workers[0].outputs == workers[1].outputs
    assert seen["cached"]
    if workers[0].depth == 2:
        assert seen["placeholders"]


def stock_update(student: Any, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
    ids = list(output.num_scheduled_tokens)
    runner_output = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={i: n for n, i in enumerate(ids)},
        sampled_token_ids=[list(tokens.get(i, [])) for i in ids],
        prompt_logprobs_dict={},
        pooler_output=[],
    )
    student.update_from_output(output, runner_output)


@pytest.mark.parametrize("seed", range(6))
def test_the_students_update_equals_vllms_own(pair, seed):
    check_students_update(pair, seed)


@pytest.mark.parametrize("name", ["num_output_placeholders", "num_in_flight_tokens"])
def test_a_students_update_that_miscounts_is_seen(pair, monkeypatch, name):
    """The planted error: a count of every updated request stays one too high."""
    update = PairScheduler._update_student

    def miscounting(self: PairScheduler, output: SchedulerOutput, tokens: dict[str, list[int]]) -> None:
        update(self, output, tokens)
        for request in self.student.requests.values():
            if tokens.get(request.request_id):
                setattr(request, name, getattr(request, name) + 1)

    monkeypatch.setattr(PairScheduler, "_update_student", miscounting)
    with pytest.raises(AssertionError):
        check_students_update(pair, 0)


@pytest.mark.parametrize(
    ("drafts", "compilation", "expected"),
    [
        (4, {}, 160),  # 16 requests of 5 tokens, twice
        ("auto", {"mode": 0}, 288),
        (16, {}, 512),  # vLLM's most
        (0, {}, None),
        (4, {"max_cudagraph_capture_size": 8}, 8),
        (4, {"cudagraph_capture_sizes": [8]}, None),
    ],
)
def test_cuda_graphs_hold_the_drafts_of_a_full_batch(drafts, compilation, expected):
    kwargs = {"max_num_seqs": 16, "compilation_config": compilation}
    config = PairConfig(teacher="t", student="s", engine_kwargs=kwargs, num_speculative_tokens=drafts)
    args = config.teacher_engine_args()
    assert args["compilation_config"] == compilation | args["compilation_config"]  # the user's own stay
    assert args["compilation_config"].get("max_cudagraph_capture_size") == expected
    assert args["additional_config"]["osd"]["student"]["compilation_config"] == compilation
