"""Start of a pair in the trainer's own processes: their groups, ranks and seeds."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from trl.trainer.utils import ensure_master_addr_port

from osd.terminal import Loading, models

if TYPE_CHECKING:
    from osd.engine.engine import PairConfig, PairEngine


def start_engine(pair: PairConfig, accelerator: Any, *, enable_sleep_mode: bool) -> PairEngine:
    """Start the engine of this process, or its part of the engine that a group of processes holds together.

    Raises:
        ValueError: as :func:`check_groups` and `PairEngine`.
    """
    from osd.engine.engine import PairEngine

    check_groups(pair, accelerator.num_processes)
    # The trainer passes tensors by reference, so the engine must live in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    rank, ranks = accelerator.process_index, pair.engine_kwargs.get("tensor_parallel_size", 1)
    seed = pair.engine_kwargs.get("seed", 0)
    kwargs = pair.engine_kwargs | {"seed": seed + rank // ranks}  # with one seed every pair would draw the same noise
    if accelerator.num_processes > 1:
        # As in TRL: vLLM must join the process group that accelerate made instead of making one.
        kwargs["distributed_executor_backend"] = "external_launcher"
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(accelerator.num_processes)
        os.environ["LOCAL_RANK"] = str(accelerator.local_process_index)
        ensure_master_addr_port()
    if enable_sleep_mode:
        kwargs["enable_sleep_mode"] = True
    with Loading(models(teacher=pair.teacher, student=pair.student), quiet=not accelerator.is_main_process):
        engine = PairEngine(dataclasses.replace(pair, engine_kwargs=kwargs))
    if ranks > 1:
        set_seed(seed + rank)  # vLLM seeded all ranks of the group alike, and their dropout masks would be one
    return engine


def check_groups(pair: PairConfig, processes: int) -> None:
    """Check that the training processes form whole groups of `engine_kwargs["tensor_parallel_size"]`, one pair each.

    Raises:
        ValueError: a number of processes that is no multiple of it; an option that would differ between the ranks of a group.
    """
    size = pair.engine_kwargs.get("tensor_parallel_size", 1)
    if size < 1 or processes % size:
        raise ValueError(
            f"tensor_parallel_size={size} (in training vllm_tensor_parallel_size): {processes} training processes do not make "
            f"groups of {size}, each of which holds a pair; start a multiple of it (--num_processes), or set a divisor"
        )
    if size > 1 and pair.num_speculative_tokens == "auto":
        raise ValueError(
            f"num_speculative_tokens='auto' with tensor_parallel_size={size} in training: it measures times, which differ "
            "between the processes that hold a pair; set a number"
        )
    if (replicas := pair.engine_kwargs.get("data_parallel_size", 1)) != 1:
        raise ValueError(
            f"engine_kwargs['data_parallel_size']={replicas}: in training every group of processes has its own pair; use 1, "
            "and more processes instead"
        )
