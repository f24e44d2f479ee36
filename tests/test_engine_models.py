"""Pairs of other models: padded vocabularies, other end-of-sequence ids or tokenizers, broken or equal weights; closing."""

from __future__ import annotations

import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.distributed import cleanup_dist_env_and_memory

from osd.core import MixingConfig
from osd.engine.backend.layers import without_cached_states
from osd.engine.backend.two_models import workers
from osd.engine.backend.worker import PairWorker
from osd.engine.engine import PairConfig, PairEngine, PairPrompt
from tests.architectures import save_model
from tests.exact import completion_logits, q_star, reference
from tests.pairs import runners, start
from tests.tiny import save_tokenizer, tiny_engine_kwargs, tiny_model

pytestmark = pytest.mark.gpu

PROMPTS = [PairPrompt(teacher_token_ids=[7 + i, 9, 10, 11], student_token_ids=[30, 31 + i]) for i in range(6)]
RECURRENT = "Mamba-2 and attention"
SAMPLING = dict(max_tokens=30, temperature=1.0, ignore_eos=True)


def pair(teacher: Path, student: Path, **config: Any) -> PairEngine:
    return start((teacher, student), config)


def shut_down(llm: LLM) -> None:
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize(("teacher_vocab", "student_vocab"), [(64, 80), (80, 64)])
def test_vocabularies_padded_apart_mix_over_the_shared_ids(tmp_path, teacher_vocab, student_vocab):
    teacher = tiny_model(tmp_path / "t", vocab=teacher_vocab, tokenizer_vocab=60, seed=1)
    student = tiny_model(tmp_path / "s", vocab=student_vocab, tokenizer_vocab=60, seed=2)
    with pair(teacher, student) as engine:
        completions = engine.generate(PROMPTS, sampling=SAMPLING, hidden=True)
        head, bias = engine.teacher_lm_head()
        head = head.clone().cpu()
    assert head.shape == (teacher_vocab, 64)
    assert bias is None
    models = reference(teacher), reference(student)
    for prompt, c in zip(PROMPTS, completions, strict=True):
        assert max(c.token_ids) < 64
        logq = q_star(models, (prompt.teacher_token_ids, prompt.student_token_ids), c.token_ids, vocab=64)
        logq = logq.gather(-1, torch.tensor(c.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(c.record.logq.double(), logq, atol=5e-4, rtol=1e-3)
        # The recorded hidden state and the shared output layer are the teacher's policy.
        logits = c.record.teacher_hidden_TH @ head.T
        expected = completion_logits(models[0], prompt.teacher_token_ids, c.token_ids)
        torch.testing.assert_close(logits.double(), expected, atol=1e-3, rtol=1e-3)


def test_different_tokenizers_are_refused_naming_the_first_id(tmp_path):
    teacher, student = tiny_model(tmp_path / "t"), tiny_model(tmp_path / "s")
    data = json.loads((student / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["zebra"] = vocabulary.pop("w40")
    (student / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="id 40 is 'w40' to the teacher and 'zebra' to the student"):
        pair(teacher, student)


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_missing_model_is_refused_by_name(tmp_path, tiny_pair, side):
    paths = dict(zip(("teacher", "student"), tiny_pair, strict=True)) | {side: tmp_path / "nowhere"}
    with pytest.raises(ValueError, match=f"{side}='.*nowhere': the folder does not exist"):
        pair(**paths)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"engine_kwargs": {"max_modle_len": 5}}, "max_modle_len"),
        ({"engine_kwargs": {"worker_cls": "x"}}, "worker_cls.*set by the pair"),
        ({"engine_kwargs": {"speculative_config": {"method": "ngram"}}}, "speculative_config.*not supported"),
        ({"engine_kwargs": {"pipeline_parallel_size": 2}}, "pipeline"),
        ({"engine_kwargs": {"watermark_config": {"key": 1}}}, "watermark_config.*not supported"),
        ({"student_kwargs": {"tensor_parallel_size": 2}}, "cannot differ"),
        ({"num_speculative_tokens": 17}, "num_speculative_tokens=17 is not a whole number from 0 to 16"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens=-1"),
        ({"num_speculative_tokens": "some"}, "num_speculative_tokens='some'.*'auto'"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens=True"),
    ],
)
def test_engine_arguments_the_pair_cannot_take_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PairConfig(teacher="t", student="s", **kwargs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can cache states")
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_states_are_not_cached_on_a_cpu(tmp_path, tiny_pair, side):
    paths = dict(zip(("teacher", "student"), map(str, tiny_pair), strict=True)) | {side: str(save_model(tmp_path, RECURRENT))}
    found = without_cached_states(PairConfig(**paths))
    assert [found.side_kwargs(name).get("enable_prefix_caching") for name in (side, *({*paths} - {side}))] == [False, None]
    with pytest.raises(
        ValueError, match=rf"the {side} '{tmp_path}' has recurrent .* set engine_kwargs\['enable_prefix_caching'"
    ):
        pair(**paths, engine_kwargs={"enable_prefix_caching": True})


def test_a_recurrent_teacher_with_drafts_is_refused(tmp_path, tiny_pair):
    """The state would be wrong, and nothing would show it."""
    with pytest.raises(ValueError, match=f"num_speculative_tokens: the teacher '{tmp_path}' has recurrent .*_tokens=0"):
        pair(save_model(tmp_path, RECURRENT), tiny_pair[1], num_speculative_tokens=2)


def test_states_that_go_back_by_drafts_are_not_cached(tmp_path, tiny_pair):
    paths = {"teacher": str(tiny_pair[0]), "student": str(save_model(tmp_path, RECURRENT))}
    found = without_cached_states(PairConfig(**paths, num_speculative_tokens=2))
    assert found.student_kwargs == {"enable_prefix_caching": False}
    assert found.teacher_kwargs == {}
    with pytest.raises(ValueError, match=r"go back by a rejected draft .* set student_kwargs\['enable_prefix_caching'\]=False"):
        pair(**paths, num_speculative_tokens=2, student_kwargs={"enable_prefix_caching": True})


@pytest.mark.skipif(torch.cuda.is_available() or torch.cpu._is_amx_tile_supported(), reason="vLLM's kernels there can")
def test_drafts_for_a_teacher_with_latent_attention_are_refused_on_a_cpu(tmp_path, tiny_pair):
    """Its kernel would verify each draft without the tokens before it: 7 nats off, and nothing would show it."""
    teacher = save_model(tmp_path, "latent attention")
    with pytest.raises(ValueError, match=f"num_speculative_tokens: the teacher '{tmp_path}' has latent attention"):
        pair(teacher, tiny_pair[1], num_speculative_tokens=2)


def test_a_completion_ends_at_either_models_eos(tmp_path):
    teacher, student = tiny_model(tmp_path / "t", seed=1), tiny_model(tmp_path / "s", seed=2)
    config = json.loads((student / "generation_config.json").read_text())
    (student / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [20, 21]}))
    with pair(teacher, student) as engine:
        sampling = dict(max_tokens=200, temperature=1.0, seed=1)
        completions = engine.generate(PROMPTS * 4, sampling=[sampling | {"seed": i} for i in range(24)])
        unending = engine.generate(PROMPTS, sampling=sampling | {"ignore_eos": True})
    ends = {c.token_ids[-1] for c in completions if c.finish_reason == "stop"}
    assert ends == {2, 20, 21}
    for c in completions:
        assert not {2, 20, 21} & set(c.token_ids[:-1])
    assert {len(c.token_ids) for c in unending} == {200}


def test_custom_logits_processors_act_on_requests_without_other_parameters(tiny_pair):
    processors = {"logits_processors": ["tests.processors:Only"]}
    with pair(*tiny_pair, teacher_kwargs=processors) as engine:
        completions = engine.generate(PROMPTS, sampling=SAMPLING)
    assert {token for c in completions for token in c.token_ids} == {20, 21}


@pytest.mark.parametrize("alpha", [pytest.param(0.0, marks=pytest.mark.slow), 0.3, pytest.param(1.0, marks=pytest.mark.slow)])
def test_equal_policies_mix_to_themselves_at_every_alpha(tmp_path, alpha):
    model = tiny_model(tmp_path / "m", seed=1)
    prompts = [PairPrompt(teacher_token_ids=p.teacher_token_ids, student_token_ids=p.teacher_token_ids) for p in PROMPTS]
    with pair(model, model) as engine:
        completions = engine.generate(prompts, sampling=SAMPLING, alpha=alpha) + engine.generate(prompts, sampling=SAMPLING)
    for c in completions:
        torch.testing.assert_close(c.record.logq, c.record.logp_theta, atol=1e-4, rtol=0)
        torch.testing.assert_close(c.record.logq, c.record.logp_teacher, atol=1e-4, rtol=0)
        assert max(c.record.kl_theta.abs().max(), c.record.kl_teacher.abs().max()) < 1e-4


def test_alpha_0_is_the_student_and_alpha_1_the_teacher_exactly(tiny_pair):
    """Greedy tokens equal those of plain vLLM engines of each model."""
    teacher, student = tiny_pair
    plain = {}
    for side, path in (("teacher", teacher), ("student", student)):
        llm = LLM(model=str(path), **tiny_engine_kwargs())
        requests = [{"prompt_token_ids": getattr(p, f"{side}_token_ids")} for p in PROMPTS]
        outputs = llm.generate(requests, SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True), use_tqdm=False)
        plain[side] = [list(o.outputs[0].token_ids) for o in outputs]
        shut_down(llm)
        del llm
    for alpha, side in ((1.0, "teacher"), (0.0, "student")):
        with pair(teacher, student, mixing=MixingConfig(alpha_method="fixed", fixed_alpha=alpha)) as engine:
            completions = engine.generate(PROMPTS, sampling=dict(temperature=0.0, max_tokens=60, ignore_eos=True))
        assert [c.token_ids for c in completions] == plain[side]


@pytest.mark.parametrize("penalties", [{}, {"presence_penalty": 0.3, "repetition_penalty": 1.1}], ids=["plain", "penalties"])
@pytest.mark.parametrize("broken", ["teacher", "student"])
@pytest.mark.parametrize("drafts", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_nan_ends_one_request_naming_the_side_and_the_others_go_on(tmp_path, tiny_pair, broken, penalties, drafts):
    """One token's embedding is NaN on one side: the request that reads it fails, and leaves no NaN in a KV cache."""
    paths = dict(zip(("teacher", "student"), tiny_pair, strict=True))
    model = AutoModelForCausalLM.from_pretrained(paths[broken], dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = float("nan")
    save_tokenizer(tmp_path, 64)
    model.save_pretrained(tmp_path)
    paths[broken] = tmp_path
    poisoned = PairPrompt(teacher_token_ids=[7, 63, 9], student_token_ids=[7, 63, 9])
    sampling = dict(max_tokens=30, temperature=0.0, ignore_eos=True, logit_bias={63: -100.0})
    sampling |= penalties
    with pair(**paths, engine_kwargs=dict(num_gpu_blocks_override=12), num_speculative_tokens=drafts) as engine:
        alone = engine.generate(PROMPTS, sampling=sampling)
        mixed = engine.generate([*PROMPTS[:3], poisoned, *PROMPTS[3:]], sampling=sampling)
        after = engine.generate(PROMPTS, sampling=sampling)
    assert mixed[3].finish_reason == "error"
    assert mixed[3].error == f"NaN in the {broken}'s logits"
    assert mixed[3].token_ids == []
    expected = [c.token_ids for c in alone]
    assert [c.token_ids for i, c in enumerate(mixed) if i != 3] == expected
    assert [c.token_ids for c in after] == expected


def test_a_row_without_a_distribution_ends_alone_beside_a_larger_teacher(tmp_path):
    """No id beyond the student's vocabulary reaches its embedding or the record, and no masked token is returned."""
    teacher = tiny_model(tmp_path / "teacher", vocab=96, seed=1, tokenizer_vocab=64)
    student = tiny_model(tmp_path / "student", seed=2)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.model.embed_tokens.weight.data[40] = float("nan")
    model.save_pretrained(teacher)
    good, nan = (PairPrompt(teacher_token_ids=[7, token], student_token_ids=[7, 8]) for token in (9, 40))
    allowed = dict(max_tokens=4, seed=1, allowed_token_ids=[20, 21])
    masked = dict(max_tokens=4, allowed_token_ids=[20], stop_token_ids=[20], min_tokens=2)
    with start([teacher, student]) as engine:
        completions = engine.generate([good, nan, good], sampling=[allowed, dict(max_tokens=4), masked])
    assert [c.error for c in completions] == [
        None,
        "NaN in the teacher's logits",
        "the sampling parameters leave no token that can be drawn",
    ]
    assert len(completions[0].token_ids) == 4
    assert set(completions[0].token_ids) <= {20, 21}
    assert completions[1].token_ids == completions[2].token_ids == []


def test_options_of_another_front_end_that_no_model_can_take_end_one_request(tiny_pair):
    wrong = [dict(student_prompt_token_ids=[-1, 5]), dict(student_prompt_token_ids=["a"]), dict(alpha="x")]
    with start(tiny_pair) as engine:
        params = [SamplingParams(max_tokens=4, extra_args={"osd": options}) for options in [*wrong, {}]]
        outputs = engine.llm.generate([{"prompt_token_ids": [7, 8]}] * 4, params, use_tqdm=False)
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "error", "error", "length"]
        # The teacher alone neither needs the student's prompt nor is penalised for it.
        prompt = PairPrompt(teacher_token_ids=[7, 8], student_token_ids=[])
        far = PairPrompt(teacher_token_ids=[7, 8], student_token_ids=[5000])
        sampling = dict(max_tokens=4, seed=3, repetition_penalty=1.5)
        alone = engine.generate([prompt, far], sampling=sampling, teacher_only=True)
        assert alone[0].error is None
        assert alone[0].token_ids == alone[1].token_ids


def test_engines_of_different_seeds_draw_differently_from_one_torch_state(tiny_pair):
    prompt = PairPrompt(teacher_token_ids=[7, 8], student_token_ids=[9])
    drawn = []
    for seed in (0, 0, 1):
        with start(tiny_pair, seed=seed) as engine:
            torch.manual_seed(5)
            engine.check([prompt], sampling=dict(max_tokens=16))  # draws nothing
            drawn.append(engine.generate([prompt], sampling=dict(max_tokens=16, ignore_eos=True))[0].token_ids)
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_failing_clean_up_does_not_replace_the_callers_exception(tiny_pair, monkeypatch):
    def fail(*args):
        raise RuntimeError("clean-up failed")

    def interrupt(tokens):
        raise KeyboardInterrupt

    engine = start(tiny_pair)
    frontend, close = engine._frontend, engine._frontend.close
    monkeypatch.setattr(frontend, "abort", fail)
    monkeypatch.setattr(frontend, "close", fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.generate(
                [PairPrompt(teacher_token_ids=[7], student_token_ids=[8])], sampling=dict(max_tokens=4), on_finished=interrupt
            )
    finally:
        close()


def test_a_second_engine_in_the_same_process_is_refused(tiny_pair):
    with pair(*tiny_pair), pytest.raises(RuntimeError, match="another PairEngine"):
        pair(*tiny_pair)


def held_by(engine: PairEngine) -> dict[str, weakref.ref]:
    """A weight, a KV cache and the runner of each side."""
    held = {}
    for side, runner in runners(engine).items():
        weight = runner.get_model().model.layers[0].mlp.down_proj.weight
        held |= {f"{side} {n}": weakref.ref(x) for n, x in (("weight", weight), ("cache", runner.kv_caches[0]), ("", runner))}
    return held


def compiled() -> dict[str, Any]:
    """Compiled models, as on a GPU: vLLM registers them with torch's compiler, which kept 20 of a GPU's 80 GB."""
    if torch.cuda.is_available():
        return {"enforce_eager": False}
    return {"enforce_eager": False, "compilation_config": {"backend": "eager"}}  # traced, but no kernels made of it


def compiled_models() -> int:
    gc.collect()
    return sum(isinstance(thing, TorchCompileWithNoGuardsWrapper) for thing in gc.get_objects())


def test_a_closed_engine_leaves_nothing_behind(tiny_pair):
    engine = pair(*tiny_pair, engine_kwargs=compiled())
    engine.generate(PROMPTS, sampling=SAMPLING)
    held = held_by(engine)
    engine.close()
    assert not [name for name, ref in held.items() if ref() is not None]


def test_an_engine_closed_by_an_error_gives_its_memory_back(tiny_pair, monkeypatch):
    """Even if something still references the models: a traceback holds frames, and a notebook holds the traceback."""
    steps = itertools.count()

    def fail(*args: Any) -> None:
        if next(steps) == 3:
            raise RuntimeError("in the middle")
        return sample_tokens(*args)

    engine = pair(*tiny_pair, engine_kwargs=compiled())
    worker = engine._frontend.worker
    caches = [ref for name, ref in held_by(engine).items() if name.endswith("cache")]
    models = [runner.get_model() for runner in runners(engine).values()]
    sample_tokens = worker.sample_tokens
    monkeypatch.setattr(worker, "sample_tokens", fail)
    with pytest.raises(RuntimeError, match="in the middle"), engine:
        engine.generate(PROMPTS, sampling=SAMPLING)
    assert not any(parameter.numel() for model in models for parameter in model.parameters())
    assert not any(ref() is not None for ref in caches)


@pytest.mark.parametrize(
    "stage",
    [
        pytest.param("load_model", marks=pytest.mark.slow),
        pytest.param("initialize_from_config", marks=pytest.mark.slow),
        "_warm_up_sampler",
        pytest.param(None, marks=pytest.mark.slow),
    ],
)
def test_an_engine_that_does_not_start_leaves_nothing_behind(tiny_pair, monkeypatch, stage):
    """A user who reads the error changes an argument and tries again, with the memory of the first try."""
    before = compiled_models()
    small = compiled()
    if stage is None:
        small["kv_cache_memory_bytes"] = 4096  # refused by vLLM, outside of the worker
    else:
        monkeypatch.setattr(PairWorker, stage, failing_after(getattr(PairWorker, stage)))
    with pytest.raises((RuntimeError, ValueError)) as error:
        pair(*tiny_pair, engine_kwargs=small)
    assert compiled_models() == before
    assert not workers
    monkeypatch.undo()
    with pair(*tiny_pair) as engine:
        assert engine.generate(PROMPTS, sampling=SAMPLING)
    del error


def failing_after(method: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        raise RuntimeError("out of memory")

    return fail


@pytest.mark.slow
def test_process_groups_made_before_an_engine_outlive_it(tiny_pair):
    """Those of a trainer, which goes on; also after a start that failed."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="cache"):
            pair(*tiny_pair, engine_kwargs={"kv_cache_memory_bytes": 4096})
        assert torch.distributed.is_initialized()
        for _ in range(2):
            with pair(*tiny_pair) as engine:
                assert engine.generate(PROMPTS, sampling=SAMPLING)
            assert torch.distributed.is_initialized()
            torch.distributed.barrier()
    finally:
        cleanup_dist_env_and_memory()


def test_a_plain_vllm_engine_goes_on_after_a_pair(tiny_pair):
    llm = LLM(str(tiny_pair[0]), **tiny_engine_kwargs())
    prompts, sampling = [{"prompt_token_ids": [7, 9, 10]}], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)

    def sample() -> list[int]:
        return llm.generate(prompts, sampling, use_tqdm=False)[0].outputs[0].token_ids

    before = sample()
    try:
        with pytest.raises(ValueError, match="cache"):
            pair(*tiny_pair, engine_kwargs={"kv_cache_memory_bytes": 4096})
        assert sample() == before
        with pair(*tiny_pair) as engine:
            assert engine.generate(PROMPTS, sampling=SAMPLING)
        assert sample() == before
    finally:
        shut_down(llm)
