"""Launches the CPU kernels of the diagonal scan: tensors in, a packed argument struct, one C call."""

import struct

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.kernels.cpu import library
from linrnn.kernels.tensors import (
    ABSENT,
    View,
    address,
    contiguous,
    empty_gradient_of_a,
    flags_view,
    reduced,
    rows,
    view,
)

# Below this many elements waking a second thread costs more than it saves.
MIN_PARALLEL = 16_384

TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.complex64: 2,
    torch.complex128: 3,
    torch.bfloat16: 4,
    torch.float16: 5,
}

# LinrnnDiagonalScan of diagonal_scan.cpp: 32 words of 8 bytes, cheaper to pack at once than a ctypes.Structure to fill.
_PACK = struct.Struct("32q").pack


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype and the final state (B, D) in the state dtype."""
    a, x, initial_state, flags = rows(a), rows(x), contiguous(initial_state), contiguous(flags)
    h = x.new_empty(x.shape)
    final_state = x.new_empty((x.shape[0], x.shape[2]), dtype=state_dtype(x.dtype))
    call = library().linrnn_diagonal_scan
    _launch(call, a, h, initial_state, flags, reverse, x=view(x, reverse), final_state=final_state.data_ptr())
    return h, final_state


def backward(
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    grad_h: Tensor | None,
    grad_final_state: Tensor | None,
    reverse: bool,
    needs_grad_a: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x (B, T, D), of a (its shape; None unless wanted) and of the initial state (B, D)."""
    a, h, initial_state, flags = rows(a), rows(h), contiguous(initial_state), contiguous(flags)
    B, _, D = h.shape
    grad_h = None if grad_h is None else rows(grad_h)
    grad_final_state = contiguous(grad_final_state)
    grad_x = h.new_empty(h.shape)
    grad_initial_state = h.new_empty((B, D), dtype=state_dtype(h.dtype))
    grad_a = None
    if needs_grad_a:
        grad_a = empty_gradient_of_a(a, h, 1, state_dtype(a.dtype))
    _launch(
        library().linrnn_diagonal_scan_backward,
        a,
        h,
        initial_state,
        flags,
        reverse,
        grad_h=ABSENT if grad_h is None else view(grad_h, reverse),
        grad_x=view(grad_x, reverse),
        grad_a=ABSENT if grad_a is None or a.ndim == 1 else view(grad_a, reverse),
        grad_final_state=address(grad_final_state),
        grad_initial_state=grad_initial_state.data_ptr(),
        grad_constant_a=address(grad_a) if a.ndim == 1 else 0,
    )
    return grad_x, None if grad_a is None else reduced(grad_a, a), grad_initial_state


def _launch(
    call,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    *,
    x: View = ABSENT,
    final_state: int = 0,
    grad_h: View = ABSENT,
    grad_x: View = ABSENT,
    grad_a: View = ABSENT,
    grad_final_state: int = 0,
    grad_initial_state: int = 0,
    grad_constant_a: int = 0,
) -> None:
    """Fills the struct and calls; the caller keeps the tensors alive."""
    B, T, D = h.shape
    code = call(
        _PACK(
            *(B, T, D),
            *view(a, reverse),
            *x,
            *view(h, reverse),
            *(address(initial_state), final_state),
            *flags_view(flags, reverse),
            *grad_h,
            *grad_x,
            *grad_a,
            *(grad_final_state, grad_initial_state, grad_constant_a),
            *(TYPES[a.dtype], TYPES[h.dtype], torch.get_num_threads() if B * T * D >= MIN_PARALLEL else 1),
        )
    )
    if code:
        raise RuntimeError(f"no kernel for a of {a.dtype} and x of {h.dtype}")
