"""The weight map: the second sync and all later ones repeat the copies of the first, and end where ``load_weights`` would."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from osd.engine.weights import WeightMap, _Source, load_all_weights
from tests.tiny import save_tokenizer, tiny_engine_kwargs, tiny_model

pytestmark = pytest.mark.gpu

PROMPT = [PairPrompt(teacher_token_ids=[7, 8, 9], student_token_ids=[10, 11])]


def tied_qwen(path):
    """A student with biases, grouped heads and one matrix for embedding and output, over an odd vocabulary."""
    save_tokenizer(path, 61)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(3)
    Qwen2ForCausalLM(config).float().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["llama", "tied qwen"])
def engine(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    student = tied_qwen(root / "student") if request.param == "tied qwen" else tiny_model(root / "student", vocab=61, seed=2)
    teacher = tiny_model(root / "teacher", vocab=61, seed=1)
    with PairEngine(PairConfig(teacher=str(teacher), student=str(student), engine_kwargs=tiny_engine_kwargs())) as engine:
        yield engine


def another(engine: PairEngine, seed: int) -> dict[str, torch.Tensor]:
    """Random weights for the student, as a trainer names them."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(engine.config.student, dtype=torch.float32)
    return {name: torch.randn_like(p) * 0.3 for name, p in model.named_parameters()}


def loaded(engine: PairEngine, side: str = "student_runner") -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in getattr(engine._worker(), side).get_model().named_parameters()}


def differing(engine: PairEngine, weights: dict[str, torch.Tensor]) -> list[str]:
    """Parameters of the student that are not what one ``load_weights`` call makes them."""
    ours = loaded(engine)
    load_all_weights(engine._worker().student_runner.get_model(), weights.items())
    return [name for name, p in loaded(engine).items() if not torch.equal(p, ours[name])]


@pytest.fixture
def weight_map(engine) -> WeightMap:
    """The engine's map, learnt."""
    if engine._worker().student_weights.sources is None:
        engine.load_student_weights(another(engine, 0).items())
    weights = engine._worker().student_weights
    assert weights.sources is not None
    return weights


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_later_syncs_end_where_load_weights_would(engine, weight_map, monkeypatch, at_once):
    teacher = loaded(engine, "model_runner")
    model = engine._worker().student_runner.get_model()
    for seed in (1, 2):
        weights = another(engine, seed)
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "load_weights", None)  # the map must do without it
            engine.load_student_weights(weights.items(), at_once=at_once)
        assert not differing(engine, weights)
    for name, p in loaded(engine, "model_runner").items():
        assert torch.equal(p, teacher[name]), "the teacher's weights were touched"


def test_tensors_may_lie_in_memory_in_other_ways(engine, weight_map):
    """As views of one flat buffer (FSDP1), transposed, or gone as soon as the next one is asked for (ZeRO-3)."""
    weights = another(engine, 4)
    flat = torch.cat([w.flatten() for w in weights.values()])
    offsets = torch.tensor([0, *(w.numel() for w in weights.values())]).cumsum(0).tolist()

    def one_at_a_time():
        for (name, w), start in zip(weights.items(), offsets, strict=False):
            gathered = flat[start : start + w.numel()].view(w.shape).clone()
            yield name, gathered
            gathered.fill_(float("nan"))

    views = [
        (n, flat[start : start + w.numel()].view(w.shape)) for (n, w), start in zip(weights.items(), offsets, strict=False)
    ]
    transposed = [(n, w.t().contiguous().t() if w.ndim == 2 else w) for n, w in weights.items()]
    for given, at_once in ((views, False), (views, True), (transposed, False), (transposed, True)):
        engine.load_student_weights(another(engine, 5).items())
        engine.load_student_weights(given, at_once=at_once)
        assert not differing(engine, weights)
    engine.load_student_weights(one_at_a_time())
    assert not differing(engine, weights)


def test_weights_stay_where_cuda_graphs_read_them(engine, weight_map):
    model = engine._worker().student_runner.get_model()
    where = {name: p.data_ptr() for name, p in model.named_parameters()}
    engine.load_student_weights(another(engine, 3).items(), at_once=True)  # by the map
    WeightMap(model).load(another(engine, 3).items())  # by load_weights, as the first sync and every one without a map
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == where


def test_a_map_may_be_learnt_from_a_flat_buffer(engine):
    weights = another(engine, 6)
    flat = torch.cat([w.flatten() for w in weights.values()])
    views, start = {}, 0
    for name, w in weights.items():
        views[name] = flat[start : start + w.numel()].view(w.shape)
        start += w.numel()
    learner = WeightMap(engine._worker().student_runner.get_model())
    learner.load(views.items())
    assert learner.sources is not None
    learner.load(another(engine, 7).items())
    assert not differing(engine, another(engine, 7))


def test_a_tensor_that_goes_to_several_places_may_lie_in_memory_in_other_ways():
    """A checkpoint's fused matrix, say; neither model above has one."""
    given = torch.arange(24.0).view(4, 6)
    first, last = torch.empty(1, 6), torch.empty(3, 6)
    source = _Source(given.shape, given.stride(), given.dtype)
    source.places = [(first, (first.shape, (6, 1), 0)), (last, (last.shape, (6, 1), 6))]
    for tensor in (given, given.t().contiguous().t(), torch.cat([torch.zeros(7), given.flatten()])[7:].view(4, 6)):
        for part, view in source.copies("fused", tensor):
            part.copy_(view)
        assert torch.equal(torch.cat([first, last]), given)
        last.zero_()


def test_parts_that_are_swapped_are_seen(engine, weight_map):
    """The planted error: k and v, which have one shape, in each other's place."""
    k, v = (weight_map.sources[f"model.layers.0.self_attn.{part}_proj.weight"] for part in ("k", "v"))
    k.places, v.places = v.places, k.places
    try:
        weights = another(engine, 8)
        engine.load_student_weights(weights.items())
        assert differing(engine, weights) == ["model.layers.0.self_attn.qkv_proj.weight"]
    finally:
        k.places, v.places = v.places, k.places


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"left out 1 tensors that the first had: \['model.norm.weight'\]"),
        (lambda w: w.update({"module.model.norm.weight": w.pop("model.norm.weight")}), "has 'module.model.norm.weight', which"),
        (
            lambda w: w.update({"model.norm.weight": w["model.norm.weight"].bfloat16()}),
            "is torch.bfloat16 .* was torch.f",
        ),
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:-1]}), r",\) in this weight sync and was"),
    ],
    ids=["missing", "renamed", "another dtype", "another shape"],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_a_sync_that_is_not_like_the_first_is_refused_and_so_is_sampling(engine, weight_map, spoil, message, at_once):
    weights, before = another(engine, 9), loaded(engine)
    spoil(weights)
    with pytest.raises(ValueError, match=message):
        engine.load_student_weights(weights.items(), at_once=at_once)
    if at_once:  # it is refused before anything is copied
        assert all(torch.equal(p, before[name]) for name, p in loaded(engine).items())
    with pytest.raises(RuntimeError, match=r"not to be sampled from \(the last sync failed"):
        engine.generate(PROMPT, sampling=dict(max_tokens=2))
    engine.load_student_weights(another(engine, 9).items())
    assert len(engine.generate(PROMPT, sampling=dict(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_a_load_that_does_more_than_copy_has_no_map_and_says_so(engine, monkeypatch, caplog):
    model = engine._worker().student_runner.get_model()
    load = type(model).load_weights

    def doubling(self, weights):
        names = load(self, weights)
        with torch.no_grad():
            self.model.norm.weight.mul_(2)
        return names

    monkeypatch.setattr(type(model), "load_weights", doubling)
    learner = WeightMap(model)
    with caplog.at_level(logging.WARNING):
        learner.load(another(engine, 10).items())
    assert "aten.mul_" in caplog.text
    assert learner.sources is None
    weights = another(engine, 11)
    learner.load(weights.items())
    torch.testing.assert_close(loaded(engine)["model.norm.weight"].cpu(), 2 * weights["model.norm.weight"].cpu())
