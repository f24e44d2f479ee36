"""Weights that change under running requests: every token is that of one version of the student, whose number it has."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.core.sched.interface import PauseState

from osd.engine.request import PairOptions
from osd.engine.wire import ReturnedRows, returned, split_rows
from tests.architectures import reference, save_model
from tests.exact import completion_logits
from tests.pairs import cramped, hard_prompts, start

pytestmark = pytest.mark.gpu

PROMPTS = hard_prompts(12)
LENGTH = 40
SETUPS = {
    "chunked prompts, few blocks": (None, cramped(34, 50)),
    "drafts": (None, {**cramped(34, 50), "num_speculative_tokens": 3}),
    "recurrent": ("Mamba-2 and attention", {**cramped(34, 50, 24), "max_model_len": 192, "enable_prefix_caching": False}),
}


@pytest.fixture(
    scope="module", params=[name if name != "recurrent" else pytest.param(name, marks=pytest.mark.slow) for name in SETUPS]
)
def setup(request) -> tuple[str | None, dict[str, Any]]:
    return SETUPS[request.param]


@pytest.fixture(scope="module")
def model_paths(setup, tiny_pair, tmp_path_factory):
    if (kind := setup[0]) is None:
        return tiny_pair
    root = tmp_path_factory.mktemp("running")
    return save_model(root / "teacher", kind, seed=3), save_model(root / "student", kind, seed=4)


@pytest.fixture(scope="module")
def engine(setup, model_paths):
    config = dict(setup[1])
    engine_kwargs = {name: config.pop(name) for name in ("max_model_len", "enable_prefix_caching") if name in config}
    with start(model_paths, config, **engine_kwargs) as engine:
        yield engine


@pytest.fixture(scope="module")
def models(model_paths):
    """The teacher, and three students."""
    teacher, student = map(reference, model_paths)
    students = [student]
    for seed in (1, 2):
        torch.manual_seed(seed)
        students.append(deepcopy(students[-1]))
        for parameter in students[-1].parameters():
            parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
    return teacher, students


def step(engine, outputs: dict[str, Any]) -> None:
    outputs |= {output.request_id: output.outputs[0] for output in engine.llm.llm_engine.step() if output.finished}


def sampled_under_updates(engine, students, steps: int = 25) -> list[tuple[Any, ReturnedRows]]:
    """Sample `PROMPTS`; after every so many steps pause, load the next student, and go on."""
    core, scheduler = engine._frontend._core, engine._frontend.scheduler
    scheduler.weights_version = None  # as on a server, whose requests name none
    outputs: dict[str, Any] = {}
    for number, prompt in enumerate(PROMPTS):
        options = returned(PairOptions(student_prompt_token_ids=prompt.student_token_ids, record=True))
        params = SamplingParams(max_tokens=LENGTH, seed=number, ignore_eos=True, extra_args=options.to_extra_args())
        engine.llm.llm_engine.add_request(str(number), {"prompt_token_ids": list(prompt.teacher_token_ids)}, params)
    for student in students:
        if student is not students[0]:
            scheduler.set_pause_state(PauseState.PAUSED_ALL)
            while scheduler.has_requests() or core.batch_queue:
                step(engine, outputs)
            load(engine, student)
            scheduler.set_pause_state(PauseState.UNPAUSED)
        for _ in range(steps):
            step(engine, outputs)
    while engine._frontend.busy:
        step(engine, outputs)
    completions = [outputs[str(number)] for number in range(len(PROMPTS))]
    return [(c, split_rows(c.routed_experts)) for c in completions]


def load(engine, student) -> None:
    [engine.weights_version] = engine._frontend.call("load_student_weights", student.named_parameters(), False)


@pytest.fixture(autouse=True)
def first_student(engine, models):
    """Every test begins with the first student, and an empty cache."""
    load(engine, models[1][0])
    assert engine.reset_prefix_cache()


def logp(model, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """Log-probability of each token, [T]."""
    logp_TV = completion_logits(model, prompt, token_ids).log_softmax(-1)
    return logp_TV.gather(-1, torch.tensor(token_ids)[:, None])[:, 0]


def errors(models, results, first: int) -> dict[str, float]:
    """The largest difference of each side's recorded log-probabilities from transformers' at the recorded version, in nats."""
    teacher, students = models
    column, worst = {"theta": 2, "teacher": 3}, {"theta": 0.0, "teacher": 0.0}
    for prompt, (completion, rows) in zip(PROMPTS, results, strict=True):
        of_versions = torch.stack([logp(student, prompt.student_token_ids, completion.token_ids) for student in students])
        version_T = torch.from_numpy(rows.version_T) - first
        expected = {
            "theta": of_versions.gather(0, version_T[None])[0],
            "teacher": logp(teacher, prompt.teacher_token_ids, completion.token_ids),
        }
        for side, logp_T in expected.items():
            recorded_T = torch.from_numpy(rows.values_TR[:, column[side]].copy()).double()
            worst[side] = max(worst[side], (recorded_T - logp_T).abs().max().item())
    return worst


def test_every_token_is_of_the_version_that_its_record_names(engine, models):
    first = engine.weights_version
    results = sampled_under_updates(engine, models[1])
    spans = [len(set(rows.version_T.tolist())) for _, rows in results]
    assert max(spans) == 3, "no completion spans three versions: nothing was tested"
    assert spans.count(2) > 2
    assert all(len(rows.version_T) == LENGTH for _, rows in results)
    assert max(errors(models, results, first).values()) < 1e-3


def test_kv_of_older_weights_would_be_found(engine, models, monkeypatch):
    """The planted error: the student's cache is called empty, and is not."""
    student, first = engine._frontend.scheduler.student, engine.weights_version
    with monkeypatch.context() as planted:
        planted.setattr(student, "reset_prefix_cache", lambda *_, **__: setattr(student, "resets", student.resets + 1))
        found = errors(models, sampled_under_updates(engine, models[1]), first)
    assert found["theta"] > 0.05
    assert found["teacher"] < 1e-3


def test_kv_of_older_weights_is_refused(engine, models, monkeypatch):
    """A step that would read it raises, and ends every request."""
    with monkeypatch.context() as planted:
        planted.setattr(engine._frontend.scheduler.student, "reset_prefix_cache", lambda *_, **__: True)
        with pytest.raises(RuntimeError, match="the student's KV cache is of its weights version"):
            sampled_under_updates(engine, models[1])
