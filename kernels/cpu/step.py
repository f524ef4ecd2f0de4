"""Packs the operations of step.cpp and runs a list of them: constants are addresses, activations are refs."""

import ctypes
import enum
import functools
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from linrnn.kernels.cpu import library

N_REFS, N_CONSTANTS = 9, 4
_PACK = struct.Struct("6qd40q").pack  # LinrnnStepOp of step.cpp: 47 words of 8 bytes


class Kind(enum.IntEnum):
    """The operations of step.cpp, which says what each reads from its refs, constants, size and option."""

    LINEAR = 0
    NORM = 1
    CONV = 2
    SELECTIVE = 3
    DIAGONAL = 4
    GATE = 5
    RGLRU = 6
    SHIFT = 7
    HEADS = 8
    WKV = 9


ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "sigmoid": 3, "squared_relu": 4}


class Ref(NamedTuple):
    """Where an operation finds `width` numbers of each row: a slot, and in it B * offset + column + b * stride."""

    slot: int
    offset: int
    column: int
    stride: int
    width: int

    def columns(self, start: int, width: int) -> "Ref":
        """Returns some of the columns."""
        return self._replace(column=self.column + start, width=width)


def pack(
    kind: Kind,
    refs: Sequence[Ref | None],
    constants: Sequence[Tensor | None],
    *,
    outputs: int,
    barrier: bool = True,
    unit: int = 1,
    size: int = 0,
    option: int = 0,
    eps: float = 0.0,
) -> bytes:
    """The bytes of one operation; the caller keeps the constants (float32, contiguous) alive."""
    where = [(-1, 0, 0, 0) if r is None else (r.slot, r.offset, r.column, r.stride) for r in refs]
    where += [(-1, 0, 0, 0)] * (N_REFS - len(where))
    addresses = [0 if c is None else c.data_ptr() for c in constants]
    addresses += [0] * (N_CONSTANTS - len(addresses))
    words = [word for ref in where for word in ref]
    return _PACK(kind, barrier, outputs, unit, size, option, eps, *words, *addresses)


def run(ops: bytes, n_ops: int, slots: bytes, batch: int, threads: int) -> None:
    """Runs packed operations on `batch` rows, in so many of torch's threads; `slots` are packed addresses."""
    _launch()(ops, n_ops, slots, batch, threads)


@functools.cache
def _launch() -> Callable[[bytes, int, bytes, int, int], None]:
    launch = library().linrnn_step
    launch.argtypes = (ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)
    launch.restype = None
    return launch
