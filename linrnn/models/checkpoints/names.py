"""Renaming the tensors of somebody else's checkpoint."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor


def renamed(saved: Mapping[str, Tensor], patterns: Mapping[str, str]) -> dict[str, Tensor]:
    """Gives tensors the names that the first regular expression that matches the whole of theirs leads to.

    One that none matches keeps its own.

    Raises:
        ValueError: two tensors for one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in saved.items():
        matches = ((re.fullmatch(pattern, name), ours) for pattern, ours in patterns.items())
        new = next((match.expand(ours) for match, ours in matches if match), name)
        if new in tensors:
            raise ValueError(f"{name}: another tensor of the checkpoint is {new} too")
        tensors[new] = tensor
    return tensors


def inside(prefix: str, saved: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the tensors of a language model: where they are those of its base model alone, with its prefix."""
    if any(name.startswith(prefix) for name in saved):
        return saved
    return {prefix + name: tensor for name, tensor in saved.items()}


def filters(tensor: Tensor) -> Tensor:
    """Maps the weight of a depthwise convolution, (D, 1, width), to (D, width); one of another shape stays."""
    return tensor[:, 0] if tensor.ndim == 3 and tensor.shape[1] == 1 else tensor


def joined(tensors: Mapping[str, Tensor]) -> Tensor:
    """Puts the rows of tensors one below the other.

    Raises:
        ValueError: they differ in shape behind the first dimension, naming them.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not all(shapes.values()) or len({shape[1:] for shape in shapes.values()}) > 1:
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"expected tensors of one shape behind the first dimension, got {given}")
    return torch.cat(list(tensors.values()))


def take(saved: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    """Removes tensors that belong together and returns them by name.

    Raises:
        ValueError: some are missing, naming them.
    """
    missing = [name for name in names if name not in saved]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return {name: saved.pop(name) for name in names}
