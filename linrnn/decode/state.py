"""What can be done with any state: a NamedTuple of tensors, batch first, or tuples, lists and dicts of such.

States are values, so snapshot and rollback are assignment: `saved = state`, and later `state = saved`.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.decode.fingerprint import fingerprint
from linrnn.decode.state_files import load, save
from linrnn.decode.state_types import Growing, growing, leaves, map_leaves, register, zip_leaves
from linrnn.layers.base import RecurrentLayer, State, describe
from linrnn.models.backbone import SequenceBackbone
from linrnn.models.block import Block, BlockState
from linrnn.models.language import LanguageModel

__all__ = [
    "Growing",
    "batch_size",
    "clone",
    "concatenate",
    "fingerprint",
    "leaves",
    "load",
    "map_leaves",
    "nbytes",
    "put",
    "register",
    "save",
    "select",
    "to",
    "trim",
]


def nbytes(state: State) -> int:
    """Counts the bytes of the tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def batch_size(state: State) -> int:
    """Returns the number of sequences in a state.

    Raises:
        ValueError: a state without tensors, or with tensors that do not agree.
    """
    sizes = {len(leaf) for leaf in leaves(state)}
    if len(sizes) != 1:
        given = f"{sorted(sizes)} sequences in one" if sizes else "none"
        raise ValueError(f"state: expected tensors (batch, ...) of one batch size, got {given}")
    return sizes.pop()


def clone(state: State) -> State:
    """Copies every tensor: for a state whose tensors will be written to, or that would keep a larger buffer alive."""
    return map_leaves(Tensor.clone, state)


def select(state: State, rows: Tensor | Sequence[int] | Sequence[bool]) -> State:
    """Picks sequences of the batch, in any order and as often as wanted (beam search), or by a bool per sequence.

    Raises:
        TypeError: rows are neither integers nor bools.
        ValueError: rows are not one-dimensional, or bools of another number than the batch size.
        IndexError: a row outside the batch.
    """
    index = _index(rows, next((len(leaf) for leaf in leaves(state)), None))
    on = {device: index.to(device) for device in {leaf.device for leaf in leaves(state)}}
    return map_leaves(lambda leaf: leaf[on[leaf.device]], state)


def concatenate(states: Sequence[State]) -> State:
    """Puts the sequences of several states into one state, in order: batches become one batch.

    Caches that grow are brought to one length by columns of zeros in front, which no layer sees (`trim` removes them).
    The tensors are new ones. A state does not say of which model it is: caches of attention windows of 3 and 5 are put
    together as any of two lengths; `model.check_state` says whether the result is a state of that model.

    Args:
        states: at least one, of one model; on one device and in one precision.

    Raises:
        TypeError: states of different structures, as of different layers.
        ValueError: no states, or tensors that do not fit together, named.
    """
    states = list(states)
    if not states:
        raise ValueError("states: expected at least one, got none")
    names = [f"states[{i}]" for i in range(len(states))]
    for state in states:
        batch_size(state)

    def join(tensors: Sequence[Tensor], grows: bool, place: str) -> Tensor:
        return torch.cat(_fitted(tensors, grows, place))

    return zip_leaves(join, states, names)


def put(pool: State, rows: Tensor | Sequence[int] | Sequence[bool], part: State, *, in_place: bool = False) -> State:
    """Writes the sequences of one state into rows of another and returns the result: a place that is free is taken.

    Caches that grow are brought to one length as in `concatenate`.

    Args:
        pool: a state of any number of sequences.
        rows: for each sequence of `part`, its row in the pool; or a bool for each row of the pool.
        part: a state of the same model.
        in_place: write into the tensors of the pool. Every state that shares memory with it changes too (one that a
            growing cache came from, say), and a growing cache of the pool must be as long as that of `part`, or longer.

    Raises:
        TypeError: `rows` are neither integers nor bools, or the two states differ in structure.
        ValueError: another number of rows than of sequences, a row twice, tensors that do not fit, named, or a pool
            made in inference mode that is to be written to outside.
        IndexError: a row outside the pool.
    """
    n, n_part = batch_size(pool), batch_size(part)
    index = _index(rows, n)
    index = index.nonzero()[:, 0] if index.dtype == torch.bool else torch.where(index < 0, index + n, index)
    if len(index) != n_part:
        raise ValueError(f"rows: expected one for each of the {n_part} sequences of part, got {len(index)}")
    if len(index.unique()) != len(index):
        raise ValueError(f"rows: expected different ones, got {index.tolist()}")

    writes: list[tuple[Tensor, Tensor]] = []

    def join(tensors: Sequence[Tensor], grows: bool, place: str) -> Tensor:
        whole, new = _fitted(tensors, grows, place)
        if not in_place:
            return whole.index_copy(0, index.to(whole.device), new)
        if whole.shape != tensors[0].shape:
            shown = f"{tensors[0].shape[1]} columns, got {tensors[1].shape[1]} of part"
            raise ValueError(f"{place}: in place the pool keeps its {shown}")
        writes.append((tensors[0], new))
        return tensors[0]

    if in_place and not torch.is_inference_mode_enabled() and any(leaf.is_inference() for leaf in leaves(pool)):
        raise ValueError("in_place: a pool made in torch.inference_mode is written to there only; clone it")
    result = zip_leaves(join, (pool, part), ("pool", "part"))
    for whole, new in writes:  # nothing is written unless everything fits
        # detached, since torch refuses to write to one of several views that a function returned
        target = whole if whole.requires_grad else whole.detach()
        target.index_copy_(0, index.to(whole.device), new)
    return result


def trim(state: State, model: nn.Module) -> State:
    """Drops the columns of growing caches that belong to no sequence: after longer ones have left the batch.

    Args:
        state: of any number of sequences; what it shares with others stays as it is.
        model: whose state it is: a layer, a backbone or a language model.

    Raises:
        TypeError: a model of another kind, or a state that is not the model's.
        ValueError: as `model.check_state`.
    """
    if isinstance(model, LanguageModel):
        return trim(state, model.backbone)
    if not isinstance(model, RecurrentLayer):
        raise TypeError(f"model: expected a layer, SequenceBackbone or LanguageModel, got {type(model).__name__}")
    model.check_state(state, batch_size(state))
    if isinstance(model, SequenceBackbone):
        blocks = [cast(Block, block) for block in model.blocks]
        return tuple(
            BlockState(trim(part.mixer, cast(nn.Module, block.mixer)), part.ffn)
            if isinstance(part, BlockState)
            else trim(part, cast(nn.Module, block.mixer))
            for block, part in zip(blocks, state, strict=True)
        )
    fields = growing(state)
    if fields is None or model.state_size is not None:  # a window's cache has its size for good
        return state
    length = getattr(state, fields.length)
    longest = int(length.max()) if len(length) else 0
    caches = {field: getattr(state, field) for field in fields.columns}
    return state._replace(
        **{field: u if u.shape[1] == longest else u[:, u.shape[1] - longest :].clone() for field, u in caches.items()}
    )


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


def _index(rows: Tensor | Sequence[int] | Sequence[bool], n: int | None) -> Tensor:
    """Returns rows of n sequences as a tensor of integers or of n bools."""
    try:
        index = (
            rows
            if isinstance(rows, Tensor)
            else torch.tensor(rows, dtype=torch.int64 if not len(rows) else None, device="cpu")
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"rows: expected integers or bools, got {describe(rows)}") from error
    if index.is_floating_point() or index.is_complex():
        raise TypeError(f"rows: expected integers or bools, got {describe(rows)}")
    if index.ndim != 1:
        raise ValueError(f"rows: expected one dimension, got shape {tuple(index.shape)}")
    if index.dtype == torch.bool:
        if n is not None and len(index) != n:
            raise ValueError(f"rows: expected one bool for each of {n} sequences, got {len(index)}")
        return index
    # an index on a GPU is not read back: that would stop it at every step of a beam search
    if n is not None and index.device.type == "cpu":
        wrong = [row for row in index.tolist() if not -n <= row < n]
        if wrong:
            raise IndexError(f"rows: expected integers from {-n} to {n - 1}, got {wrong[0]}")
    return index.long()


def _fitted(tensors: Sequence[Tensor], grows: bool, place: str) -> list[Tensor]:
    """Returns tensors that can be put together, growing ones with zeros in front up to the longest; or ValueError."""
    if grows:
        # a cache that holds nothing yet has no precision to keep: autocast decides it at the first token
        dtypes = [u.dtype for u in tensors if u.shape[1]]
        tensors = [u.to(dtypes[0]) if dtypes and not u.shape[1] else u for u in tensors]
        longest = max(u.shape[1] for u in tensors)
        tensors = [_pad(u, longest - u.shape[1]) for u in tensors]
    first = tensors[0]
    for other in tensors[1:]:
        for what, expected, given in (
            ("shape behind the batch", tuple(first.shape[1:]), tuple(other.shape[1:])),
            ("dtype", first.dtype, other.dtype),
            ("device", first.device, other.device),
        ):
            if expected != given:
                raise ValueError(f"{place}: expected one {what} in all states, got {expected} and {given}")
    return list(tensors)


def _pad(u: Tensor, columns: int) -> Tensor:
    """Returns u (B, S, ...) with columns of zeros in front."""
    return F.pad(u, (0, 0) * (u.ndim - 2) + (columns, 0)) if columns else u
