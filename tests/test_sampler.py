"""OptimalSamplingV1, the offline API: text in, completions and α out, in the order of the prompts."""

from __future__ import annotations

import json

import pytest

from optimal_sampling import OptimalSamplingV1, save_alpha_history
from osd.sampler import alpha_stats
from tests.tiny import tiny_engine_kwargs

PROMPTS = ["w10 w11 w12", "w20", [{"role": "user", "content": "w30 w31"}]]
THETA_PROMPTS = ["w12", "w20 w21 w22", "w33"]


@pytest.fixture(scope="module")
def sampler(tiny_pair):
    teacher, student = map(str, tiny_pair)
    with OptimalSamplingV1(teacher, student, track_alpha_stats=True, **tiny_engine_kwargs()) as sampler:
        yield sampler


def test_the_output_is_complete_and_in_order(sampler):
    output = sampler.generate(PROMPTS, THETA_PROMPTS, max_tokens=20, seed=1)
    for i, ids in enumerate(output.generated_ids):
        assert output.num_tokens[i] == len(ids) == len(output.alpha_history[i]) == output.alpha_stats[i]["count"]
        assert output.alpha_stats[i] == alpha_stats(output.alpha_history[i])
        assert all(0 <= alpha <= 1 for alpha in output.alpha_history[i])
        assert output.generated_texts[i].strip() == sampler.engine.tokenizer.decode(ids, skip_special_tokens=True)
    alone = [sampler.generate([p], [t], max_tokens=20, seed=1) for p, t in zip(PROMPTS, THETA_PROMPTS, strict=True)]
    assert [o.generated_ids[0] for o in alone] == output.generated_ids


def test_each_side_reads_its_own_prompt(sampler):
    """With the same prompt on both sides the record says so; with another prompt for the student it differs."""
    same = sampler.generate(PROMPTS[:1], max_tokens=10, temperature=0.0, ignore_eos=True)
    other = sampler.generate(PROMPTS[:1], THETA_PROMPTS[:1], max_tokens=10, temperature=0.0, ignore_eos=True)
    assert same.records[0].logp_teacher[0] != other.records[0].logp_theta[0]
    assert same.alpha_history != other.alpha_history


def test_system_prompts_reach_one_side_only(sampler, monkeypatch):
    plain = sampler._pairs(["w10"], ["w10"])[0]
    monkeypatch.setattr(sampler, "teacher_system_prompt", "w40 w41")
    pair = sampler._pairs(["w10"], ["w10"])[0]
    assert pair.teacher_token_ids == [40, 41, 10]
    assert pair.student_token_ids == plain.student_token_ids == [10]
    monkeypatch.setattr(sampler, "enable_chat_template", True)
    chat = sampler._pairs(["w10"], ["w10"])[0]
    assert sampler.engine.tokenizer.decode(chat.teacher_token_ids).startswith("<bos> system w40 w41")
    assert "w40" not in sampler.engine.tokenizer.decode(chat.student_token_ids)


def test_without_optimal_sampling_the_teacher_samples_alone(sampler):
    output = sampler.generate(PROMPTS, THETA_PROMPTS, max_tokens=10, use_optimal_sampling=False)
    assert {alpha for history in output.alpha_history for alpha in history} == {1.0}
    for record in output.records:
        assert (record.logq - record.logp_teacher).abs().max() < 1e-4
        assert record.logp_theta.isnan().all()


def test_alpha_history_is_saved_whole(sampler, tmp_path):
    output = sampler.generate(PROMPTS, max_tokens=8)
    path = tmp_path / "runs" / "alpha.json"
    save_alpha_history(output, path)
    rows = json.loads(path.read_text())["completions"]
    assert [row["alpha"] for row in rows] == output.alpha_history
    assert [row["token_ids"] for row in rows] == output.generated_ids
    assert [p.name for p in path.parent.iterdir()] == ["alpha.json"]


def test_tracking_off_keeps_no_record(sampler, monkeypatch, tmp_path):
    monkeypatch.setattr(sampler, "track_alpha_stats", False)
    output = sampler.generate(PROMPTS, max_tokens=8)
    assert output.alpha_history is None
    assert output.records is None
    with pytest.raises(ValueError, match="track_alpha_stats=True"):
        save_alpha_history(output, tmp_path / "alpha.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(prompts=PROMPTS, theta_prompts=THETA_PROMPTS[:2]), "theta_prompts has 2 entries for 3 prompts"),
        (dict(prompts="w10"), "prompts is one text"),
        (dict(prompts=["w10", ""]), r"prompts\[1\]: the prompt is empty"),
        (dict(prompts=["w10"], theta_prompts=[""]), r"theta_prompts\[0\]: the prompt is empty"),
        (dict(prompts=["w10 " * 300]), "teacher's prompt has 300 tokens"),
        (dict(prompts=["w10"], theta_prompts=["w10 " * 300]), "student's prompt has 300 tokens"),
        (dict(prompts=["w10"], max_tokens=0), "max_tokens"),
        (dict(prompts=["w10"], temperature=-1.0), "temperature"),
        (dict(prompts=["w10"], top_p=2.0), "top_p"),
    ],
)
def test_bad_calls_are_refused_before_sampling(sampler, call, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(**call)
    assert not sampler.engine._engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(alpha_method="kl_symetry"), "kl_symmetry"),
        (dict(alpha_min=-0.1), "alpha_min"),
        (dict(alpha_min=0.8, alpha_max=0.2), "alpha_m"),
        (dict(alpha_method="fixed", fixed_alpha=1.5), "fixed_alpha"),
        (dict(max_modle_len=12), "max_modle_len"),
        (dict(mixture="linear"), "linear"),
    ],
)
def test_bad_settings_are_refused_before_any_model_loads(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimalSamplingV1("no-such-teacher", "no-such-student", **kwargs)
