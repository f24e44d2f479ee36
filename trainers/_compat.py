"""The one version gate for TRL, and a patch.

The trainer subclasses TRL's and relies on names that TRL keeps private. They are listed in `tests/test_trl_contract.py`, which
fails first, in words, when TRL changes one of them.
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
    """Let a run of several CPU processes resume.

    Symptom: "don't know how to restore data location of UntypedStorage (tagged with cpu:0)". accelerate gives each of them
    the device `cpu:<rank>`, to which transformers maps the optimizer's state, and torch knows only `cpu`. Versions: accelerate
    1.15, transformers 5.17, torch 2.13. To be removed when tests/test_trl_contract.py says that torch can do it.
    """
    import torch

    def restore(storage: Any, location: str) -> Any:
        return storage if location.startswith("cpu:") else None

    priority = 97  # a number of our own: torch cannot sort two of the same
    torch.serialization.register_package(priority, lambda storage: None, restore)
