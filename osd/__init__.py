"""OSD: optimal sampling distillation.

Every token is drawn from q* ∝ π_θ^(1-α)·π_t^α. α is chosen per token so that q* is equally far, in KL, from the student π_θ and
the teacher π_t. Both models decode together inside one vLLM engine, each with its own prompt.

The names below are loaded on first use, so that ``import osd`` imports neither vLLM nor TRL.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osd.core import MixingConfig, TokenRecord
    from osd.engine.engine import PairConfig, PairEngine, PairPrompt
    from osd.generation import OSDGeneration
    from osd.output import OptimalSample, OptimalSamplingOutput, save_alpha_history
    from osd.sampler import OptimalSamplingV1
    from osd.train import OSDConfig, OSDTrainer

_HOME = {
    "MixingConfig": "osd.core",
    "TokenRecord": "osd.core",
    "OptimalSample": "osd.output",
    "OptimalSamplingOutput": "osd.output",
    "OptimalSamplingV1": "osd.sampler",
    "save_alpha_history": "osd.output",
    "PairConfig": "osd.engine.engine",
    "PairEngine": "osd.engine.engine",
    "PairPrompt": "osd.engine.engine",
    "OSDGeneration": "osd.generation",
    "OSDConfig": "osd.train",
    "OSDTrainer": "osd.train",
}
__all__ = [
    "MixingConfig",
    "OSDConfig",
    "OSDGeneration",
    "OSDTrainer",
    "OptimalSample",
    "OptimalSamplingOutput",
    "OptimalSamplingV1",
    "PairConfig",
    "PairEngine",
    "PairPrompt",
    "TokenRecord",
    "save_alpha_history",
]
__version__ = "0.1.0"

# TRL 1.16 knows vLLM up to 0.31. OSD has its own engine and uses nothing of TRL's that depends on vLLM's version.
warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'osd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
