"""Checks of values that YAML, flags and callers without a type checker let through."""

import inspect
import sys
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

_WORDS = {
    int: "an integer",
    float: "a number such as 0.001",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    tuple: "a list",
    NoneType: "null",
}


def check(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raises ValueError with the name, the value and what is allowed unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {allowed}; got {value!r}")


def check_types(config: Any, prefix: str = "") -> None:
    """Refuses a field of a dataclass whose value is not of the field's type.

    An integer in a field of a float becomes one: 0 and 0.0 are one configuration, and have to have one key.
    """
    for f in fields(config):
        kind = field_type(config, f.name)
        kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
        value = getattr(config, f.name)
        allowed = " or ".join(_words(kind) for kind in kinds)
        check(any(_fits(value, kind) for kind in kinds), f"{prefix}{f.name}", value, allowed)
        if float in kinds and type(value) is int and int not in kinds:
            object.__setattr__(config, f.name, float(value))  # they are frozen


def field_type(config: Any, name: str) -> Any:
    """The type of a dataclass's field, evaluated if its module keeps annotations as text."""
    for cls in type(config).__mro__:
        annotations = inspect.get_annotations(cls)
        if name in annotations:
            kind = annotations[name]
            return eval(kind, vars(sys.modules[cls.__module__])) if isinstance(kind, str) else kind
    raise TypeError(f"{type(config).__name__} has no field {name!r}")


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    base = get_origin(kind) or kind
    return _WORDS.get(base, f"a {base.__name__}")


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if isinstance(value, bool):  # an int to Python, not to whoever writes `seed: true`
        return kind is bool
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)
