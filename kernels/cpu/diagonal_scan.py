"""Launches the CPU kernels of the diagonal scan: tensors in, a filled argument struct, one C call."""

import ctypes

import torch
from torch import Tensor

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


class _View(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride_b", ctypes.c_int64), ("stride_t", ctypes.c_int64))


class _Args(ctypes.Structure):
    _fields_ = (
        ("B", ctypes.c_int64),
        ("T", ctypes.c_int64),
        ("D", ctypes.c_int64),
        ("a", _View),
        ("x", _View),
        ("h", _View),
        ("initial_state", ctypes.c_void_p),
        ("final_state", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("flags_stride_b", ctypes.c_int64),
        ("flags_stride_t", ctypes.c_int64),
        ("grad_h", _View),
        ("grad_x", _View),
        ("grad_a", _View),
        ("grad_final_state", ctypes.c_void_p),
        ("grad_initial_state", ctypes.c_void_p),
        ("grad_constant_a", ctypes.c_void_p),
        ("a_type", ctypes.c_int32),
        ("x_type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


def state_dtype(x_dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and accumulators for inputs of x_dtype."""
    return torch.promote_types(x_dtype, torch.float32)


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype and the final state (B, D) in the state dtype."""
    a, x, initial_state, flags = _rows(a), _rows(x), _contiguous(initial_state), _contiguous(flags)
    h = torch.empty(x.shape, dtype=x.dtype)
    final_state = torch.empty((x.shape[0], x.shape[2]), dtype=state_dtype(x.dtype))
    args = _arguments(a, h, initial_state, flags, reverse)
    args.x = _view(x, reverse)
    args.final_state = final_state.data_ptr()
    _call("linrnn_diagonal_scan", args)
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
    args = _arguments(a, h, initial_state, flags, reverse)
    if grad_h is not None:
        grad_h = _rows(grad_h)
        args.grad_h = _view(grad_h, reverse)
    if grad_final_state is not None:
        grad_final_state = grad_final_state.contiguous()
        args.grad_final_state = grad_final_state.data_ptr()
    grad_x = torch.empty(h.shape, dtype=h.dtype)
    args.grad_x = _view(grad_x, reverse)
    grad_initial_state = torch.empty((B, D), dtype=state_dtype(h.dtype))
    args.grad_initial_state = grad_initial_state.data_ptr()
    grad_a = None
    if needs_grad_a and a.ndim == 1:
        grad_a = torch.empty((B, D), dtype=state_dtype(a.dtype))
        args.grad_constant_a = grad_a.data_ptr()
    elif needs_grad_a:
        grad_a = torch.empty(h.shape, dtype=a.dtype)
        args.grad_a = _view(grad_a, reverse)
    _call("linrnn_diagonal_scan_backward", args)
    if grad_a is not None and a.ndim < 3:
        grad_a = grad_a.sum(0).to(a.dtype)
    return grad_x, grad_a, grad_initial_state


def _rows(v: Tensor) -> Tensor:
    """v itself where its last dimension is dense, else a copy."""
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def _contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.contiguous()


def _view(v: Tensor, reverse: bool) -> _View:
    """Address and strides in processing order; missing leading dimensions are broadcast."""
    stride_t = v.stride(-2) if v.ndim > 1 else 0
    stride_b = v.stride(-3) if v.ndim > 2 else 0
    data = v.data_ptr()
    if not reverse or not stride_t:
        return _View(data, stride_b, stride_t)
    return _View(data + (v.shape[-2] - 1) * stride_t * v.element_size(), stride_b, -stride_t)


def _arguments(a: Tensor, h: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool) -> _Args:
    """What the forward and the backward share; the caller keeps the tensors alive."""
    B, T, D = h.shape
    args = _Args(B, T, D, _view(a, reverse))
    args.h = _view(h, reverse)
    if initial_state is not None:
        args.initial_state = initial_state.data_ptr()
    if flags is not None:
        last = T - 1 if reverse else 0
        args.flags = flags.data_ptr() + last
        args.flags_stride_b, args.flags_stride_t = T, -1 if reverse else 1
    args.a_type, args.x_type = TYPES[a.dtype], TYPES[h.dtype]
    args.threads = torch.get_num_threads() if B * T * D >= MIN_PARALLEL else 1
    return args


def _call(name: str, args: _Args) -> None:
    if getattr(library(), name)(ctypes.byref(args)):
        raise RuntimeError(f"{name} has no kernel for this pair of dtypes")
