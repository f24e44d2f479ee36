"""OptimalSamplingV1, the offline API: text in, completions and α out, in the order of the prompts."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from optimal_sampling import OptimalSamplingV1, save_alpha_history
from osd.sampler import _hint_at_eager, alpha_stats
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
    for record in output.records:  # the columns that OptimalSamplingOutput documents
        assert (record.logq - record.logp_teacher).abs().max() < 1e-4
        assert record.kl_teacher.abs().max() < 1e-4
        assert (record.ess_teacher - 1).abs().max() < 1e-4
        assert record.entropy_q.isfinite().all()
        for name in ("logp_theta", "kl_theta", "ess_theta"):
            assert getattr(record, name).isnan().all()


# -- several completions, token ids, rows -------------------------------------------------------------------------------


def test_n_completions_per_prompt_differ_and_are_in_prompt_order(sampler):
    output = sampler.generate(PROMPTS, THETA_PROMPTS, max_tokens=12, n=3, seed=5)
    assert len(output) == 9
    assert output.n == 3
    for i in range(3):
        ids = [tuple(sample.token_ids) for sample in output[3 * i : 3 * i + 3]]
        assert len(set(ids)) == 3
        assert [sample.sample for sample in output[3 * i : 3 * i + 3]] == [0, 1, 2]
        assert output[3 * i].prompt == PROMPTS[i]
        assert output[3 * i + 2].theta_prompt == THETA_PROMPTS[i]
    # The first completion is that of n=1, and giving a prompt three times is the same as n=3.
    assert output.generated_ids[::3] == sampler.generate(PROMPTS, THETA_PROMPTS, max_tokens=12, seed=5).generated_ids
    repeated = sampler.generate(PROMPTS[:1] * 3, THETA_PROMPTS[:1] * 3, max_tokens=12, seed=5)
    assert repeated.generated_ids == output.generated_ids[:3]


def test_errors_number_the_prompts_as_they_were_given(sampler):
    with pytest.raises(ValueError, match="prompt 1: the teacher's prompt has 300 tokens"):
        sampler.generate(["w10", "w10 " * 300], n=4)


def test_token_ids_are_prompts(sampler):
    ids = sampler.generate([[10, 11, 12]], [[12]], max_tokens=8, seed=1)
    texts = sampler.generate(PROMPTS[:1], THETA_PROMPTS[:1], max_tokens=8, seed=1)
    assert ids.generated_ids == texts.generated_ids


def test_token_ids_take_no_system_prompt(sampler, monkeypatch):
    monkeypatch.setattr(sampler, "theta_system_prompt", "w40")
    with pytest.raises(ValueError, match=r"theta_prompts\[0\]: token ids cannot be given a system prompt"):
        sampler.generate([[10, 11]])


def test_rows_are_the_columns(sampler):
    output = sampler.generate(PROMPTS, max_tokens=6, seed=2)
    assert [row.text for row in output] == output.generated_texts
    last = output[-1]
    assert last == output[2]
    assert (last.token_ids, last.num_tokens) == (output.generated_ids[2], output.num_tokens[2])
    assert last.record is output.records[2]
    assert (last.alpha_history, last.finish_reason) == (output.alpha_history[2], output.finish_reasons[2])
    with pytest.raises(IndexError):
        output[3]


# -- each side's own template -------------------------------------------------------------------------------------------


def test_each_side_is_rendered_with_its_own_template(sampler, monkeypatch):
    theta_template = "{% if thinking %}w60 {% endif %}{% for m in messages %}w61 {{ m['content'] }} {% endfor %}"
    monkeypatch.setattr(sampler.theta_tokenizer, "chat_template", theta_template)
    chat = [{"role": "user", "content": "w30"}]
    with pytest.warns(UserWarning, match="different chat templates"):
        pair = sampler._pairs([chat], [chat])[0]
    assert pair.student_token_ids == [61, 30]
    assert pair.teacher_token_ids == [1, 5, 30, 2, 1, 6]
    monkeypatch.setattr(sampler, "theta_chat_template_kwargs", {"thinking": True})
    assert sampler._pairs([chat], [chat])[0].student_token_ids == [60, 61, 30]
    monkeypatch.setattr(sampler.teacher_tokenizer, "chat_template", theta_template)
    assert sampler._pairs([chat], [chat])[0].teacher_token_ids == [61, 30]


def test_the_student_has_a_tokenizer_of_its_own(sampler, tiny_pair):
    assert sampler.theta_tokenizer is not sampler.teacher_tokenizer
    assert str(tiny_pair[1]) in sampler.theta_tokenizer.name_or_path


# -- the file of α ------------------------------------------------------------------------------------------------------


def test_alpha_history_is_saved_whole(sampler, tmp_path):
    output = sampler.generate(PROMPTS, max_tokens=8)
    path = tmp_path / "runs" / "alpha.json"
    save_alpha_history(output, path)
    saved = json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON
    rows = saved["completions"]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert saved["settings"]["mixing"] == sampler.engine.mixing.to_dict()
    assert saved["settings"]["sampling"]["max_tokens"] == 8
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


def test_tqdm_can_be_turned_off(sampler, monkeypatch):
    shown = []
    generate = sampler.engine.generate
    monkeypatch.setattr(sampler.engine, "generate", lambda *a, **kw: shown.append(kw["progress"]) or generate(*a, **kw))
    sampler.generate(PROMPTS[:1], max_tokens=1)
    sampler.generate(PROMPTS[:1], max_tokens=1, use_tqdm=False)
    assert shown == [True, False]


def test_a_start_that_compiles_on_a_cpu_is_hinted_at(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="enforce_eager=True"):
        _hint_at_eager({"dtype": "float32"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _hint_at_eager({"enforce_eager": True})


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
        (dict(prompts=[10, 11]), "prompts is one prompt"),
        (dict(prompts=[{"role": "user", "content": "w10"}]), "prompts is one prompt"),
        (dict(prompts=["w10"], n=2, temperature=0), "equal completions"),
        (dict(prompts=["w10"], logprobs=3), "record"),
    ],
)
def test_bad_calls_are_refused_before_sampling(sampler, call, message):
    with pytest.raises(ValueError, match=message):
        sampler.generate(**call)
    assert not sampler.engine._frontend.busy


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(alpha_method="kl_symetry"), "kl_symmetry"),
        (dict(alpha_min=-0.1), "alpha_min"),
        (dict(alpha_min=0.8, alpha_max=0.2), "alpha_m"),
        (dict(alpha_method="fixed", fixed_alpha=1.5), "fixed_alpha"),
        (dict(max_modle_len=12), "max_modle_len"),
        (dict(mixture="linear"), "linear"),
        (dict(engine_kwargs={"max_num_seqs": 8}), r"given directly, as OptimalSamplingV1\(..., max_num_seqs=8"),
        (dict(temperature=0.5), "temperature=0.5 is a sampling argument"),
        (dict(chat_template_kwargs={"tokenize": False}), "is set by OSD"),
    ],
)
def test_bad_settings_are_refused_before_any_model_loads(kwargs, message):
    with pytest.raises(ValueError, match=message):
        OptimalSamplingV1("no-such-teacher", "no-such-student", **kwargs)
