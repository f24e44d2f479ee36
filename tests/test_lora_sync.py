"""A LoRA adapter beside frozen weights in the student's engine: exact at every sync, never stale, and refused by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from osd.engine import config as engine_config
from osd.engine import engine as pair_engine
from osd.engine import scheduler as pair_scheduler
from osd.engine.adapter import StudentAdapter, adapter_kwargs
from osd.engine.engine import PairConfig, PairEngine
from osd.generation import OSDGeneration
from osd.weight_sync import adapted_layers, adapter_parameters
from tests.test_engine_async import PROMPTS, SAMPLING, compare_with_stock
from tests.test_generation import STUDENT_PROMPTS, disagreement, gaps_over_training
from tests.test_sync_sources import LORA, with_lora
from tests.tiny import tiny_engine_kwargs, tiny_model
from tests.training import build_trainer

pytestmark = pytest.mark.gpu

# vLLM's LoRA kernels know no float32 on a GPU, and float16 is this far from the live model's float32 there.
DTYPE, NOISE, FAR = ("float16", 0.6, 2.0) if torch.cuda.is_available() else ("float32", 1e-3, 0.1)
exact_only = pytest.mark.skipif(DTYPE != "float32", reason="float16 turns some draws over")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A student with biases, grouped heads (k and v smaller than q) and one matrix for embedding and output."""
    root = tmp_path_factory.mktemp("lora")
    student = dict(attention_bias=True, num_key_value_heads=1, tie_word_embeddings=True)
    return tiny_model(root / "teacher", seed=1), tiny_model(root / "student", seed=2, **student)


def start(pair, **overrides) -> PairEngine:
    teacher, student = map(str, pair)
    kwargs = tiny_engine_kwargs(dtype=DTYPE, **overrides)
    held = adapter_kwargs(dict.fromkeys(LINEAR, 8))
    return PairEngine(PairConfig(teacher=teacher, student=student, engine_kwargs=kwargs, student_kwargs=held))


@pytest.fixture(scope="module")
def one_at_a_time(pair) -> list[list[int]]:
    """Greedy completions of an adapted student without async scheduling."""
    with start(pair, async_scheduling=False) as engine:
        torch.manual_seed(0)  # of A, as it is when it is made
        model = with_lora(AutoModelForCausalLM.from_pretrained(pair[1]))
        OSDGeneration(model, Accelerator(), engine.tokenizer, pair=engine, lora_sync="adapter").sync_weights()
        return [c.token_ids for c in engine.generate(PROMPTS, sampling=SAMPLING)]


@pytest.fixture(scope="module")
def engine(pair, one_at_a_time):
    with start(pair) as engine:
        yield engine


@pytest.fixture
def student(pair):
    return AutoModelForCausalLM.from_pretrained(pair[1]).eval()


@pytest.fixture
def make(engine, pair):
    tokenizer = AutoTokenizer.from_pretrained(pair[1])

    def make_generation(model, **kwargs):
        kwargs = {"pair": engine, "max_completion_length": 8, "lora_sync": "adapter", **kwargs}
        return OSDGeneration(model, Accelerator(), tokenizer, **kwargs)

    return make_generation


def gap(generation) -> float:
    """How far the engine's student is from the live one, in nats, as it is."""
    generation.generate(STUDENT_PROMPTS, None, 1)
    return disagreement(generation.model, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta")


def gap_after_sync(generation) -> float:
    generation.sync_weights()
    return gap(generation)


def step(model, seed=0, by=0.2):
    """Move what is trained, as an optimizer would."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=rng) * by)


def weights(engine, side) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in getattr(engine._worker(), side).get_model().named_parameters()}


# -- what is sampled is the live student --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "r": 8, "use_rslora": True},
        {"target_modules": ["k_proj", "up_proj"], "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"init_lora_weights": "pissa"},  # which takes a part out of the frozen weights, as the engine cannot know
    ],
    ids=["lora", "all linear layers, rank-stabilised", "a rank and a scaling of their own", "pissa"],
)
def test_every_sync_of_the_adapter_makes_the_engines_student_the_live_one(make, student, engine, settings):
    plain = copy.deepcopy(student)
    generation = make(model := with_lora(student, **settings))
    versions = []
    for seed in range(4):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        assert gap_after_sync(generation) < NOISE
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "a sync changed the live student"
        versions.append(generation.last_batch.weights_version)
        step(model, seed)
    assert [later - versions[0] for later in versions] == [0, 1, 2, 3]
    assert disagreement(plain, STUDENT_PROMPTS, generation.last_batch.completions, "logp_theta") > FAR


def test_after_the_first_sync_only_a_and_b_are_pushed(make, student, engine, monkeypatch):
    pushed, load = [], engine.load_student_weights

    def watched(named_tensors, *, adapter, **kwargs):
        given = [list(named_tensors), list(adapter)]
        pushed.append([{name for name, _ in tensors} for tensors in given])
        return load(given[0], adapter=given[1], **kwargs)

    monkeypatch.setattr(engine, "load_student_weights", watched)
    names = {name for name, _ in student.named_parameters()}
    generation = make(model := with_lora(student))
    generation.sync_weights()
    teacher, frozen = weights(engine, "model_runner"), weights(engine, "student_runner")
    step(model)
    generation.sync_weights()
    a_and_b = {f"{name}.lora_{part}.weight" for name in adapted_layers(model) for part in "AB"}
    assert len(a_and_b) == 2 * 6
    assert pushed == [[names, a_and_b], [set(), a_and_b]]
    for side, before in (("model_runner", teacher), ("student_runner", frozen)):
        assert all(torch.equal(p, before[name]) for name, p in weights(engine, side).items()), side


def test_the_frozen_weights_are_pushed_again_when_they_or_the_engine_are_not_as_they_were(make, student, pair):
    generation = make(model := with_lora(student))
    generation.sync_weights()
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight").mul_(1.5)
    assert gap_after_sync(generation) < NOISE
    other = AutoModelForCausalLM.from_pretrained(pair[1])
    step(other)
    make(other, lora_sync="merged").sync_weights()
    assert gap_after_sync(generation) < NOISE


def test_a_sync_resets_the_students_prefix_cache_and_not_the_teachers(make, student):
    generation = make(model := with_lora(student))
    prompts = [list(range(7, 50))] * 2  # longer than a block
    for expected in (0, 32):
        generation.sync_weights()
        generation.generate(prompts, None, 1)
        assert generation.last_batch.completions[0].teacher_cached_tokens >= expected
        assert generation.last_batch.completions[0].student_cached_tokens == 0
        step(model)
    generation.generate(prompts, None, 1)
    assert generation.last_batch.completions[0].student_cached_tokens == 32


@exact_only
def test_completions_and_alpha_are_those_of_the_merged_student(make, student):
    model, batches = with_lora(student), []
    for lora_sync in ("adapter", "merged"):
        generation = make(model, lora_sync=lora_sync, max_completion_length=32, generation_kwargs={"seed": 5})
        assert gap_after_sync(generation) < NOISE
        batches.append(generation.last_batch.completions)
    for one, other in zip(*batches, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.record.values_TR, other.record.values_TR, atol=NOISE, rtol=NOISE)


# -- planted errors -----------------------------------------------------------------------------------------------------


def test_a_stale_adapter_is_seen(make, student, engine, monkeypatch):
    generation = make(model := with_lora(student))
    assert gap_after_sync(generation) < NOISE
    step(model)
    with monkeypatch.context() as patch:
        patch.setattr(StudentAdapter, "load", lambda self, named_tensors: None)
        assert gap_after_sync(generation) > FAR
    assert gap_after_sync(generation) < NOISE


def test_an_adapter_left_on_merged_weights_is_seen(make, student, monkeypatch):
    model = with_lora(student)
    make(model).sync_weights()
    merged = make(model, lora_sync="merged")
    load = StudentAdapter.load
    with monkeypatch.context() as patch:
        patch.setattr(StudentAdapter, "load", lambda self, named_tensors: named_tensors and load(self, named_tensors))
        assert gap_after_sync(merged) > FAR
    assert gap_after_sync(make(model, lora_sync="merged")) < NOISE


def test_a_scaling_that_is_left_out_is_seen(make, student):
    generation = make(model := with_lora(student))
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.scaling["default"] = 1.0
    generation.sync_weights()
    for layer in layers:
        layer.scaling["default"] = LORA.lora_alpha / LORA.r
    assert gap(generation) > FAR


def test_requests_without_the_adapter_are_seen(make, student, monkeypatch):
    generation = make(with_lora(student))
    monkeypatch.setattr(pair_scheduler, "ADAPTER", None)
    assert gap_after_sync(generation) > FAR


def test_an_adapter_that_vllm_has_dropped_is_an_error_and_not_the_frozen_student(make, student, engine):
    generation = make(with_lora(student))
    generation.sync_weights()
    worker = engine._worker()
    worker.student_runner.lora_manager.remove_all_adapters()
    try:
        with pytest.raises(Exception, match="No adapter found"):
            gap(generation)
    finally:
        worker.student_adapter = StudentAdapter(worker.student_runner)
    assert gap_after_sync(generation) < NOISE


# -- async scheduling ---------------------------------------------------------------------------------------------------


def test_async_scheduling_with_an_adapter(make, student, engine, one_at_a_time, monkeypatch):
    """Rows that come and go, steps that are derived: the records are the live student's, the tokens those without async."""
    torch.manual_seed(0)
    generation = make(model := with_lora(student))
    generation.sync_weights()
    forward = engine._worker().student_runner.execute_model
    advanced, differing = forward.advanced, compare_with_stock(engine, monkeypatch)
    lengths = [5, 40, 11, 66, 23, 52]
    completions = engine.generate(PROMPTS, sampling=[SAMPLING | {"max_tokens": length} for length in lengths])
    assert forward.advanced - advanced > 40, "the student's steps were not derived"
    assert not differing
    assert disagreement(model, [p.student_token_ids for p in PROMPTS], completions, "logp_theta") < NOISE
    if DTYPE == "float32":
        assert [c.token_ids for c in completions] == [ids[:n] for ids, n in zip(one_at_a_time, lengths, strict=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests' trainer is on the CPU")
def test_training_with_the_adapter_alone(engine, pair, tmp_path):
    trainer = build_trainer(engine, pair[1], tmp_path, peft_config=LORA, lora_sync="adapter")
    gaps = gaps_over_training(trainer)
    assert len(gaps) == 3
    assert max(gaps) < NOISE


# -- refused by name ----------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(f"{Q}.lora_B.weight"), f"adapter of {Q} has one of lora_A and lora_B"),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)}),
            r"no place for 1 tensors.*layers\.9",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32)}),
            rf"{Q} is \[4, 32\] and \[64, 4\], .* takes \[r, 64\]",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(16, 64), f"{Q}.lora_B.weight": torch.ones(64, 16)}),
            r"with r up to 8 \(max_lora_rank\)",
        ),
    ],
    ids=["half of it", "a layer that the engine lacks", "another shape", "rank"],
)
def test_an_adapter_that_does_not_fit_is_refused_and_so_is_sampling(make, student, engine, spoil, message):
    generation = make(model := with_lora(student))
    generation.sync_weights()
    tensors = dict(adapter_parameters(model))
    spoil(tensors)
    with pytest.raises(ValueError, match=message):
        engine.load_student_weights((), partial=True, adapter=tensors.items())
    with pytest.raises(RuntimeError, match=r"not to be sampled from \(the last sync failed"):
        gap(generation)
    with pytest.raises(ValueError, match="no sync of every weight came before"):
        engine.load_student_weights((), partial=True, adapter=adapter_parameters(model))
    assert gap_after_sync(generation) < NOISE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, f"adapter of {Q} is a DoraLinearVariant"),
        ({"modules_to_save": ["lm_head"]}, "trains base_model.model.lm_head.modules_to_save"),
        ({"bias": "all", "target_modules": ["q_proj"]}, r"trains base_model.*q_proj.base_layer.bias"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, r"trains base_model.*q_proj.lora_B.default.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "adapter on model.embed_tokens, a Embedding"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapter on lm_head, a Linear"),
        ({"r": 513}, "rank r=513, and vLLM's LoRA layers at most 512"),
        ({"r": 9}, r"was not started with student_kwargs=\{'enable_lora': True, 'max_lora_rank': 16"),
    ],
    ids=["dora", "a saved module", "biases", "an adapter's bias", "embeddings", "head", "rank", "rank of the engine"],
)
def test_adapters_that_the_engine_cannot_hold_are_refused(make, student, settings, message):
    with pytest.raises(ValueError, match=message):
        make(with_lora(student, **settings))


def test_students_and_engines_without_an_adapter_are_refused(make, student, pair, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="lora_sync='adapter' is for LoRA students"):
        make(student)
    with pytest.raises(ValueError, match="lora_sync='lora'"):
        make(student, lora_sync="lora")
    model, plain = with_lora(student), SimpleNamespace(config=PairConfig(teacher="t", student="s"))
    with pytest.raises(ValueError, match="the running engine was not started with student_kwargs"):
        make(model, pair=plain)
    with monkeypatch.context() as patch:
        patch.setattr(OSDGeneration, "_sharded", True)
        with pytest.raises(ValueError, match=r"not sharded \(FSDP, ZeRO-3\)"):
            make(model)
    with pytest.raises(ValueError, match="lora_sync='adapter' and the student has no LoRA adapter"):
        build_trainer(None, pair[1], tmp_path, lora_sync="adapter")
    with pytest.raises(ValueError, match="lora_sync='both' is unknown; use one of merged, adapter"):
        build_trainer(None, pair[1], tmp_path, lora_sync="both")


def test_an_engine_is_started_with_what_the_adapter_needs(make, student, pair, monkeypatch):
    monkeypatch.setattr(pair_engine, "PairEngine", lambda config: config)
    teacher, path = map(str, pair)
    config = PairConfig(teacher=teacher, student=path, student_kwargs={"max_model_len": 64})
    model = with_lora(student)
    started = make(model, pair=config).engine.student_kwargs
    assert started == {"max_model_len": 64} | adapter_kwargs(dict.fromkeys(LORA.target_modules, LORA.r))
    assert make(model, pair=config, lora_sync="merged").engine.student_kwargs == {"max_model_len": 64}


def test_a_merged_adapter_is_refused_and_nothing_is_sampled(make, student):
    generation = make(model := with_lora(student))
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        generation.sync_weights()
    with pytest.raises(RuntimeError, match="call sync_weights"):
        gap(generation)
    model.unmerge_adapter()
    assert gap_after_sync(generation) < NOISE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"engine_kwargs": {"enable_lora": True}}, r"engine_kwargs\['enable_lora'\] is not supported: only the student"),
        ({"teacher_kwargs": {"enable_lora": True}}, r"teacher_kwargs\['enable_lora'\] is not supported"),
        ({"student_kwargs": {"enable_lora": True}}, "needs 'lora_target_modules' beside it"),
        (
            {"student_kwargs": adapter_kwargs({"q_proj": 1}), "engine_kwargs": {"tensor_parallel_size": 2}},
            "not supported with tensor_parallel_size > 1",
        ),
        ({"student_kwargs": adapter_kwargs({"q_proj": 1}) | {"dtype": "float32"}}, "in 16 bits on a GPU; use 'bfloat16'"),
    ],
)
def test_engine_arguments_that_cannot_hold_an_adapter_are_refused(monkeypatch, kwargs, message):
    monkeypatch.setattr(type(engine_config.current_platform), "is_cuda_alike", lambda self: True)
    with pytest.raises(ValueError, match=message):
        PairConfig(teacher="t", student="s", **kwargs)


def test_layers_that_are_not_linear_are_refused():
    manager = SimpleNamespace(_adapter_manager=SimpleNamespace(modules={"lm_head": torch.nn.Identity()}))
    with pytest.raises(ValueError, match="has 'lm_head', which is not a linear layer"):
        StudentAdapter(SimpleNamespace(lora_config=object(), lora_manager=manager))


def test_ranks_are_rounded_up_to_what_vllm_has():
    wanted = adapter_kwargs(
        {"model.layers.0.mlp.up_proj": 9, "model.layers.1.mlp.up_proj": 4, "model.layers.0.self_attn.q_proj": 2}
    )
    assert wanted == {"enable_lora": True, "max_lora_rank": 16, "lora_target_modules": ["q_proj", "up_proj"]}
