"""The version gate for TRL, and a patch of torch.

The trainer subclasses TRL's trainer and uses names that are private to TRL. `tests/test_trl_contract.py` lists them and fails
with an explanation when TRL changes one of them.
"""

from importlib import metadata
from typing import Any

SUPPORTED_TRL = "1.16"


def check_trl() -> str:
    """Return the installed TRL's version.

    Raises:
        ImportError: no TRL, or one outside the supported series; the message names what is installed and what works.
    """
    wanted = f"OSD's trainer needs TRL {SUPPORTED_TRL}.x"
    fix = f"Install it with `pip install 'trl=={SUPPORTED_TRL}.*'`."
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(f"{wanted}, and no TRL is installed. {fix}") from None
    if version.split(".")[:2] != SUPPORTED_TRL.split("."):
        raise ImportError(
            f"{wanted}, and TRL {version} is installed. The trainer overrides TRL's private methods, so another version "
            f"may train on something else without saying so. {fix}"
        )
    return version


def restore_numbered_cpus() -> None:
    """Let runs of several CPU processes resume.

    Symptom: "don't know how to restore data location of UntypedStorage (tagged with cpu:0)". Cause: accelerate gives each
    process the device `cpu:<rank>`, transformers maps the optimizer's state to it, and torch knows only `cpu`. Versions:
    accelerate 1.15, transformers 5.17, torch 2.13. Remove it when the test of it in tests/test_trl_contract.py fails.
    """
    import torch

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    priority = 97  # unique: torch cannot sort two equal ones
    torch.serialization.register_package(priority, lambda storage: None, restore)
