"""The one version gate for TRL: the trainer subclasses TRL's and relies on names that TRL keeps private.

Those names are listed in `tests/test_trl_contract.py`, which fails first, in words, when TRL changes one of them.
"""

from importlib import metadata

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
