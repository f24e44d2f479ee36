"""NCCL between a trainer's main process, rank 0 of a group, and the workers of a server: vLLM's own functions.

NCCL waits for ever where the other side has died or goes another way. Only an abort of the communicator, from another thread,
ends that wait. The trainer aborts when the server refuses or is gone (`osd.engine.transport`), a worker as `watched` says.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.distributed.weight_transfer.nccl_common import trainer_init
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
from vllm.utils.network_utils import get_ip

_PULSE_SECONDS = 1.0  # between two looks whether the trainer is there
_ABORT_SECONDS = 10.0  # for an abort; vLLM waits 5 seconds for NCCL


def init_info(port: int, workers: int, seconds: float) -> dict[str, Any]:
    """Return what the workers need to meet this process on a port of this machine: `init_info` of vLLM's route."""
    address = {"master_address": get_ip(), "master_port": port}
    return {**address, "rank_offset": 1, "world_size": workers + 1, "packed": True, "seconds": seconds}


def join(info: dict[str, Any], device: torch.device) -> Any:
    """Join the communicator of the workers that got the same ``info``, and return it. Raises a RuntimeError without NCCL."""
    with torch.cuda.device(device):
        communicator = trainer_init(info)
    if communicator.disabled:  # vLLM would send nothing
        raise RuntimeError("vLLM cannot use NCCL in this process: libnccl is missing, or VLLM_DISABLE_PYNCCL is set")
    return communicator


def broadcast(named_tensors: list[tuple[str, torch.Tensor]], communicator: Any, device: torch.device) -> None:
    """Send tensors on ``device`` to every worker, which knows their names, dtypes and shapes; return when they were sent.

    vLLM packs them on streams of its own, which wait for no other: the tensors must be there (`synchronize`).
    """
    with torch.cuda.device(device):
        packed_nccl_broadcast_producer(
            iterator=iter(named_tensors), group=communicator, src=0, post_iter_func=lambda item: item[1]
        )


def leave(communicator: Any) -> None:
    """Abort what runs in a communicator that this process joined, and free its port."""
    communicator.destroy()
    communicator.group.store = None  # rank 0 holds the store; an error's traceback may hold the communicator


@contextmanager
def watched(communicator: Any, seconds: float) -> Iterator[None]:
    """Run a transfer from the trainer; abort ``communicator`` if it takes longer, or as soon as the trainer's process is gone.

    Raises:
        RuntimeError: the transfer was aborted. The communicator is disabled from then on: its calls do nothing.
    """
    over = threading.Event()
    reasons: list[str] = []

    def abort(reason: str) -> None:
        reasons.append(reason)
        communicator.destroy()

    def look() -> None:
        while not over.wait(_PULSE_SECONDS):
            try:
                communicator.group.store.check(["trainer"])  # a store that rank 0 holds
            except Exception:
                abort("the trainer has gone")
                return

    late = threading.Timer(seconds, abort, [f"it has not ended after {seconds:g} seconds"])
    threads = [late] if communicator.group is None else [late, threading.Thread(target=look)]  # None: met without a store
    for thread in threads:
        thread.daemon = True
        thread.start()
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    finally:
        over.set()
        late.cancel()
        for thread in threads:  # an abort that has begun disables the communicator
            thread.join(_ABORT_SECONDS)
    if reasons:
        raise RuntimeError(f"a transfer of weights was aborted: {reasons[0]}") from failure
    if failure is not None:
        raise failure
