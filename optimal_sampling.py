"""Earlier import path of the project: ``from optimal_sampling import OptimalSamplingV1``."""

from osd.sampler import OptimalSamplingOutput, OptimalSamplingV1, save_alpha_history

__all__ = ["OptimalSamplingOutput", "OptimalSamplingV1", "save_alpha_history"]
