"""OSD: optimal sampling distillation.

Every token is drawn from q* ∝ π_θ^(1-α)·π_t^α, with α chosen per token so that q* is equally far, in KL, from the student
π_θ and the teacher π_t; both models decode together inside one vLLM engine, each reading its own prompt.

The names below are loaded on first use, so that ``import osd`` imports neither vLLM nor TRL.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osd.core import MixingConfig, TokenRecord
    from osd.generation import OSDGeneration
    from osd.sampler import OptimalSamplingOutput, OptimalSamplingV1
    from trainers import OSDConfig, OSDTrainer

_HOME = {
    "MixingConfig": "osd.core",
    "TokenRecord": "osd.core",
    "OptimalSamplingOutput": "osd.sampler",
    "OptimalSamplingV1": "osd.sampler",
    "OSDGeneration": "osd.generation",
    "OSDConfig": "trainers",
    "OSDTrainer": "trainers",
}
__all__ = [
    "MixingConfig",
    "OSDConfig",
    "OSDGeneration",
    "OSDTrainer",
    "OptimalSamplingOutput",
    "OptimalSamplingV1",
    "TokenRecord",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'osd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
