"""One table of sampling arguments, and every entry that shares it."""

import inspect

import pytest

from osd import OptimalSamplingV1, OSDGeneration
from osd.data.settings import CompareConfig, GenerateConfig
from osd.sampling_args import REFUSED, TAKEN, checked_sampling, derived_seeds
from osd.train import OSDConfig

BAD = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 1e-3}, "temperature"),  # vLLM would raise it to 0.01
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "16"}, "max_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"bad_words": "w7"}, "bad_words"),
    ({"logit_bias": {"w7": 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"structured_outputs": {"regx": "a"}}, "structured_outputs"),
    ({"extra_args": {"osd": {}}}, "extra_args"),
    ({"stop": "w7", "detokenize": False}, "detokenize"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"logprobs": 3}, "record"),
    ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"max_new_tokens": 8}, "max_tokens"),
    ({"temprature": 1.0}, "did you mean 'temperature'"),
]
ids = [" ".join(f"{key}={value}" for key, value in given.items()) for given, _ in BAD]


def test_every_argument_of_vllm_is_taken_or_refused():
    from vllm import SamplingParams

    names = {name for name in inspect.signature(SamplingParams).parameters if not name.startswith("_")}
    assert names <= TAKEN.keys() | REFUSED.keys(), "an argument of vLLM that osd/sampling_args.py does not list"
    assert not TAKEN.keys() & REFUSED.keys()


def test_vllm_accepts_the_values_of_the_table():
    from vllm import SamplingParams

    numbers = {"max_tokens": 9, "min_tokens": 1, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0, "seed": 2**40}
    penalties = {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.2}
    tokens = {"stop_token_ids": [7], "logit_bias": {"7": -1}, "allowed_token_ids": [7], "ignore_eos": True, "logprobs": None}
    given = numbers | penalties | tokens | {"stop": ["a"], "bad_words": ["b"]}
    checked = checked_sampling(given)
    assert checked["logit_bias"] == {7: -1.0}
    assert "logprobs" not in checked
    params = SamplingParams(**checked)
    assert {name: getattr(params, name) for name in ("top_p", "stop", "seed")} == {"top_p": 0.9, "stop": ["a"], "seed": 2**40}


@pytest.mark.parametrize(("given", "message"), BAD, ids=ids)
def test_bad_arguments_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        checked_sampling(given)


def training(given):
    OSDConfig("out", use_cpu=True, bf16=False, generation_kwargs=given)


def drop_in(given):
    OSDGeneration(None, None, None, pair=None, generation_kwargs=given)


def generating(given):
    GenerateConfig(model_name_or_path="a", teacher_model_name_or_path="b", input="i", output="o", generation_kwargs=given)


def comparing(given):
    CompareConfig(model_name_or_path="a", teacher_model_name_or_path="b", input="i", output="o", generation_kwargs=given)


def sampling(given):
    OptimalSamplingV1.generate(None, ["w7"], **given)  # refused before the sampler is used


ENTRIES = [training, drop_in, generating, comparing, sampling]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("given", "message"), BAD, ids=ids)
def test_every_entry_refuses_before_models_load(entry, given, message):
    with pytest.raises(ValueError, match=message):
        entry(given)


@pytest.mark.parametrize("entry", [training, drop_in, generating, comparing])
@pytest.mark.parametrize("given", [{"seed": 0}, {"seed": 1}, {"n": 2}])
def test_one_seed_or_several_completions_are_refused_with_the_fix(entry, given):
    with pytest.raises(ValueError, match=rf"generation_kwargs\['{next(iter(given))}'\].*(seed|num_|rows)"):
        entry(given)


@pytest.mark.parametrize("field", [{"top_p": 1.5}, {"min_p": 2.0}, {"top_k": -3}, {"repetition_penalty": 0.0}])
def test_fields_of_the_entries_are_checked_too(field):
    paths = dict(model_name_or_path="a", teacher_model_name_or_path="b", input="i", output="o")
    for entry in (
        lambda: OSDConfig("out", use_cpu=True, bf16=False, **field),
        lambda: OSDGeneration(None, None, None, pair=None, **field),
        lambda: GenerateConfig(**paths, **field),
        lambda: CompareConfig(**paths, **field),
    ):
        with pytest.raises(ValueError, match=next(iter(field))):
            entry()


@pytest.mark.parametrize("entry", [training, drop_in, generating, comparing])
def test_generation_kwargs_are_checked_against_the_fields(entry):
    with pytest.raises(ValueError, match="min_tokens=100000 is above max_tokens"):
        entry({"min_tokens": 100_000})


def test_harmless_values_pass():
    for entry in (training, generating):
        entry({"n": 1, "logprobs": None, "seed": None, "stop": []})


def test_repetitions_of_a_prompt_get_seeds_of_their_own():
    seeds = derived_seeds(3, "aaba")
    assert seeds[0] == seeds[2] == 3  # does not depend on the other prompts
    assert len({seeds[0], seeds[1], seeds[3]}) == 3
    assert derived_seeds(3, "aaa") == [seeds[0], seeds[1], seeds[3]]
    assert derived_seeds(4, "aa")[1] != seeds[1]
    assert derived_seeds(None, "aa") == [None, None]
