"""Families of models that people distil now: one engine each, with the family on both sides. Float32; bound 2e-3 nats."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from osd.validate_models import check_student_can_train, experts
from tests.architectures import FAMILIES, reference, save_model
from tests.pairs import cramped, errors, moved, on_disk, run_with_random_arrivals, start
from tests.training import compare_supervision

pytestmark = pytest.mark.gpu

IN_CI = ["LFM2 MoE"]  # convolutions, queries with a dimension of heads, experts with a bias
NOT_ON_CPUS = {
    "Jamba": "vLLM's CPU build has no kernel of Mamba-1",
    "Nemotron 3": "vLLM's CPU build has no experts without a gate",
    "Qwen3.5": "vLLM imports torchvision with it, and has no float32 of it on a CPU",
    "Qwen3.5 MoE": "vLLM imports torchvision with it, and has no float32 of it on a CPU",
}
STATEFUL = ["LFM2 MoE", "Falcon-H1", "Granite 4 with experts", "Jamba", "Nemotron 3", "Qwen3.5", "Qwen3.5 MoE"]


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
    teacher, student = map(reference, paths)
    if torch.cuda.is_available() and experts(teacher.config) and not hasattr(torch.ops._moe_C, "topk_softmax"):
        pytest.skip("this build of vLLM has no kernels of experts")
    caching = torch.cuda.is_available() or family not in STATEFUL
    with start(paths, cramped(34, 50, 24), max_model_len=192, enable_prefix_caching=caching) as engine:
        results = run_with_random_arrivals(engine, 5, count=12, temperature=1.0, ignore_eos=True)
        assert max(errors((teacher, student), results).values()) < 2e-3
        if family == "DeepSeek-V3":
            with pytest.raises(ValueError, match="has latent attention"):
                check_student_can_train(engine.config)
            return
        live = moved(student)
        engine.load_student_weights(on_disk(engine, live))
        results = run_with_random_arrivals(engine, 6, count=6, temperature=1.0, ignore_eos=True)
        assert max(errors((teacher, live), results).values()) < 2e-3
        assert errors((teacher, student), results)["logp_theta"] > 0.05  # planted: the weights before
        compare_supervision(engine, paths[1], tmp_path)
