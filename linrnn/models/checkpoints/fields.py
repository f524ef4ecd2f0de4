"""The fields of somebody else's config.json: each is read once, and what is wrong with it is named."""

from collections.abc import Mapping
from typing import Any

from linrnn.layers.base import finite, positive_int


class Fields:
    """Reads fields by name; one that is absent, or null, has its default.

    Args:
        config: what the config.json holds.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = {name: value for name, value in config.items() if value is not None}

    def get(self, name: str, default: Any) -> Any:
        """Returns what stands there: no check."""
        return self.config.get(name, default)

    def integer(self, name: str, default: int) -> int:
        """Returns a whole number >= 1, or raises ValueError."""
        return positive_int(name, self.get(name, default))

    def number(self, name: str, default: float) -> float:
        """Returns a finite number, or raises ValueError."""
        value = self.get(name, default)
        if not finite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns true or false, or raises ValueError."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Raises ValueError unless the field is absent or one of what we have."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, all we have, got {value!r}")

    def start(self, **names: tuple[str, float]) -> dict[str, float]:
        """Returns arguments that say how Δ starts, which saved weights do not depend on.

        What could not be a start is passed over too: then all are the defaults.

        Args:
            names: {our argument: (their field, default)}; dt_min and dt_max among them.
        """
        values = {ours: self.get(theirs, default) for ours, (theirs, default) in names.items()}
        if all(finite(value) and value > 0 for value in values.values()) and values["dt_min"] <= values["dt_max"]:
            return {name: float(value) for name, value in values.items()}
        return {ours: default for ours, (_, default) in names.items()}
