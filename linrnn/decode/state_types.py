"""What is known of the types of states: their names in files, and which of their fields grow with every token."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from linrnn import layers, ops
from linrnn.layers.base import State, describe
from linrnn.models.block import BlockState


class Growing(NamedTuple):
    """The fields of a state whose second dimension grows, and the one (B,) that says how many columns are real.

    Real columns are the last ones, so that caches of different lengths are aligned at their ends.
    """

    columns: tuple[str, ...]
    length: str


_REGISTERED: dict[str, type] = {}
_GROWING: dict[type, Growing] = {
    layers.AttentionState: Growing(("k", "v"), "position"),
    layers.GAUState: Growing(("k", "v"), "length"),
    layers.MegaState: Growing(("k", "v"), "length"),
}


def register(state_type: type, growing: Growing | None = None) -> None:
    """Makes the state of a layer of your own known, so that it can be saved, loaded and put together.

    Args:
        state_type: a NamedTuple. Its name is what a file calls it. The same class, defined anew, replaces the old one.
        growing: for a state that grows with every token, the fields that do, and the one that counts.

    Raises:
        TypeError: state_type is no NamedTuple class.
        ValueError: another type has this name, or `growing` names a field that there is not.
    """
    fields = getattr(state_type, "_fields", None)
    if not isinstance(state_type, type) or fields is None:
        raise TypeError(f"state_type: expected a NamedTuple class, got {describe(state_type)}")
    before = known().get(state_type.__name__, state_type)
    # a cell of a notebook that is run again defines the class again
    again = (before.__module__, before.__qualname__) == (state_type.__module__, state_type.__qualname__)
    if before is not state_type and not (again and state_type.__name__ in _REGISTERED):
        raise ValueError(f"state_type: expected a name that is not taken, got {state_type.__name__}")
    stray = sorted({*growing.columns, growing.length} - set(fields)) if growing else []
    if stray:
        raise ValueError(f"growing: expected some of the fields {fields}, got {stray}")
    _REGISTERED[state_type.__name__] = state_type
    if growing is not None:
        _GROWING[state_type] = growing


def known() -> dict[str, type]:
    """Returns the types of state by name: those of all registered layers, of blocks, and your own."""
    with_state = [layer for layer in (*layers.LAYERS.values(), layers.ChannelMix) if hasattr(layer, "state_type")]
    types = [layer.state_type for layer in with_state] + [BlockState, ops.NormalizedState]
    return {t.__name__: t for t in types} | _REGISTERED


def growing(state: State) -> Growing | None:
    """Returns which fields of a NamedTuple grow; None for anything else."""
    return _GROWING.get(type(state))


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


# (tensors of one place in several states, whether it grows, the place) -> tensor
Join = Callable[[Sequence[Tensor], bool, str], Tensor]


def zip_leaves(join: Join, states: Sequence[State], names: Sequence[str], grows: bool = False) -> State:
    """Returns the common structure of several states with `join` applied to the tensors of each place.

    Args:
        join: makes one tensor of those at one place.
        states: at least one.
        names: what errors call each of them.
        grows: whether the second dimension of the tensors grows with T.

    Raises:
        TypeError: states of different structures: of different layers.
    """
    first, name = states[0], names[0]
    for other, its_name in zip(states[1:], names[1:], strict=True):
        if _kind(other) != _kind(first):
            raise TypeError(f"{its_name}: expected {_kind(first)} as in {name}, got {_kind(other)}: another model's?")
    if isinstance(first, Tensor):
        return join(states, grows, name)
    if first is None:
        return None
    if isinstance(first, dict):
        keys = list(first)
        return {key: zip_leaves(join, [s[key] for s in states], [f"{n}[{key!r}]" for n in names]) for key in keys}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        fields: tuple[str, ...] = first._fields
        columns = found.columns if (found := growing(first)) else ()
        return type(first)(
            *(
                zip_leaves(join, parts, [f"{n}.{field}" for n in names], field in columns)
                for field, *parts in zip(fields, *states, strict=True)
            )
        )
    return type(first)(
        zip_leaves(join, parts, [f"{n}[{i}]" for n in names]) for i, parts in enumerate(zip(*states, strict=True))
    )


def _kind(state: State) -> str:
    """Returns what two states must have in common, as text."""
    if state is None:
        return "None"
    if isinstance(state, Tensor):
        return "a tensor"
    if isinstance(state, dict):
        return f"a dict of {list(state)}"
    if isinstance(state, (tuple, list)):
        return type(state).__name__ + ("" if hasattr(state, "_fields") else f" of {len(state)}")
    raise TypeError(f"state: expected tensors in tuples, lists or dicts, got {type(state).__name__}")
