"""Launches the CPU kernels of the diagonal scan: tensors in, a packed argument struct, one C call."""

import struct

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.kernels.cpu import library

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
_ABSENT = (0, 0, 0)


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype and the final state (B, D) in the state dtype."""
    a, x, initial_state, flags = _rows(a), _rows(x), _contiguous(initial_state), _contiguous(flags)
    h = x.new_empty(x.shape)
    final_state = x.new_empty((x.shape[0], x.shape[2]), dtype=state_dtype(x.dtype))
    call = library().linrnn_diagonal_scan
    _launch(call, a, h, initial_state, flags, reverse, x=_view(x, reverse), final_state=final_state.data_ptr())
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
    a, h, initial_state, flags = _rows(a), _rows(h), _contiguous(initial_state), _contiguous(flags)
    B, _, D = h.shape
    grad_h = None if grad_h is None else _rows(grad_h)
    grad_final_state = _contiguous(grad_final_state)
    grad_x = h.new_empty(h.shape)
    grad_initial_state = h.new_empty((B, D), dtype=state_dtype(h.dtype))
    grad_a = None
    if needs_grad_a:
        constant = a.ndim == 1
        grad_a = h.new_empty((B, D) if constant else h.shape, dtype=state_dtype(a.dtype) if constant else a.dtype)
    _launch(
        library().linrnn_diagonal_scan_backward,
        a,
        h,
        initial_state,
        flags,
        reverse,
        grad_h=_ABSENT if grad_h is None else _view(grad_h, reverse),
        grad_x=_view(grad_x, reverse),
        grad_a=_ABSENT if grad_a is None or a.ndim == 1 else _view(grad_a, reverse),
        grad_final_state=_address(grad_final_state),
        grad_initial_state=grad_initial_state.data_ptr(),
        grad_constant_a=_address(grad_a) if a.ndim == 1 else 0,
    )
    if grad_a is not None and a.ndim < 3:
        grad_a = grad_a.sum(0).to(a.dtype)
    return grad_x, grad_a, grad_initial_state


def _rows(v: Tensor) -> Tensor:
    """v itself where its last dimension is dense, else a copy."""
    v = _resolved(v)
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else _resolved(v).contiguous()


def _resolved(v: Tensor) -> Tensor:
    """v with its values in memory: torch only marks a conjugate or a negative, and autograd hands such views back."""
    return v.resolve_conj().resolve_neg() if v.is_conj() or v.is_neg() else v


def _address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def _view(v: Tensor, reverse: bool) -> tuple[int, int, int]:
    """Address and strides in processing order; missing leading dimensions are broadcast."""
    stride = v.stride()
    stride_t = stride[-2] if len(stride) > 1 else 0
    stride_b = stride[-3] if len(stride) > 2 else 0
    if not reverse or not stride_t:
        return v.data_ptr(), stride_b, stride_t
    return v.data_ptr() + (v.shape[-2] - 1) * stride_t * v.element_size(), stride_b, -stride_t


def _launch(
    call,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    *,
    x: tuple[int, int, int] = _ABSENT,
    final_state: int = 0,
    grad_h: tuple[int, int, int] = _ABSENT,
    grad_x: tuple[int, int, int] = _ABSENT,
    grad_a: tuple[int, int, int] = _ABSENT,
    grad_final_state: int = 0,
    grad_initial_state: int = 0,
    grad_constant_a: int = 0,
) -> None:
    """Fills the struct and calls; the caller keeps the tensors alive."""
    B, T, D = h.shape
    code = call(
        _PACK(
            *(B, T, D),
            *_view(a, reverse),
            *x,
            *_view(h, reverse),
            *(_address(initial_state), final_state),
            *(0 if flags is None else flags.data_ptr() + (T - 1 if reverse else 0), T, -1 if reverse else 1),
            *grad_h,
            *grad_x,
            *grad_a,
            *(grad_final_state, grad_initial_state, grad_constant_a),
            *(TYPES[a.dtype], TYPES[h.dtype], torch.get_num_threads() if B * T * D >= MIN_PARALLEL else 1),
        )
    )
    if code:
        raise RuntimeError(f"no kernel for a of {a.dtype} and x of {h.dtype}")
