"""Run a script under FSDP on a CPU: `accelerate launch ... tests/fsdp_cpu.py script.py --flags`, for tests.

torch's `fully_shard` works on gloo, and so does its older FSDP once "cpu:0" and "cpu" are one device to it. accelerate asks
for FSDP only where there is an accelerator, so its state is told here; what it then does with the model, and everything
above, is its own.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import _init_utils


def allow_fsdp() -> None:
    """Let accelerate shard the model of a gloo group where ACCELERATE_USE_FSDP says so."""
    create = AcceleratorState.__init__

    def __init__(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        create(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = __init__  # type: ignore[method-assign]
    _init_utils._get_device_from_device_id = lambda *_, **__: torch.device("cpu")


if __name__ == "__main__":
    allow_fsdp()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.getcwd())
    runpy.run_path(sys.argv[0], run_name="__main__")
