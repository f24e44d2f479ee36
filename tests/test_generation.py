"""OSDGeneration: TRL's contract, the teacher's own prompts, live weights, and no sampling after a failed sync."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from osd.core import MixingConfig
from osd.validate_models import end_ids
from tests.tiny import tiny_model
from tests.training import NOISE, STUDENT_PROMPTS, disagreement, perturb

pytestmark = pytest.mark.gpu

TEACHER_PROMPTS = [[1, 4, 20, 21, 22, 5, 7, 8], [1, 4, 23, 5, 9], [24, 10, 11]]


@pytest.fixture(scope="module")
def teacher(tiny_pair):
    return AutoModelForCausalLM.from_pretrained(tiny_pair[0]).eval()


@pytest.fixture
def student(tiny_pair):
    return AutoModelForCausalLM.from_pretrained(tiny_pair[1]).eval()


@pytest.fixture
def make(engine, student, tiny_pair):
    from osd.generation import OSDGeneration

    tokenizer = AutoTokenizer.from_pretrained(tiny_pair[1])

    def make_generation(**kwargs):
        kwargs = {"pair": engine, "max_completion_length": 8, **kwargs}
        return OSDGeneration(student, Accelerator(), tokenizer, **kwargs)

    return make_generation


# -- the contract -------------------------------------------------------------------------------------------------------


def test_generate_returns_what_trl_expects(make):
    generation = make()
    generation.sync_weights()
    prompts, completions, logprobs, ids = generation.generate(STUDENT_PROMPTS, None, 1)
    assert prompts == STUDENT_PROMPTS
    assert all(1 <= len(tokens) <= 8 for tokens in completions)
    for tokens, values, columns, completion in zip(completions, logprobs, ids, generation.last_batch.completions, strict=True):
        assert columns == [[token] for token in tokens]
        assert values == [[value] for value in completion.record.logp_draw.tolist()]
        torch.testing.assert_close(completion.record.logp_draw, completion.record.logq)
    assert generation.last_batch.seconds > 0
    assert generation.last_batch.sync_seconds > 0


def test_returned_logprobs_are_of_the_draw(make):
    """After top-k the behaviour policy is the renormalised q*, and that is what an importance weight needs."""
    generation = make(top_k=2)
    generation.sync_weights()
    *_, logprobs, _ = generation.generate(STUDENT_PROMPTS, None, 1)
    logq = torch.cat([c.record.logq for c in generation.last_batch.completions])
    drawn = torch.tensor([value for values in logprobs for [value] in values])
    assert (drawn >= logq - 1e-6).all()
    assert (drawn > logq + 1e-3).any()


def test_sampling_arguments_reach_the_engine(make):
    generation = make(generation_kwargs={"temperature": 0.0, "max_tokens": 3})
    generation.sync_weights()
    first, second = (generation.generate(STUDENT_PROMPTS, None, 1)[1] for _ in range(2))
    assert first == second
    assert max(map(len, first)) <= 3


def test_images_are_refused(make):
    generation = make()
    generation.sync_weights()
    with pytest.raises(ValueError, match=r"prompts\[1\] has images, and OSD distils text"):
        generation.generate(STUDENT_PROMPTS, [None, ["an image"], None], 1)


def test_an_unknown_error_policy_is_refused(make):
    with pytest.raises(ValueError, match="on_error='ignore'"):
        make(on_error="ignore")


def test_a_pair_of_two_ranks_in_one_process_is_refused(make, tiny_pair):
    from osd.engine.engine import PairConfig

    teacher, student = map(str, tiny_pair)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 .*: 1 training processes"):
        make(pair=PairConfig(teacher=teacher, student=student, engine_kwargs={"tensor_parallel_size": 2}))


# -- what each side reads -----------------------------------------------------------------------------------------------


def test_each_side_reads_its_own_prompt(make, student, teacher):
    generation = make()
    generation.sync_weights()
    with generation.teacher_reads(TEACHER_PROMPTS):
        generation.generate(STUDENT_PROMPTS, None, 1)
    completions = generation.last_batch.completions
    assert disagreement(student, STUDENT_PROMPTS, completions, "logp_theta") < NOISE
    assert disagreement(teacher, TEACHER_PROMPTS, completions, "logp_teacher") < NOISE
    assert disagreement(teacher, STUDENT_PROMPTS, completions, "logp_teacher") > 100 * NOISE


def test_without_its_own_prompts_the_teacher_reads_the_students(make, teacher):
    generation = make()
    generation.sync_weights()
    generation.generate(STUDENT_PROMPTS, None, 1)
    assert disagreement(teacher, STUDENT_PROMPTS, generation.last_batch.completions, "logp_teacher") < NOISE
    with generation.teacher_reads(None):
        generation.generate(STUDENT_PROMPTS, None, 1)
    assert disagreement(teacher, STUDENT_PROMPTS, generation.last_batch.completions, "logp_teacher") < NOISE


def test_teacher_prompts_may_be_text_and_messages(make):
    generation = make()
    generation.sync_weights()
    messages = [{"role": "user", "content": "w7"}]
    with generation.teacher_reads(["w20 w21", messages, [24, 10]]):
        generation.generate(STUDENT_PROMPTS, None, 1)
    lengths = [c.teacher_prompt_tokens for c in generation.last_batch.completions]
    assert lengths == [2, 6, 2]


def test_alpha_zero_samples_from_the_student_alone(make):
    generation = make()
    generation.sync_weights()
    with generation.teacher_reads(TEACHER_PROMPTS, alpha=0.0):
        generation.generate(STUDENT_PROMPTS, None, 1)
    for completion in generation.last_batch.completions:
        assert (completion.record.alpha == 0).all()
        torch.testing.assert_close(completion.record.logq, completion.record.logp_theta, atol=1e-5, rtol=0)


def test_teacher_prompts_must_match_the_students(make):
    generation = make()
    generation.sync_weights()
    with (
        generation.teacher_reads(TEACHER_PROMPTS[:2]),
        pytest.raises(ValueError, match="2 teacher prompts were given for 3 student prompts"),
    ):
        generation.generate(STUDENT_PROMPTS, None, 1)


def test_teacher_prompts_are_for_one_call(make):
    generation = make()
    generation.sync_weights()
    with generation.teacher_reads(TEACHER_PROMPTS):
        generation.generate(STUDENT_PROMPTS, None, 1)
        with pytest.raises(RuntimeError, match="the second one in its block"):
            generation.generate(STUDENT_PROMPTS, None, 1)
        with pytest.raises(RuntimeError, match="cannot be nested"), generation.teacher_reads(None):
            pass


# -- live weights -------------------------------------------------------------------------------------------------------


def test_nothing_is_sampled_before_the_first_sync(make):
    with pytest.raises(RuntimeError, match=r"call sync_weights\(\) first"):
        make().generate(STUDENT_PROMPTS, None, 1)


def test_a_sync_makes_the_engine_the_live_student(make, student, engine):
    generation = make()
    for step in range(3):
        perturb(student, seed=step)
        if step:  # planted: without the sync, the engine is still the student of the step before
            generation.generate(STUDENT_PROMPTS, None, 1)
            stale = generation.last_batch
            assert disagreement(student, STUDENT_PROMPTS, stale.completions, "logp_theta") > 100 * NOISE
        before = engine.weights_version
        generation.sync_weights()
        generation.generate(STUDENT_PROMPTS, None, 1)
        fresh = generation.last_batch
        assert disagreement(student, STUDENT_PROMPTS, fresh.completions, "logp_theta") < NOISE
        assert fresh.weights_version == before + 1
        assert {c.record.weights_version for c in fresh.completions} == {before + 1}


def test_a_sync_keeps_the_teachers_prefix_cache_and_drops_the_students(make):
    generation = make()
    generation.sync_weights()

    def hits():
        generation.generate([list(range(7, 7 + 40))], None, 1)
        [completion] = generation.last_batch.completions
        return completion.teacher_cached_tokens > 0, completion.student_cached_tokens > 0

    assert hits() == (False, False)
    assert hits() == (True, True)
    generation.sync_weights()
    assert hits() == (True, False)
    assert hits() == (True, True)


def test_nothing_is_sampled_after_a_failed_sync(make, student, engine, monkeypatch):
    generation = make()
    generation.sync_weights()
    walk = generation._iter_named_params

    def breaks_half_way():
        for i, named in enumerate(walk()):
            if i == 5:
                raise OSError("a shard is gone")
            yield named

    monkeypatch.setattr(generation, "_iter_named_params", breaks_half_way)
    with pytest.raises(OSError, match="a shard is gone"):
        generation.sync_weights()
    with pytest.raises(RuntimeError, match="sync_weights"):
        generation.generate(STUDENT_PROMPTS, None, 1)
    with pytest.raises(RuntimeError, match=r"not to be sampled from \(the last sync failed"):
        make_prompts_and_sample(engine)

    monkeypatch.setattr(generation, "_iter_named_params", walk)
    generation.sync_weights()
    generation.generate(STUDENT_PROMPTS, None, 1)
    assert disagreement(student, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta") < NOISE


def make_prompts_and_sample(engine):
    from osd.engine.engine import PairPrompt

    return engine.generate([PairPrompt(teacher_token_ids=[7], student_token_ids=[7])], sampling={"max_tokens": 1})


def test_a_generation_closes_what_it_started(make, engine):
    with make() as generation:
        assert not generation.owns_engine
    with pytest.raises(RuntimeError, match="call sync_weights"):
        generation.generate(STUDENT_PROMPTS, None, 1)
    engine.reset_prefix_cache()  # the caller's engine is open


def test_attached_to_a_trainer(make, student):
    """The teacher's end of a sequence (4) becomes the student's, in TRL's metrics and in what is saved."""
    trainer = SimpleNamespace(eos_token_ids=[2])
    generation = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("osd.generation.end_ids", lambda config: [2, 4])
        assert generation.attach(trainer) is generation
    assert (trainer.vllm_generation, trainer.use_vllm, trainer._last_loaded_step) == (generation, True, -1)
    assert trainer.eos_token_ids == student.generation_config.eos_token_id == [2, 4]


def test_every_declared_end_is_found(tmp_path):
    """In generation_config.json, or else in config.json; the student's first."""
    from osd.engine.engine import PairConfig

    teacher, student = tiny_model(tmp_path / "teacher"), tiny_model(tmp_path / "student")
    GenerationConfig(eos_token_id=[5, 2]).save_pretrained(teacher)
    (student / "generation_config.json").unlink()
    assert end_ids(PairConfig(teacher=str(teacher), student=str(student))) == [2, 5]


# -- completions in error -----------------------------------------------------------------------------------------------


@pytest.fixture
def broken_student(student):
    """A student that answers NaN to any prompt with token 63."""
    with torch.no_grad():
        student.get_input_embeddings().weight[63] = float("nan")
    return student


def test_a_completion_in_error_is_raised(make, broken_student):
    generation = make(generation_kwargs={"logit_bias": {63: -100.0}})
    generation.sync_weights()
    with pytest.raises(RuntimeError, match="1 of 3 completions failed; number 1: NaN in the student"):
        generation.generate([[7], [63], [8]], None, 1)


def test_a_completion_in_error_can_be_kept_for_a_caller_that_masks_it(make, broken_student):
    generation = make(on_error="keep", generation_kwargs={"logit_bias": {63: -100.0}})
    generation.sync_weights()
    _, completions, logprobs, _ = generation.generate([[7], [63], [8]], None, 1)
    assert [bool(c.error) for c in generation.last_batch.completions] == [False, True, False]
    assert len(completions[1]) == len(logprobs[1]) == 1
    assert generation.last_batch.completions[0].record.logp_theta.isfinite().all()


def test_the_default_mixing_is_the_engines_own(make, engine):
    assert engine.config.mixing == MixingConfig()
    generation = make()
    generation.sync_weights()
    generation.generate(STUDENT_PROMPTS, None, 1)
    gap = torch.cat([c.record.chernoff_gap(engine.config.mixing) for c in generation.last_batch.completions])
    assert len(gap)
    assert gap.max() < 1e-3
