"""Launches the decoding step of the diagonal recurrence: one kernel, on rows of a pool of states."""

import functools
import struct

import torch
from torch import Tensor

from linrnn.kernels import cuda, state_dtype
from linrnn.kernels.cuda.diagonal_scan import NAMES, PAIRS
from linrnn.kernels.cuda.driver import Kernel
from linrnn.kernels.cuda.plan import MAX_THREADS
from linrnn.kernels.tensors import address, rows

INDICES = {torch.int64: "int64_t", torch.int32: "int"}

# Args of diagonal_step.cu: words of 8 bytes.
_PACK = struct.Struct("14q").pack


def _program(a: torch.dtype, x: torch.dtype, index: torch.dtype) -> tuple[str, tuple[str, ...]]:
    values = {"A": NAMES[a], "X": NAMES[x], "INDEX": INDICES[index]}
    return "diagonal_step.cu", tuple(f"LINRNN_{name}={value}" for name, value in values.items())


PROGRAMS = tuple(_program(a, x, index) for a, x in PAIRS for index in INDICES)


@functools.lru_cache(maxsize=4096)
def _kernel(a: torch.dtype, x: torch.dtype, index: torch.dtype, device: int) -> Kernel:
    return cuda.program(*_program(a, x, index), device).kernel("diagonal_step")


def step(a: Tensor, x: Tensor, state: Tensor, index: Tensor | None, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """h (B, D) in x's dtype and the new states: (B, D), or `out`, a pool that takes them in the rows `index`."""
    a, x, state = rows(a), rows(x), rows(state)
    B, D = x.shape
    h = x.new_empty((B, D))
    after = x.new_empty((B, D), dtype=state_dtype(x.dtype)) if out is None else out
    if h.numel() == 0:
        return h, after
    index = None if index is None else index.contiguous()
    device = x.device.index or 0
    packed = _PACK(
        *(B, D, state.shape[0]),
        *(a.data_ptr(), a.stride(0) if a.ndim == 2 else 0),
        *(x.data_ptr(), x.stride(0)),
        address(index),
        *(state.data_ptr(), state.stride(0)),
        *(after.data_ptr(), after.stride(0), out is not None),
        h.data_ptr(),
    )
    kernel = _kernel(a.dtype, x.dtype, torch.int64 if index is None else index.dtype, device)
    kernel.launch(-(-B * D // MAX_THREADS), MAX_THREADS, 0, cuda.current_stream(device), packed)
    return h, after
