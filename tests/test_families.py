"""Families of models that people distil now: one engine each, with the family on both sides.

Float32, bound 2e-3 nats on every log-probability; where vLLM has no float32, bfloat16 and a bound on the mean of a
completion.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from osd.validate_models import check_student_can_train, experts
from tests.architectures import FAMILIES, reference, save_model
from tests.pairs import compare_caches, cramped, errors, moved, on_disk, run_with_random_arrivals, start
from tests.training import compare_supervision

pytestmark = pytest.mark.gpu

IN_CI = ["LFM2 MoE"]  # convolutions, queries with a dimension of heads, experts with a bias
NOT_ON_CPUS = {
    "Jamba": "vLLM's CPU build has no kernel of Mamba-1",
    "Nemotron 3": "vLLM's CPU build has no experts without a gate",
    "Qwen3.5": "vLLM imports torchvision with it, which PyPI has not for CPUs",
    "Qwen3.5 MoE": "vLLM imports torchvision with it, which PyPI has not for CPUs",
}
HALF = ["Qwen3-Next", "Qwen3.5", "Qwen3.5 MoE"]
STATEFUL = ["LFM2 MoE", "Falcon-H1", "Granite 4 with experts", "Jamba", "Nemotron 3", *HALF]


def parameter(family: str) -> Any:
    marks = [] if family in IN_CI else [pytest.mark.slow]
    if family in NOT_ON_CPUS:
        marks.append(pytest.mark.skipif(not torch.cuda.is_available(), reason=NOT_ON_CPUS[family]))
    return pytest.param(family, marks=marks)


@pytest.mark.parametrize("family", map(parameter, FAMILIES))
def test_a_family_is_sampled_synced_and_supervised(family, tmp_path):
    """Chunked prefill, prompts that differ, arrivals at random; then new weights; then the loss of a teacher elsewhere."""
    if torch.cuda.is_available() and family == "DeepSeek-V3":
        pytest.skip("vLLM 0.33 has no float32 of it on a GPU")
    paths = [save_model(tmp_path / name, family, seed) for name, seed in (("teacher", 3), ("student", 4))]
    dtype = torch.bfloat16 if family in HALF else torch.float32
    teacher, student = (reference(path).to(dtype).float() for path in paths)
    bound, of = (2e-3, torch.amax) if dtype == torch.float32 else (0.25, torch.mean)

    def worst(*models: Any) -> dict[str, float]:
        return errors(models, results, of=of)

    if torch.cuda.is_available() and experts(teacher.config) and not hasattr(torch.ops._moe_C, "topk_softmax"):
        pytest.skip("this build of vLLM has no kernels of experts")
    caching = torch.cuda.is_available() or family not in STATEFUL
    kwargs: dict[str, Any] = dict(dtype=str(dtype).removeprefix("torch."), enable_prefix_caching=caching)
    if torch.cuda.is_available() and not find_spec("flashinfer"):  # which vLLM takes on a Hopper, and depends on
        kwargs["gdn_prefill_backend"] = "triton"
    with start(paths, cramped(34, 50, 24), max_model_len=192, **kwargs) as engine:
        results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
        assert max(worst(teacher, student).values()) < bound
        if torch.cuda.is_available() or family not in HALF:  # on a CPU vLLM keeps their states in float32
            compare_caches(engine)
        if family == "DeepSeek-V3":
            with pytest.raises(ValueError, match="has latent attention"):
                check_student_can_train(engine.config)
            return
        live = moved(student).to(dtype).float()
        engine.load_student_weights(on_disk(engine, live))
        results = run_with_random_arrivals(engine, 6, count=6, temperature=1.0, ignore_eos=True)
        assert max(worst(teacher, live).values()) < bound
        assert worst(teacher, student)["logp_theta"] > 0.6  # planted: the weights before
        compare_supervision(engine, paths[1], tmp_path, tolerance=1e-3 if dtype == torch.float32 else 0.03)
