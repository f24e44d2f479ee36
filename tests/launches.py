"""Start scripts with `accelerate launch` and the configurations that are shipped, changed where a test needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
ACCELERATE = ROOT / "configs" / "accelerate"


def launch(config, *script):
    """Run a script in the processes of a configuration; return the finished process."""
    # As `make setup` installs it, but for this checkout; and with the rank variables of no other run.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    flags = ["--config_file", config, "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *script]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def in_float32(name, path, **changes):
    """A shipped configuration in float32, with these changes."""
    config = yaml.safe_load((ACCELERATE / f"{name}.yaml").read_text())
    path.write_text(yaml.safe_dump(config | {"mixed_precision": "no"} | changes))
    return path


def fsdp_on_a_cpu(path, **fsdp):
    shipped = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())["fsdp_config"]
    return in_float32("fsdp2", path, num_processes=2, use_cpu=True, fsdp_config=shipped | fsdp)
