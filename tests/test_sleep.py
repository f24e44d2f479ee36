"""An engine's states, and sleep: the memory falls, both models come back bit for bit, and nothing is sampled meanwhile.

vLLM's allocator serves one engine per process, so all of it is tested on one, in order.
"""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from osd.engine.backend import two_models
from osd.engine.backend.worker import PairWorker
from osd.engine.engine import EngineState, PairConfig, PairEngine, PairPrompt
from osd.generation import OSDGeneration
from tests.tiny import tiny_engine_kwargs

GPU = torch.cuda.is_available()
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="vLLM's sleep mode needs a GPU")]
PROMPTS = [PairPrompt(teacher_token_ids=[7 + i] * 70, student_token_ids=[30, 31 + i]) for i in range(4)]
SAMPLING = dict(max_tokens=40, temperature=1.0, seed=5, ignore_eos=True)


def config(tiny_pair, **engine_kwargs) -> PairConfig:
    teacher, student = map(str, tiny_pair)
    return PairConfig(teacher=teacher, student=student, engine_kwargs=tiny_engine_kwargs(**engine_kwargs))


@pytest.mark.skipif(GPU, reason="needs a machine without a GPU")
def test_sleep_mode_is_refused_without_a_gpu(tiny_pair):
    with pytest.raises(ValueError, match=r"engine_kwargs\['enable_sleep_mode'\]=True: vLLM's sleep mode needs an NVIDIA GPU"):
        PairEngine(config(tiny_pair, enable_sleep_mode=True))


def test_sides_do_not_sleep_apart(tiny_pair):
    teacher, student = map(str, tiny_pair)
    with pytest.raises(ValueError, match="'enable_sleep_mode'] cannot differ between teacher and student"):
        PairConfig(teacher=teacher, student=student, teacher_kwargs={"enable_sleep_mode": True})


def test_a_level_that_would_lose_the_teacher_is_refused():
    with pytest.raises(ValueError, match="sleep level=2: a pair sleeps at level 1"):
        PairWorker.sleep(PairWorker.__new__(PairWorker), level=2)


@pytest.mark.skipif(GPU, reason="this engine could sleep")
def test_the_states_of_an_engine_that_cannot_sleep(tiny_pair):
    def sample():
        return engine.generate(PROMPTS[:1], sampling=SAMPLING | {"max_tokens": 2})

    weights = dict(AutoModelForCausalLM.from_pretrained(tiny_pair[1]).named_parameters())
    with PairEngine(config(tiny_pair)) as engine:
        assert engine.state is EngineState.OPEN
        with pytest.raises(RuntimeError, match="this engine cannot sleep: start it with"):
            engine.sleep()
        engine.wake_up()  # it is awake: no effect
        assert engine.state is EngineState.OPEN
        sample()
        with pytest.raises(ValueError, match="left"):
            engine.load_student_weights(list(weights.items())[:3])
        assert engine.state is EngineState.STALE
        assert not engine.student_is_whole
        with pytest.raises(RuntimeError, match="the last sync failed"):
            sample()
        assert engine.load_student_weights(weights.items()) == engine.weights_version == 2, "a failed sync has a version too"
        assert engine.state is EngineState.OPEN
        sample()
    assert engine.state is EngineState.CLOSED
    engine.close()
    for refused in (sample, engine.sleep, engine.wake_up, engine.reset_prefix_cache, lambda: engine.llm):
        with pytest.raises(RuntimeError, match="this engine is closed"):
            refused()


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.fixture(scope="class")
    def engine(self, tiny_pair):
        # CUDA graphs must stay valid; and a cache that is large beside the noise of what else is allocated.
        graphs = dict(enforce_eager=False, compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})
        with PairEngine(config(tiny_pair, enable_sleep_mode=True, kv_cache_memory_bytes=2 << 30, **graphs)) as engine:
            yield engine

    @pytest.fixture
    def student(self, tiny_pair):
        return AutoModelForCausalLM.from_pretrained(tiny_pair[1]).cuda()

    @staticmethod
    def push(engine, student) -> None:
        engine.load_student_weights((name, p.data) for name, p in student.named_parameters())

    @staticmethod
    def sampled(engine) -> tuple[list[list[int]], torch.Tensor]:
        completions = engine.generate(PROMPTS, sampling=SAMPLING)
        return [c.token_ids for c in completions], torch.cat([c.record.values_TR for c in completions])

    @staticmethod
    def checksum(model) -> list[torch.Tensor]:
        return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]

    def test_a_night(self, engine, student):
        """Asleep: less memory, and no sampling. Awake: the same models, empty caches, the same samples, bit for bit."""
        worker = engine._frontend.worker
        self.push(engine, student)
        before = self.sampled(engine)
        sides = [runner.get_model() for runner in (worker.model_runner, worker.student_runner)]
        kept, addresses = list(map(self.checksum, sides)), [p.data_ptr() for side in sides for p in side.parameters()]
        head, _ = engine.teacher_lm_head()
        total, free = head.sum().item(), torch.cuda.mem_get_info()[0]

        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - free > 1.5 * (1 << 30)  # of 2 GiB for both caches
        assert head.sum().item() == total, "the loss reads the output layer while the engine sleeps"
        for forbidden in (
            lambda: engine.generate(PROMPTS, sampling=SAMPLING),
            lambda: self.push(engine, student),
            engine.teacher_lm_head,
        ):
            with pytest.raises(RuntimeError, match="asleep"):
                forbidden()

        engine.wake_up()
        for side, tensors in zip(sides, kept, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(self.checksum(side), tensors, strict=True))
        assert [p.data_ptr() for side in sides for p in side.parameters()] == addresses
        completions = engine.generate(PROMPTS, sampling=SAMPLING)
        assert {(c.teacher_cached_tokens, c.student_cached_tokens) for c in completions} == {(0, 0)}, "an empty cache was hit"
        assert [c.token_ids for c in completions] == before[0]
        assert torch.equal(torch.cat([c.record.values_TR for c in completions]), before[1])

        engine.sleep()
        engine.wake_up()
        self.push(engine, student)
        assert self.sampled(engine)[0] == before[0]

    def test_generation_sleeps_between_calls(self, engine, student):
        generation = OSDGeneration(
            student, Accelerator(), engine.tokenizer, pair=engine, enable_sleep_mode=True, max_completion_length=8
        )
        assert engine.asleep
        prompts = [[30, 31], [30, 32]]
        generation.sync_weights()
        assert not engine.asleep
        for _ in range(2):  # in evaluation, no sync comes before the second call
            generation.generate(prompts, None, 1)
            assert engine.asleep
        with generation.stays_awake():
            generation.generate(prompts, None, 1)
            assert not engine.asleep
        assert engine.asleep

    def test_a_student_that_is_not_backed_up_is_seen(self, engine, student):
        """The planted error: sleep drops the student's memory, as vLLM would. The engine is of no use afterwards."""
        engine.wake_up()
        self.push(engine, student)
        model = engine._frontend.worker.student_runner.get_model()
        kept, mine = self.checksum(model), {p.untyped_storage().data_ptr() for p in model.parameters()}
        data = [d for address, d in two_models._allocator().pointer_to_data.items() if address in mine]
        assert data, "no parameter is the first in its segment of memory"
        for allocation in data:
            allocation.tag = "student_weights"
        engine.sleep()
        engine.wake_up()
        assert not all(torch.equal(a, b) for a, b in zip(self.checksum(model), kept, strict=True))

    def test_an_engine_can_be_closed_asleep(self, engine):
        """The last test of the engine."""
        engine.sleep()
        engine.close()
