"""Renaming the tensors of somebody else's checkpoint."""

import re
from collections.abc import Mapping

from torch import Tensor


def renamed(saved: Mapping[str, Tensor], patterns: Mapping[str, str]) -> dict[str, Tensor]:
    """Gives tensors the names that the first regular expression that matches the whole of theirs leads to.

    One that none matches keeps its own.
    """
    tensors = {}
    for name, tensor in saved.items():
        matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in patterns.items())
        tensors[next((match.expand(ours) for match, ours in matches if match), name)] = tensor
    return tensors


def take(saved: dict[str, Tensor], *names: str) -> list[Tensor]:
    """Removes tensors that belong together and returns them.

    Raises:
        ValueError: some are missing, naming them.
    """
    missing = [name for name in names if name not in saved]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return [saved.pop(name) for name in names]
