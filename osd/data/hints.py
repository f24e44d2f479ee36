"""Types of settings, checked because YAML gives values of any type."""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints


@cache
def hints(cls: Any) -> dict[str, Any]:
    """Return the resolved type of every field of a settings class."""
    return {name: hint for name, hint in get_type_hints(cls).items() if name in cls.__dataclass_fields__}


def takes_mapping(hint: Any) -> bool:
    """Return whether a field is a mapping, which a flag gives as JSON."""
    return any(get_origin(option) is dict for option in get_args(hint))


def check_types(settings: Any) -> None:
    """Refuse values that are not of their field's type.

    Raises:
        ValueError: naming the field, the value and the type.
    """
    for name, hint in hints(settings.__class__).items():
        value = getattr(settings, name)
        if not _fits(value, hint) or (takes_mapping(hint) and isinstance(value, str)):
            raise ValueError(f"{name}={value!r} is not {_type_name(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(key, str) and _fits(item, inner[1]) for key, item in value.items())
    if hint is Any:
        return True
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    if takes_mapping(hint):
        return 'a mapping; in YAML write "key: value" lines below it, as a flag a JSON object'
    options = [option for option in get_args(hint) if option is not type(None)] or [hint]
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return " or ".join(names.get(option, "a list") for option in (options if get_origin(hint) is not list else [hint]))
