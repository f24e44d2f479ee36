"""Check of the packages that the pages need: jinja2 and matplotlib, the extra `report`."""

from __future__ import annotations

from importlib.util import find_spec


def check_packages(command: str) -> None:
    """Refuse a command that writes a page where a package is missing.

    Raises:
        ValueError: naming the packages and the command that installs them.
    """
    missing = [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{command} writes a page and needs {' and '.join(missing)}; "
            "install with: pip install 'optimal-sampling-distillation[report]'"
        )
