"""A model's configuration: a frozen dataclass with the arguments of its constructor."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import field, fields, make_dataclass
from typing import Any


def config_type(model: type) -> type:
    """Returns the frozen dataclass whose fields are the named arguments of a model's constructor, and their defaults.

    The constructor stays the only list of them: what it takes is what a configuration holds.
    """
    described: list[Any] = []
    for p in inspect.signature(model).parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        described.append((p.name, p.annotation, field() if p.default is p.empty else field(default=p.default)))
    made = make_dataclass("Config", described, frozen=True, kw_only=True)
    made.__module__, made.__qualname__ = model.__module__, f"{model.__qualname__}.Config"  # where pickle finds it
    made.__doc__ = f"The arguments of {model.__qualname__}, described there."
    return made


def plain(value: Any) -> Any:
    """Copies containers, tuples as lists: what JSON gives back, and what no caller changes afterwards."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def check_flags(config: Any) -> None:
    """Raises ValueError, naming it, for an argument declared as a bool that is none: "false" would count as true."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type is bool and not isinstance(value, bool):
            raise ValueError(f"{f.name}: expected True or False, got {value!r}")


def json_value(value: Any) -> Any:
    """Returns a value whose numbers JSON has: infinity is written {"__float__": "Infinity"}, as transformers does."""
    if isinstance(value, dict):
        return {key: json_value(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value
