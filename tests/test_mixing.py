"""Tests of q, its diagnostics and the record against float64 definitions, and of MixingConfig."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osd import alpha as alpha_module
from osd import log_partition as log_partition_module
from osd.core import ALPHA_METHODS, RECORD_FIELDS, MixingConfig, TokenRecord
from osd.mixing import Mixture, mix, record_rows
from tests.definitions import INF, ess, kl, log_q, randn

NAN = float("nan")
CONFIGS = [
    *(MixingConfig(alpha_method=method) for method in ALPHA_METHODS),
    MixingConfig(alpha_method="fixed", fixed_alpha=0.0),
    MixingConfig(alpha_method="fixed", fixed_alpha=1.0),
    MixingConfig(alpha_method="fixed", fixed_alpha=0.3, mixture="linear"),
    MixingConfig(alpha_method="fixed", fixed_alpha=1.0, mixture="linear"),
    MixingConfig(alpha_method="entropy", mixture="linear"),
]


def fixed(alpha: float, mixture: str = "geometric") -> MixingConfig:
    return MixingConfig(alpha_method="fixed", fixed_alpha=alpha, mixture=mixture)


def masked(seed: int, rows: int, vocab: int) -> Tensor:
    z = 2 * randn(seed, rows, vocab)
    z[randn(seed + 1, rows, vocab) > 0.8] = -INF
    z[:, 0] = 0.0
    return z


def language_like(seed: int, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Return logits of two models that mostly agree, with rows from diffuse to nearly certain."""
    theta = 2 * randn(seed, rows, vocab)
    theta[:, :8] += 4 + 3 * randn(seed + 1, rows, 8) * torch.linspace(0, 2, rows)[:, None]
    return theta, theta + 0.7 * randn(seed + 2, rows, vocab)


PAIRS = {
    "random": (2 * randn(1, 6, 40), 2 * randn(2, 6, 40)),
    "language": language_like(3, 6, 2000),
    "near": (3 * randn(6, 6, 40), 3 * randn(6, 6, 40) + 1e-3 * randn(7, 6, 40)),
    "masked": (masked(8, 6, 40), masked(10, 6, 40)),
    "student masked": (masked(12, 6, 40), 2 * randn(13, 6, 40)),
    "disjoint": (randn(14, 6, 8).index_fill(1, torch.arange(4), -INF), randn(15, 6, 8).index_fill(1, torch.arange(4, 8), -INF)),
    "far": (30 * randn(16, 6, 40), 30 * randn(17, 6, 40)),
}


def check(mixture: Mixture, theta: Tensor, teacher: Tensor, config: MixingConfig) -> None:
    expected = log_q(theta, teacher, mixture.alpha_B, config)
    p, t = theta.double().log_softmax(-1), teacher.double().log_softmax(-1)

    def close(value: Tensor | None, exact: Tensor, atol: float = 1e-5, rtol: float = 1e-5) -> None:
        assert value is not None
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, atol=atol, rtol=rtol)

    # Float32 logits of size 60 are known to 4e-6.
    close(mixture.logq_BV, expected, atol=3e-5)
    close(mixture.kl_theta_B, kl(expected, p))
    close(mixture.kl_teacher_B, kl(expected, t))
    close(mixture.ess_theta_B, ess(p, expected), rtol=1e-4)
    close(mixture.ess_teacher_B, ess(t, expected), rtol=1e-4)
    close(mixture.entropy_q_B, torch.special.entr(expected.exp()).sum(-1))
    close(mixture.lse_theta_B, torch.logsumexp(theta.double(), -1))
    close(mixture.lse_teacher_B, torch.logsumexp(teacher.double(), -1))
    assert mixture.bad_side_B.tolist() == [0] * len(theta)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mixture} {c.alpha_method} {c.fixed_alpha}")
@pytest.mark.parametrize("name", PAIRS)
def test_q_and_its_diagnostics_match_the_definitions(name: str, config: MixingConfig) -> None:
    theta, teacher = PAIRS[name]
    check(mix(theta, teacher, config), theta, teacher, config)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mixture} {c.alpha_method} {c.fixed_alpha}")
def test_mix_matches_the_definitions_without_value_dependent_control_flow(
    config: MixingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (alpha_module, log_partition_module):
        monkeypatch.setattr(module, "blind", lambda values: True)
    for theta, teacher in PAIRS.values():
        check(mix(theta, teacher, config), theta, teacher, config)


def test_mix_accepts_bfloat16_views() -> None:
    """The engine passes bfloat16 views, cut to the shared vocabulary."""
    theta, teacher = PAIRS["language"]
    wide_theta, wide_teacher = (
        torch.cat([theta, randn(1, 6, 64)], 1).bfloat16(),
        torch.cat([teacher, randn(1, 6, 16)], 1).bfloat16(),
    )
    theta, teacher = wide_theta[:, :2000], wide_teacher[:, :2000]
    check(mix(theta, teacher, CONFIGS[0]), theta.float(), teacher.float(), CONFIGS[0])


def chernoff(theta: Tensor, teacher: Tensor, alpha: Tensor) -> Tensor:
    """Return -log Z(alpha) in float64."""
    return -torch.logsumexp(
        torch.lerp(theta.double().log_softmax(-1), teacher.double().log_softmax(-1), alpha.double()[:, None]), -1
    )


def test_both_divergences_equal_the_chernoff_information() -> None:
    """Also checks the consequence TV(q, pi_theta) <= sqrt(C / 2) (Pinsker)."""
    for theta, teacher in (language_like(1, 40, 3000), (3 * randn(2, 40, 30), 3 * randn(3, 40, 30))):
        mixture = mix(theta, teacher, MixingConfig())
        information = chernoff(theta, teacher, mixture.alpha_B).float()
        assert ((mixture.alpha_B > 0) & (mixture.alpha_B < 1)).all()
        torch.testing.assert_close(mixture.kl_theta_B, information, atol=2e-5, rtol=2e-4)
        torch.testing.assert_close(mixture.kl_teacher_B, information, atol=2e-5, rtol=2e-4)
        distance = (mixture.logq_BV.exp() - theta.softmax(-1)).abs().sum(-1) / 2
        assert (distance <= (information / 2).sqrt() + 1e-6).all()
        assert distance.max() > 0.05


def record_of(mixture: Mixture, theta: Tensor, teacher: Tensor) -> TokenRecord:
    token = mixture.logq_BV.argmax(-1)
    logp_draw = mixture.logq_BV.gather(-1, token[:, None])[:, 0]
    values = record_rows(mixture, theta, teacher, 1.0, token, logp_draw)
    return TokenRecord(values_TR=values, teacher_hidden_TH=None, weights_version=0)


def test_chernoff_gap_detects_a_wrong_alpha() -> None:
    """Power: gaps are below 1e-4 for the right alpha, and above 1e-3 at every token if alpha is off by 0.05."""
    theta, teacher = 3 * randn(2, 200, 300), 3 * randn(3, 200, 300)
    config = MixingConfig()
    clean = mix(theta, teacher, config)
    assert len(record_of(clean, theta, teacher).chernoff_gap(config)) == 200
    assert record_of(clean, theta, teacher).chernoff_gap(config).max() < 1e-4
    planted = mix(theta, teacher, config, alpha_B=clean.alpha_B + 0.05)
    assert record_of(planted, theta, teacher).chernoff_gap(config).min() > 1e-3


def test_chernoff_gap_excludes_clamped_tokens_and_other_methods() -> None:
    theta, teacher = 3 * randn(2, 50, 30), 3 * randn(3, 50, 30)
    config = MixingConfig(alpha_min=0.47, alpha_max=0.53)
    record = record_of(mix(theta, teacher, config), theta, teacher)
    inside = (record.alpha > 0.4700001) & (record.alpha < 0.5299999)
    assert 0 < inside.sum() < 50
    assert len(record.chernoff_gap(config)) == inside.sum()
    assert record.chernoff_gap(config).max() < 1e-4
    assert (record.kl_theta - record.kl_teacher).abs().max() > 1e-2
    assert len(record.chernoff_gap(fixed(0.5))) == 0


def test_truncating_the_student_to_its_top_20_changes_q() -> None:
    """Power: the truncation changes q by a thousand times the tolerance of 3e-5 that the comparison above allows."""
    theta, teacher = language_like(5, 20, 3000)
    cut = theta.masked_fill(theta < theta.topk(20, -1).values[:, -1:], -INF)
    whole, truncated = mix(theta, teacher, MixingConfig()), mix(cut, teacher, MixingConfig())
    distance = (whole.logq_BV.exp() - truncated.logq_BV.exp()).abs().sum(-1) / 2
    assert distance.mean() > 0.03
    with pytest.raises(AssertionError):
        torch.testing.assert_close(truncated.logq_BV.exp(), whole.logq_BV.exp(), atol=3e-5, rtol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mixture} {c.alpha_method} {c.fixed_alpha}")
def test_mixture_of_equal_policies_is_that_policy(config: MixingConfig) -> None:
    z = torch.cat([3 * randn(1, 4, 50), masked(2, 4, 50)])
    mixture = mix(z, z.clone(), config)
    torch.testing.assert_close(mixture.logq_BV, z.log_softmax(-1), atol=3e-6, rtol=1e-6)
    for value in (mixture.kl_theta_B, mixture.kl_teacher_B):
        assert value.max() < 1e-6
    for value in (mixture.ess_theta_B, mixture.ess_teacher_B):
        assert value.min() > 1 - 1e-5


@pytest.mark.parametrize("mixture", ["geometric", "linear"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_and_1_give_the_policies(alpha: float, mixture: str) -> None:
    theta, teacher = masked(1, 8, 60), masked(3, 8, 60)
    own, other = (theta, teacher) if alpha == 0 else (teacher, theta)
    result = mix(theta, teacher, fixed(alpha, mixture))
    assert torch.equal(result.logq_BV == -INF, own == -INF)
    torch.testing.assert_close(result.logq_BV, own.log_softmax(-1), atol=3e-6, rtol=1e-6)
    assert torch.equal(result.logq_BV.argmax(-1), own.argmax(-1))
    own_kl, other_kl = (result.kl_theta_B, result.kl_teacher_B) if alpha == 0 else (result.kl_teacher_B, result.kl_theta_B)
    assert own_kl.max() < 1e-6
    misses = ((own > -INF) & (other == -INF)).any(-1)
    assert torch.equal(other_kl == INF, misses)
    assert misses.any()


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_argmax_at_alpha_0_and_1_survives_rounding_ties(alpha: float) -> None:
    """0.1 and the next float32 become equal when log 50000 is subtracted. The argmax of q must still be the larger logit."""
    z = torch.zeros(1, 50000)
    z[0, 7] = 0.1
    z[0, 40000] = torch.nextafter(z[0, 7], torch.tensor(1.0))
    assert (z - torch.logsumexp(z, -1, keepdim=True)).argmax() == 7  # plain subtraction does produce the tie
    assert mix(z, z.clone(), fixed(alpha)).logq_BV.argmax() == 40000


def test_disjoint_supports_give_the_student() -> None:
    theta, teacher = PAIRS["disjoint"]
    for config in (MixingConfig(alpha_min=0.25), fixed(0.6)):
        mixture = mix(theta, teacher, config)
        assert torch.allclose(mixture.alpha_B, torch.tensor(0.25 if config.alpha_method != "fixed" else 0.6))
        torch.testing.assert_close(mixture.logq_BV, theta.log_softmax(-1))
        assert (mixture.kl_theta_B == 0).all()
        assert (mixture.kl_teacher_B == INF).all()
        assert (mixture.ess_teacher_B == 0).all()
    torch.testing.assert_close(mix(theta, teacher, fixed(1.0)).logq_BV, teacher.log_softmax(-1))


@pytest.mark.parametrize("mask", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("method", ["kl_symmetry", "ess_balance", "fixed"])
def test_large_finite_masks_equal_minus_infinity(mask: float, method: str) -> None:
    """Covers masks on one side, the other side and both. The other tokens must keep their probabilities."""
    theta, teacher = 2 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    results = []
    for value in (mask, -torch.inf):
        masked_theta, masked_teacher = theta.clone(), teacher.clone()
        masked_theta[0, 7] = masked_theta[2, 9] = value
        masked_teacher[1, 7] = masked_teacher[2, 9] = value
        results.append(mix(masked_theta, masked_teacher, MixingConfig(alpha_method=method)))
    for field in dataclasses.fields(results[0]):
        finite, infinite = (getattr(result, field.name) for result in results)
        if finite is not None:
            torch.testing.assert_close(finite, infinite, atol=1e-6, rtol=1e-6)


def test_temperature_divides_the_logits_and_zero_means_one() -> None:
    theta, teacher = PAIRS["random"]
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.1, 1.3])
    mixture = mix(theta, teacher, MixingConfig(), temperature_B=temperature)
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
    check(mixture, theta / divisor, teacher / divisor, MixingConfig())
    by_hand = mix(theta / divisor, teacher / divisor, MixingConfig())
    torch.testing.assert_close(mixture.alpha_B, by_hand.alpha_B, atol=1e-6, rtol=0)
    cold, one = mix(theta, teacher, MixingConfig(), temperature_B=0.0), mix(theta, teacher, MixingConfig())
    assert torch.equal(cold.logq_BV, one.logq_BV)
    half = mix(theta, teacher, MixingConfig(), temperature_B=0.5)
    torch.testing.assert_close(half.alpha_B, mix(theta * 2, teacher * 2, MixingConfig()).alpha_B)
    assert (half.alpha_B - one.alpha_B).abs().max() > 1e-3
    for bad in (-1.0, NAN, INF):
        with pytest.raises(ValueError, match=r"temperature_B=.*at least 0"):
            mix(theta, teacher, MixingConfig(), temperature_B=bad)


def test_given_alpha_overrides_the_configuration() -> None:
    theta, teacher = PAIRS["random"]
    config = MixingConfig(alpha_max=0.6)
    given_alpha = torch.tensor([0.9, NAN, 0.0, 1.0, NAN, 0.2])
    mixture, solved = mix(theta, teacher, config, alpha_B=given_alpha), mix(theta, teacher, config)
    unset = given_alpha.isnan()
    torch.testing.assert_close(mixture.alpha_B, torch.where(unset, solved.alpha_B, given_alpha), atol=1e-6, rtol=0)
    torch.testing.assert_close(mixture.logq_BV.double(), log_q(theta, teacher, mixture.alpha_B, config), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"alpha_B has shape \(5,\).*\(6,\)"):
        mix(theta, teacher, config, alpha_B=torch.zeros(5))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.mixture} {c.alpha_method} {c.fixed_alpha}")
def test_bad_row_is_nan_and_reports_its_side(config: MixingConfig) -> None:
    theta, teacher = 2 * randn(1, 9, 30), 2 * randn(2, 9, 30)
    clean = mix(theta, teacher, config)
    theta[1, 3], theta[2], theta[3, 0] = NAN, -INF, INF
    teacher[4, 3], teacher[5], teacher[6, 29] = NAN, -INF, INF
    theta[7, 0], teacher[7, 0] = INF, INF
    sides = [0, 1, 1, 1, 2, 2, 2, 3, 0]
    mixture = mix(theta, teacher, config)
    assert mixture.bad_side_B.tolist() == sides
    assert mixture.bad_side_B.dtype == torch.int8
    bad = torch.tensor(sides) > 0
    for name, value in vars(mixture).items():
        if name != "bad_side_B":
            assert value[bad].isnan().all(), name
            torch.testing.assert_close(value[~bad], getattr(clean, name)[~bad], atol=3e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([2, 7, 200]), st.floats(-6, 1), st.sampled_from(CONFIGS))
def test_q_is_a_distribution_with_independent_rows(seed: int, vocab: int, noise: float, config: MixingConfig) -> None:
    theta = 4 * randn(seed, 5, vocab)
    teacher = theta + 10**noise * randn(seed + 1, 5, vocab)
    theta[4, -1] = -INF
    together = mix(theta, teacher, config)
    torch.testing.assert_close(together.logq_BV.exp().sum(-1), torch.ones(5), atol=1e-5, rtol=0)
    for value in (together.kl_theta_B, together.kl_teacher_B, together.entropy_q_B):
        assert (value >= -1e-6).all()
    for value in (together.ess_theta_B, together.ess_teacher_B):
        assert ((value >= 0) & (value <= 1)).all()
    flipped = mix(theta.flip(0), teacher.flip(0), config)
    for name, value in vars(together).items():
        if value is not None:
            torch.testing.assert_close(vars(flipped)[name].flip(0), value, atol=1e-4, rtol=1e-4)


def test_results_survive_the_next_call_and_inputs_are_unchanged() -> None:
    theta, teacher = PAIRS["random"]
    for config in CONFIGS:
        before = theta.clone(), teacher.clone()
        mixture = mix(theta, teacher, config, temperature_B=0.7)
        kept = {name: value.clone() for name, value in vars(mixture).items()}
        mix(teacher, theta, MixingConfig(alpha_method="ess_balance"), temperature_B=1.5)
        for name, value in vars(mixture).items():
            assert torch.equal(value, kept[name]), name
        assert torch.equal(theta, before[0])
        assert torch.equal(teacher, before[1])


def test_record_rows_match_the_definitions() -> None:
    theta, teacher = PAIRS["language"][0].bfloat16(), PAIRS["language"][1].bfloat16()
    temperature = torch.tensor([0.0, 1.0, 0.5, 2.0, 0.7, 1.3])
    mixture = mix(theta, teacher, MixingConfig(), temperature_B=temperature)
    token, draw = torch.tensor([3, 1, 4, 1, 5, 1999]), -torch.rand(6)
    values = record_rows(mixture, theta, teacher, temperature, token, draw)
    assert values.shape == (6, len(RECORD_FIELDS))
    record = TokenRecord(values_TR=values, teacher_hidden_TH=torch.zeros(6, 5), weights_version=3)
    assert len(record) == 6
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None].double()

    def at_token(z: Tensor) -> Tensor:
        return z.gather(-1, token[:, None])[:, 0].float()

    expected = {
        "alpha": mixture.alpha_B,
        "logq": at_token(mixture.logq_BV),
        "logp_theta": at_token((theta.double() / divisor).log_softmax(-1)),
        "logp_teacher": at_token((teacher.double() / divisor).log_softmax(-1)),
        "kl_theta": mixture.kl_theta_B,
        "kl_teacher": mixture.kl_teacher_B,
        "entropy_q": mixture.entropy_q_B,
        "ess_theta": mixture.ess_theta_B,
        "ess_teacher": mixture.ess_teacher_B,
        "logp_draw": draw,
    }
    assert tuple(expected) == RECORD_FIELDS
    for name, value in expected.items():
        column = getattr(record, name)
        torch.testing.assert_close(column, value, atol=1e-5, rtol=1e-6)
        assert column.data_ptr() == values[:, RECORD_FIELDS.index(name)].data_ptr()  # a view


def test_token_record_rejects_wrong_shapes() -> None:
    good = torch.zeros(4, len(RECORD_FIELDS))
    for values in (good[:, :-1], good.double(), good[0]):
        with pytest.raises(ValueError, match=r"values_TR is .*use float32 \[T, 10\]"):
            TokenRecord(values_TR=values, teacher_hidden_TH=None, weights_version=0)
    with pytest.raises(ValueError, match=r"teacher_hidden_TH is \(3, 8\).*T = 4"):
        TokenRecord(values_TR=good, teacher_hidden_TH=torch.zeros(3, 8), weights_version=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"alpha_method": "kl_symetry"},
            "alpha_method='kl_symetry' is unknown (did you mean 'kl_symmetry'?); use one of kl_symmetry, ess",
        ),
        (
            {"alpha_method": "zzz"},
            "alpha_method='zzz' is unknown; use one of kl_symmetry, ess_balance, entropy, reverse_kl_symmetry, fixed",
        ),
        ({"alpha_method": None}, "alpha_method=None is unknown"),
        (
            {"mixture": "geometrical"},
            "mixture='geometrical' is unknown (did you mean 'geometric'?); use one of geometric, linear",
        ),
        ({"alpha_min": -0.1}, "alpha_min=-0.1 is not a weight; use a number from 0 (student) to 1 (teacher)"),
        ({"alpha_max": 1.1}, "alpha_max=1.1 is not a weight"),
        ({"alpha_max": math.nan}, "alpha_max=nan is not a weight"),
        ({"alpha_min": "0.2"}, "alpha_min='0.2' is not a weight"),
        ({"alpha_min": True}, "alpha_min=True is not a weight"),
        ({"alpha_min": 0.7, "alpha_max": 0.3}, "alpha_min=0.7 is above alpha_max=0.3; swap them"),
        ({"alpha_method": "fixed", "fixed_alpha": 2}, "fixed_alpha=2 is not a weight"),
        (
            {"alpha_method": "fixed", "fixed_alpha": 0.9, "alpha_max": 0.8},
            "fixed_alpha=0.9 is outside [alpha_min, alpha_max] = [0.0, 0.8]",
        ),
        *(
            ({"alpha_method": m, "mixture": "linear"}, f"mixture='linear' cannot be used with alpha_method='{m}'")
            for m in ("kl_symmetry", "ess_balance", "reverse_kl_symmetry")
        ),
    ],
)
def test_bad_configurations_are_rejected_with_the_fix(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MixingConfig(**values)
    with pytest.raises(ValueError, match=re.escape(message)):
        MixingConfig.from_dict(values)


def test_configuration_round_trips_and_rejects_unknown_keys() -> None:
    config = MixingConfig(alpha_method="fixed", fixed_alpha=0.2, alpha_min=0.1, alpha_max=0.9, mixture="linear")
    assert MixingConfig.from_dict(config.to_dict()) == config
    assert MixingConfig.from_dict({}) == MixingConfig()
    with pytest.raises(
        ValueError, match=re.escape("unknown mixing option 'alpha_mim' (did you mean 'alpha_min'?); use alpha_method, ")
    ):
        MixingConfig.from_dict({"alpha_mim": 0.1})


def test_fixed_alpha_without_effect_warns() -> None:
    with pytest.warns(UserWarning, match="fixed_alpha=0.2 has no effect with alpha_method='kl_symmetry'"):
        MixingConfig(fixed_alpha=0.2)
