"""vLLM's weight transfer into the student of a pair: by NCCL, or in the messages themselves.

`StudentWeights` counts the versions, checks that every parameter came, and refuses to sample before that. So the engines here
only receive tensors. vLLM's own engines reload layer by layer: a load that breaks half way would leave layers without weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine, NCCLWeightTransferInitInfo

from osd.engine.backend.nccl import watched
from osd.engine.config import WEIGHT_TRANSFERS


@dataclass(kw_only=True)
class NCCLInitInfo(NCCLWeightTransferInitInfo):
    """vLLM's fields, and the limit of one `/update_weights`. TRL's client sends all weights in one; it sets no limit."""

    seconds: float = 1800.0


class StudentNCCLEngine(NCCLWeightTransferEngine):
    """vLLM's NCCL engine that hands the tensors to the pair's worker and aborts a transfer whose trainer is gone."""

    init_info_cls = NCCLInitInfo

    def init_transfer_engine(self, init_info: NCCLInitInfo) -> None:  # type: ignore[override]
        self.shutdown()  # frees the communicator of the trainer before
        super().init_transfer_engine(init_info)
        self._seconds = init_info.seconds

    def update_weights(self, update_info: dict[str, Any]) -> None:
        communicator = self.model_update_group
        if communicator is None or communicator.disabled:  # vLLM would load what happens to be in memory
            raise RuntimeError("no trainer has joined this worker, or its last transfer was aborted; join it again")
        with watched(communicator, self._seconds):
            super().update_weights(update_info)

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass


@dataclass
class Tensors(WeightTransferUpdateInfo):
    """Part of an update: named tensors in the safetensors format."""

    tensors: bytes


class StudentHTTPEngine(WeightTransferEngine[WeightTransferInitInfo, Tensors]):
    """Weight transfer whose messages carry the tensors, for machines without NCCL between trainer and server."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = Tensors

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        pass

    def finish_weight_update(self) -> None:
        pass

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: Tensors) -> None:
        self.model.load_weights(load(update_info.tensors).items())

    def shutdown(self) -> None:
        pass


class _Student:
    """Stand-in for the student's model in vLLM's engines, which keep it as a key."""

    def __init__(self, load_weights: Callable[[Any], None]) -> None:
        self.load_weights = load_weights


_ENGINES: dict[str, type[WeightTransferEngine]] = dict(
    zip(WEIGHT_TRANSFERS, (StudentNCCLEngine, StudentHTTPEngine), strict=True)
)


def transfer_engine(config: VllmConfig, device: Any, load_weights: Callable[[Any], None]) -> WeightTransferEngine | None:
    """Return the engine that ``weight_transfer_config`` names, or None without one.

    Args:
        load_weights: takes named tensors of the student.
    """
    if (transfer := config.weight_transfer_config) is None:
        return None
    student: Any = _Student(load_weights)
    return _ENGINES[transfer.backend](transfer, config, device, student)
