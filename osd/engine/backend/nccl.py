"""NCCL between a trainer's main process, rank 0 of the group, and the workers of a server: vLLM's own functions."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
from vllm.utils.network_utils import get_ip


def init_info(port: int, workers: int) -> dict[str, Any]:
    """Return what the workers need to meet this process on a port of this machine: `init_info` of vLLM's route."""
    address = {"master_address": get_ip(), "master_port": port}
    return {**address, "rank_offset": 1, "world_size": workers + 1, "packed": True}


def join(info: dict[str, Any], device: torch.device) -> Any:
    """Join the group of the workers that got the same ``info``, and return it."""
    with torch.cuda.device(device):
        return trainer_init(info)


def broadcast(named_tensors: list[tuple[str, torch.Tensor]], group: Any, device: torch.device) -> None:
    """Send tensors on ``device`` to every worker, which knows their names, dtypes and shapes; return when they were sent."""
    with torch.cuda.device(device):
        packed_nccl_broadcast_producer(iterator=iter(named_tensors), group=group, src=0, post_iter_func=lambda item: item[1])
        torch.cuda.current_stream().synchronize()
