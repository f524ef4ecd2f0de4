"""Appending to tensors that nobody changes: a cache as a view of a buffer with room behind it.

Token by token, concatenation copies the whole cache every time. `append` copies it only when the buffer is full, into
one half as large again. A view never sees the columns behind its end, so they can be written without changing it; the
second of two calls that append to one view finds them taken, and copies. Which are taken is written on the storage,
beside its memory: whatever makes another tensor (clone, select, load) makes one without room.

Columns with heads (B, S, H, K) lie head by head in memory: attention reads a head's keys ten times as fast.
"""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active


@dataclass
class Room:
    """The columns of a buffer (B, columns, ...) with these strides: `taken` of them are in use."""

    columns: int
    strides: tuple[int, ...]
    taken: int
    lock: Any = field(default_factory=threading.Lock)

    def take(self, end: int, n: int) -> bool:
        """Takes n columns from `end` on if they are free."""
        with self.lock:
            free = self.taken == end and end + n <= self.columns
            self.taken += n if free else 0
            return free


def append(past: Tensor | None, new: Tensor) -> Tensor:
    """Returns past (B, S, ...) and new (B, T, ...) in one, (B, S + T, ...), of the dtype of `new`.

    Where gradients flow and while torch.compile traces, this is a concatenation.
    """
    if past is not None:
        past = past.to(new.dtype)  # autocast may have changed the dtype of the activations
    if _functional(past, new):
        return new if past is None else torch.cat((past, new), 1)
    if past is None:
        past = new[:, :0]
    S, T = past.shape[1], new.shape[1]
    room: Room | None = getattr(past.untyped_storage(), "room", None)
    if past.is_inference() and not torch.is_inference_mode_enabled():
        room = None  # in the inference mode alone may its tensors be written to
    if room is not None and S > 0 and past.stride() == room.strides:
        end = past.storage_offset() // room.strides[1] % room.columns + S
        if room.take(end, T):
            # .data: the version counter of those who see other columns does not move
            whole = past.data.as_strided((past.shape[0], S + T, *past.shape[2:]), past.stride())
            whole[:, S:] = new
            return whole
    columns = S + T + (S + T) // 2 + 8
    B, *row = new[:, 0].shape
    if len(row) == 2:
        buffer = new.new_empty(B, row[0], columns, row[1]).transpose(1, 2)
    else:
        buffer = new.new_empty(B, columns, *row)
    buffer[:, :S], buffer[:, S : S + T] = past, new
    buffer.untyped_storage().room = Room(columns, buffer.stride(), S + T)  # type: ignore[attr-defined]
    return buffer[:, : S + T]


def _functional(past: Tensor | None, new: Tensor) -> bool:
    tensors = (new,) if past is None else (past, new)
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        or any(type(t) is not Tensor for t in tensors)
        or new.numel() == 0
        or _are_functorch_transforms_active()
    )
