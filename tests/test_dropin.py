"""OSDGeneration in trainers that are not ours: the examples, run on tiny models."""

import inspect
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import dropin
from examples.dropin import bare_loop, distillation_trainer, grpo

ROWS = [{"prompt": f"w{i} w{i + 1}", "teacher_prompt": f"w{i} w40 w{i + 2}", "answer": f"w{i + 20}"} for i in range(7, 11)]


@pytest.fixture
def flags(tiny_pair, tmp_path, monkeypatch):
    for module in (dropin, bare_loop, distillation_trainer, grpo):
        monkeypatch.setattr(module, "ROWS", ROWS)
    models = ["--teacher", str(tiny_pair[0]), "--student", str(tiny_pair[1])]
    return [*models, "--cpu", "--output", str(tmp_path / "out"), "--learning-rate", "1e-2"]


def recorded(monkeypatch, trainer_class):
    """Return every batch of a trainer with the record of its completions."""
    seen, score = [], trainer_class._generate_and_score_completions

    def watched(self, inputs):
        output = score(self, inputs)
        seen.append((inputs, output, self.vllm_generation.last_batch))
        return output

    monkeypatch.setattr(trainer_class, "_generate_and_score_completions", watched)
    return seen


def test_trls_distillation_trainer_learns_from_q_star(flags, tiny_pair, monkeypatch):
    seen = recorded(monkeypatch, distillation_trainer.OptimalSampling)
    trainer = distillation_trainer.main([*flags, "--steps", "12"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert [batch.weights_version for *_, batch in seen] == list(range(1, 13))
    for _, output, batch in seen:
        for i, completion in enumerate(batch.completions):
            assert output["completion_ids"][i][output["completion_mask"][i].bool()].tolist() == completion.token_ids
            assert completion.teacher_prompt_tokens == 3
            assert completion.record.alpha.max() > 0


def test_the_subclass_has_ten_lines():
    lines = inspect.getsource(distillation_trainer.OptimalSampling).splitlines()
    assert sum(bool(line.strip()) for line in lines[1:]) <= 10


def test_log_q_star_is_grpos_behaviour_policy(flags, monkeypatch):
    """The ratio that GRPO weights a completion with is π_θ/q*, both as recorded."""
    seen = recorded(monkeypatch, grpo.OptimalSamplingGRPO)
    grpo.main([*flags, "--steps", "3"])
    assert len(seen) == 3
    for inputs, output, batch in seen:
        ratios = output["importance_sampling_ratio"]
        for i, (row, completion) in enumerate(zip(inputs, batch.completions, strict=True)):
            record, length = completion.record, len(completion.token_ids)
            assert completion.student_prompt_tokens == len(row["prompt"].split())
            torch.testing.assert_close(output["sampling_per_token_logps"][i, :length], record.logp_draw)
            torch.testing.assert_close(output["old_per_token_logps"][i, :length], record.logp_theta, rtol=0, atol=1e-3)
            ratio = (record.logp_theta - record.logp_draw).sum().exp().clamp(max=2.0)
            torch.testing.assert_close(ratios[i, 0], ratio, rtol=2e-3, atol=1e-6)
        assert (ratios < 0.9).any()  # q* is not the policy


def test_grpos_reward_is_of_the_answer():
    assert grpo.names_the_answer(["It is Paris.", "No idea"], ["paris", "42"]) == [1, 0]


@pytest.mark.slow
def test_a_bare_loop_brings_the_student_closer(flags, tiny_pair, tmp_path):
    losses = bare_loop.main([*flags, "--steps", "12"])
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_pair[1], tmp_path / "out"))
    assert not before.lm_head.weight.equal(after.lm_head.weight)


def test_the_bare_loop_is_short():
    assert len(Path(bare_loop.__file__).read_text().splitlines()) < 80
