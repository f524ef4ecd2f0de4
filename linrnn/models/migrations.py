"""How checkpoints of older formats become those of today: the place for every renamed argument and parameter.

`FORMAT` is the number in config.json. Whoever renames, removes or reinterprets a constructor argument, a parameter or a
default of a model raises it by one, adds to `MIGRATIONS` a function from the number before to the new one, and writes
the new format's checkpoints with tests/fixtures/checkpoints/make.py; those of older formats stay as they are. A new
argument with a default that does what was done before needs none of this.

1 (0.1.0): class, version and arguments in config.json, one model.safetensors.
2 (0.1.0): names its format; weights may be in several files behind a model.safetensors.index.json.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

FORMAT = 2

# (class name, arguments, tensors) of one format to (arguments, tensors) of the next
Migration = Callable[[str, dict[str, Any], dict[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
MIGRATIONS: dict[int, Migration] = {}  # {format: to the next one}; none where arguments and tensors kept their names


def migrate(
    written: int, name: str, arguments: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the arguments and tensors of a checkpoint of format `written`, as the class `name` takes them today."""
    for number in range(written, FORMAT):
        if number in MIGRATIONS:
            arguments, tensors = MIGRATIONS[number](name, arguments, tensors)
    return arguments, tensors
