"""What can be done with any state: a NamedTuple of tensors, batch first, or tuples, lists and dicts of such.

States are values, so snapshot and rollback are assignment: `saved = state`, and later `state = saved`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from linrnn.layers.base import State, describe


def nbytes(state: State) -> int:
    """Counts the bytes of the tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def clone(state: State) -> State:
    """Copies every tensor: for a state whose tensors will be written to, or that would keep a larger buffer alive."""
    return map_leaves(Tensor.clone, state)


def select(state: State, rows: Tensor | Sequence[int]) -> State:
    """Picks sequences of the batch, in any order and as often as wanted (beam search), or by a bool per sequence.

    Raises:
        TypeError: rows are neither integers nor bools.
        ValueError: rows are not one-dimensional, or bools of another number than the batch size.
        IndexError: a row outside the batch.
    """
    index = rows if isinstance(rows, Tensor) else torch.tensor(rows, dtype=torch.int64 if not len(rows) else None)
    if index.is_floating_point() or index.is_complex():
        raise TypeError(f"rows: expected integers or bools, got {describe(rows)}")
    if index.ndim != 1:
        raise ValueError(f"rows: expected one dimension, got shape {tuple(index.shape)}")
    for leaf in leaves(state):
        if index.dtype == torch.bool and len(index) != leaf.shape[0]:
            raise ValueError(f"rows: expected one bool for each of {leaf.shape[0]} sequences, got {len(index)}")
    return map_leaves(lambda leaf: leaf[index.to(leaf.device)], state)


def to(state: State, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Moves a state to a device, and to a real floating point dtype: complex tensors take the complex dtype of it.

    Raises:
        ValueError: dtype is not a real floating point one.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a real floating point dtype, got {dtype}")

    def move(leaf: Tensor) -> Tensor:
        if dtype is None or not (leaf.is_floating_point() or leaf.is_complex()):
            return leaf.to(device=device)
        return leaf.to(device=device, dtype=dtype.to_complex() if leaf.is_complex() else dtype)

    return map_leaves(move, state)


def leaves(state: State) -> Iterator[Tensor]:
    """Yields the tensors of a state, in order."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for part in state.values():
            yield from leaves(part)
    elif isinstance(state, (tuple, list)):
        for part in state:
            yield from leaves(part)
    elif state is not None:
        raise TypeError(f"state: expected tensors in tuples, lists or dicts, got {type(state).__name__}")


def map_leaves(fn: Callable[[Tensor], Any], state: State) -> State:
    """Returns the same structure with `fn` applied to every tensor; None stays None."""
    if isinstance(state, Tensor):
        return fn(state)
    if isinstance(state, dict):
        return {key: map_leaves(fn, part) for key, part in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_leaves(fn, part) for part in state))
    if isinstance(state, (tuple, list)):
        return type(state)(map_leaves(fn, part) for part in state)
    if state is None:
        return None
    raise TypeError(f"state: expected tensors in tuples, lists or dicts, got {type(state).__name__}")
