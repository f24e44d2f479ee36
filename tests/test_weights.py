"""Loading a live student: every parameter of it or none, whatever the tensors' memory looks like."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from osd.engine.engine import EngineState, PairEngine, PairPrompt, checked_params
from osd.engine.request import PairOptions
from osd.engine.weights import WeightLoad, dump_weights
from tests.exact import completion_logits, reference
from tests.pairs import runners
from tests.tiny import save_tokenizer, tiny_model

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
def model_paths(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    student = tied_qwen(root / "student") if request.param == "tied qwen" else tiny_model(root / "student", vocab=61, seed=2)
    return tiny_model(root / "teacher", vocab=61, seed=1), student


def another(engine: PairEngine, seed: int) -> dict[str, torch.Tensor]:
    """Return random weights for the student, under a trainer's names."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(engine.config.student, dtype=torch.float32)
    return {name: torch.randn_like(p) * 0.3 for name, p in model.named_parameters()}


def loaded(engine: PairEngine, side: str = "student") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in runners(engine)[side].get_model().named_parameters()}


def check_policy(engine: PairEngine, weights: dict[str, torch.Tensor]) -> None:
    """Compare log π_θ of sampled tokens with transformers: packed copies of the weights must follow, too."""
    model = reference(engine.config.student)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    [completion] = engine.generate(PROMPT, sampling=dict(max_tokens=12, ignore_eos=True))
    token = torch.tensor(completion.token_ids)[:, None]
    expected = completion_logits(model, PROMPT[0].student_token_ids, completion.token_ids).log_softmax(-1).gather(-1, token)
    torch.testing.assert_close(completion.record.logp_theta.double(), expected[:, 0], atol=1e-3, rtol=1e-3)


def test_every_sync_replaces_the_student_and_nothing_else(engine):
    teacher = loaded(engine, "teacher")
    for seed in (1, 2):
        weights = another(engine, seed)
        assert engine.load_student_weights(weights.items()) == engine.weights_version
        check_policy(engine, weights)
    for name, p in loaded(engine, "teacher").items():
        assert torch.equal(p, teacher[name]), "the teacher's weights were touched"


def test_a_policy_of_other_weights_is_seen(engine):
    """The planted error: one layer's k and v, which have one shape, in each other's place."""
    weights = another(engine, 8)
    k, v = (f"model.layers.0.self_attn.{part}_proj.weight" for part in ("k", "v"))
    engine.load_student_weights((weights | {k: weights[v], v: weights[k]}).items())
    with pytest.raises(AssertionError):
        check_policy(engine, weights)


def test_a_sync_of_one_matrix_leaves_the_others(engine):
    weights = another(engine, 1)
    engine.load_student_weights(weights.items())
    changed = {name: w for name, w in another(engine, 2).items() if "layers.1.mlp.down_proj" in name or "q_proj" in name}
    engine.load_student_weights(changed.items(), partial=True)
    check_policy(engine, weights | changed)


def test_tensors_may_lie_in_memory_in_other_ways(engine):
    """As views of one flat buffer (FSDP1), transposed, or overwritten when the next one is asked for (ZeRO-3)."""
    weights = another(engine, 4)
    engine.load_student_weights(weights.items())
    expected = loaded(engine)
    flat = torch.cat([w.flatten() for w in weights.values()])
    offsets = torch.tensor([0, *(w.numel() for w in weights.values())]).cumsum(0).tolist()
    views = [
        (n, flat[start : start + w.numel()].view(w.shape)) for (n, w), start in zip(weights.items(), offsets, strict=False)
    ]

    def one_at_a_time():
        for name, view in views:
            gathered = view.clone()
            yield name, gathered
            gathered.fill_(float("nan"))

    transposed = [(n, w.t().contiguous().t() if w.ndim == 2 else w) for n, w in weights.items()]
    for given in (views, transposed, one_at_a_time()):
        engine.load_student_weights(another(engine, 5).items())
        engine.load_student_weights(given)
        for name, p in loaded(engine).items():
            assert torch.equal(p, expected[name]), name


def test_weights_stay_at_the_addresses_that_cuda_graphs_read(engine):
    def addresses():
        return {name: p.data_ptr() for name, p in runners(engine)["student"].get_model().named_parameters()}

    before = addresses()
    engine.load_student_weights(another(engine, 3).items())
    assert addresses() == before


def test_another_dtype_is_converted(engine):
    weights = {name: w.bfloat16() for name, w in another(engine, 6).items()}
    engine.load_student_weights(weights.items())
    check_policy(engine, {name: w.float() for name, w in weights.items()})


def test_a_prefix_cache_of_the_teacher_survives_a_sync(engine):
    prompts = [
        PairPrompt(teacher_token_ids=[7 + i % 40 for i in range(100)], student_token_ids=[9 + i % 40 for i in range(100)])
    ]
    sampling = dict(max_tokens=2, ignore_eos=True)
    engine.reset_prefix_cache()
    hits = []
    for sync in (False, False, True, False):
        if sync:
            engine.load_student_weights(another(engine, 7).items())
        [completion] = engine.generate(prompts, sampling=sampling)
        hits.append((completion.teacher_cached_tokens, completion.student_cached_tokens))
    assert hits == [(0, 0), (96, 96), (96, 0), (96, 96)]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), r"left 1 of the student's parameters .*model\.norm\.weight"),
        (lambda w: w.pop("model.layers.0.self_attn.k_proj.weight"), r"left 1 .*layers\.0\.self_attn\.k_proj\.weight"),
        (lambda w: w.pop("model.layers.1.mlp.up_proj.weight"), r"left 1 .*layers\.1\.mlp\.up_proj\.weight"),
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"][:-1]}), ""),
        (lambda w: w.update({"module.model.norm.weight": w.pop("model.norm.weight")}), ""),
    ],
    ids=["missing", "a part of qkv", "a part of gate and up", "another shape", "renamed"],
)
def test_a_sync_that_does_not_fit_is_refused_and_so_is_sampling(engine, spoil, message):
    weights = another(engine, 9)
    spoil(weights)
    with pytest.raises(Exception, match=message) as error:
        engine.load_student_weights(weights.items())
    assert not isinstance(error.value, KeyboardInterrupt)
    assert engine.state is EngineState.STALE
    with pytest.raises(RuntimeError, match=r"not to be sampled from \(the last sync failed"):
        engine.generate(PROMPT, sampling=dict(max_tokens=2))
    with pytest.raises(ValueError, match="partial=True"):
        engine.load_student_weights(weights.items(), partial=True)
    engine.load_student_weights(another(engine, 9).items())
    check_policy(engine, another(engine, 9))


def test_a_sync_that_stops_half_way_is_refused_by_the_worker_too(engine):
    """An interrupt leaves the front end's state stale; the worker itself refuses as well."""

    def interrupted():
        for n, entry in enumerate(another(engine, 10).items()):
            if n == 3:
                raise KeyboardInterrupt
            yield entry

    with pytest.raises(KeyboardInterrupt):
        engine.load_student_weights(interrupted())
    with pytest.raises(RuntimeError, match="the last sync did not finish"):
        engine.generate(PROMPT, sampling=dict(max_tokens=2))
    engine._state = EngineState.OPEN
    with pytest.raises(RuntimeError, match="the last weight sync of the student failed half way"):
        engine.generate(PROMPT, sampling=dict(max_tokens=2))
    engine.load_student_weights(another(engine, 10).items())
    check_policy(engine, another(engine, 10))


# -- requests that are given to `engine.llm` itself, and name no version of the weights ---------------------------------


def long_prompt(first: int) -> PairPrompt:
    """Return a prompt that fills blocks of both prefix caches."""
    return PairPrompt(teacher_token_ids=[first, *range(3, 43)], student_token_ids=[first, *range(43, 3, -1)])


def direct(engine: PairEngine, prompt: PairPrompt) -> list[int]:
    """Return the most likely completion of a request to `engine.llm`."""
    options = PairOptions(student_prompt_token_ids=prompt.student_token_ids).to_extra_args()
    params = checked_params(dict(max_tokens=12, temperature=0.0, ignore_eos=True, extra_args=options))
    [output] = engine.llm.generate([{"prompt_token_ids": prompt.teacher_token_ids}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def check_direct(engine: PairEngine, prompt: PairPrompt) -> None:
    """Compare a request to `engine.llm` with the same one on empty caches."""
    got = direct(engine, prompt)
    assert engine.reset_prefix_cache()
    [expected] = engine.generate([prompt], sampling=dict(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert got == expected.token_ids


def test_a_request_without_a_version_follows_a_sync(engine):
    for seed in (11, 12):
        direct(engine, long_prompt(5))  # fills the caches
        engine.load_student_weights(another(engine, seed).items())
        check_direct(engine, long_prompt(5))


def test_a_request_that_a_half_synced_student_refuses_leaves_nothing_behind(engine):
    """Regression: it stayed in the engine, and its blocks, which were never computed, in the prefix caches."""
    with pytest.raises(ValueError, match="left"):
        engine.load_student_weights(list(another(engine, 13).items())[:3])
    with pytest.raises(RuntimeError, match="the last weight sync of the student failed half way"):
        direct(engine, long_prompt(6))
    assert not engine._frontend.busy
    engine.load_student_weights(another(engine, 13).items())
    check_direct(engine, long_prompt(6))


def test_weights_that_another_handle_loads_never_meet_older_blocks(engine):
    """Regression: where no request had named a version, the student's prefix cache was that of older weights."""
    engine._frontend.scheduler.weights_version = None
    direct(engine, long_prompt(7))
    [version] = engine.llm.collective_rpc("load_student_weights", args=(dump_weights(another(engine, 14).items()),))
    with pytest.raises(RuntimeError, match=f"KV cache is of its weights version {version - 1}, and version {version} is"):
        direct(engine, long_prompt(7))
    direct(engine, long_prompt(7))  # the failed step emptied the caches
    assert engine.load_student_weights(another(engine, 15).items()) == version + 1
    check_direct(engine, long_prompt(7))


def test_weights_do_not_change_under_a_running_request(engine):
    engine._frontend.add("running", [7, 8, 9], checked_params(dict(max_tokens=4)))
    with pytest.raises(RuntimeError, match="unfinished requests; let them finish before a weight sync"):
        engine.load_student_weights(another(engine, 16).items())
    assert list(engine._frontend.finished())
    engine.load_student_weights(another(engine, 16).items())
    check_policy(engine, another(engine, 16))


class Fused(torch.nn.Module):
    """A vLLM model with one fused matrix and the bias of its experts: what a load reports, and in what names."""

    def __init__(self):
        super().__init__()
        self.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
        self.layers = torch.nn.ModuleDict({"0": torch.nn.Module()})
        self.layers["0"].gate_up_proj = torch.nn.Linear(2, 2, bias=False)
        self.layers["0"].e_score_correction_bias = torch.nn.Parameter(torch.zeros(2))

    def load_weights(self, named_tensors):
        return {name.replace("gate_proj", "gate_up_proj").replace(".up_proj", ".gate_up_proj") for name, _ in named_tensors}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (["gate_up_proj"], []),  # one tensor in the checkpoint, too: GLM-4
        (["gate_proj", "up_proj"], []),
        (["gate_proj"], ["layers.0.up_proj.weight"]),
        ([], ["layers.0.gate_up_proj.weight"]),
    ],
)
def test_a_load_of_fused_and_constant_parameters(given, missing):
    load = WeightLoad(Fused(), partial=False)
    load.add((f"layers.0.{name}.weight", torch.zeros(2, 2)) for name in given)
    with (
        pytest.raises(ValueError, match=f"left 1 of the student's parameters as they were.*{missing[0]}")
        if missing
        else (nullcontext())
    ):
        load.check_complete()
