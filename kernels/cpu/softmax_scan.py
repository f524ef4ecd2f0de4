"""Launches the CPU kernels of the running softmax: tensors in, a packed argument struct, one C call."""

import struct

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.kernels.cpu import library
from linrnn.kernels.cpu.diagonal_scan import MIN_PARALLEL, TYPES
from linrnn.kernels.tensors import ABSENT, View, address, contiguous, flags_view, rows, view

Fields = tuple[Tensor | None, ...]  # m, z (B, H) and y (B, H, V), in the dtype of states

# LinrnnSoftmaxScan of softmax_scan.cpp: 45 words of 8 bytes
_PACK = struct.Struct("45q").pack
_ABSENT_STATE = (0, 0, 0)


def forward(
    logits: Tensor, v: Tensor, initial_state: Fields | None, flags: Tensor | None, reverse: bool, keep: bool
) -> tuple[Tensor, ...]:
    """o (B, T, H, V) in v's dtype, the final m, z and y, and m and z after each token (of no elements unless `keep`).

    logits (B, T, H) and states are in the dtype of states of v (B, T, H, V).
    """
    (B, T, H), V, wide = logits.shape, v.shape[3], state_dtype(v.dtype)
    logits, values, flags = rows(logits), rows(v.flatten(2)), contiguous(flags)
    given = _addresses(initial_state)
    o = v.new_empty((B, T, H, V))
    final = tuple(v.new_empty(shape, dtype=wide) for shape in ((B, H), (B, H), (B, H, V)))
    m, z = (v.new_empty((B, T if keep else 0, H), dtype=wide) for _ in range(2))
    _launch(
        library().linrnn_softmax_scan,
        v,
        (view(logits, reverse), view(values, reverse), view(o.flatten(2), reverse)),
        (view(m, reverse), view(z, reverse)) if keep else (ABSENT, ABSENT),
        flags_view(flags, reverse),
        given[0],
        _addresses(final)[0],
    )
    return o, *final, m, z


def backward(
    logits: Tensor,
    v: Tensor,
    initial_state: Fields | None,
    flags: Tensor | None,
    o: Tensor,
    final_z: Tensor,
    final_y: Tensor,
    m: Tensor,
    z: Tensor,
    grad_o: Tensor | None,
    grad_final_state: Fields,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the logits, of v and of the initial m, z and y; o, m and z are the forward's."""
    (B, _, H), V, wide = logits.shape, v.shape[3], state_dtype(v.dtype)
    logits, values, o, flags = rows(logits), rows(v.flatten(2)), rows(o.flatten(2)), contiguous(flags)
    grad_o = None if grad_o is None else rows(grad_o.to(v.dtype).flatten(2))
    given, grad_final = _addresses(initial_state), _addresses(grad_final_state)
    final_z, final_y = final_z.contiguous(), final_y.contiguous()
    grad_logits, grad_v = logits.new_empty(logits.shape), v.new_empty(v.shape)
    grads = tuple(v.new_empty(shape, dtype=wide) for shape in ((B, H), (B, H), (B, H, V)))
    _launch(
        library().linrnn_softmax_scan_backward,
        v,
        (view(logits, reverse), view(values, reverse), view(o, reverse)),
        (view(m, reverse), view(z, reverse)),
        flags_view(flags, reverse),
        given[0],
        (0, final_z.data_ptr(), final_y.data_ptr()),
        (ABSENT if grad_o is None else view(grad_o, reverse), view(grad_logits, reverse)),
        view(grad_v.flatten(2), reverse),
        grad_final[0],
        _addresses(grads)[0],
    )
    return grad_logits, grad_v, *grads


def _addresses(state: Fields | None) -> tuple[tuple[int, ...], Fields]:
    """Of the fields, and what keeps them alive until the call."""
    if state is None:
        return _ABSENT_STATE, ()
    dense = tuple(contiguous(x) for x in state)
    return tuple(address(x) for x in dense), dense


def _launch(
    call,
    v: Tensor,
    sequences: tuple[View, View, View],
    kept: tuple[View, View],
    flags: View,
    initial_state: tuple[int, ...],
    final_state: tuple[int, ...],
    grads: tuple[View, View] = (ABSENT, ABSENT),
    grad_v: View = ABSENT,
    grad_final_state: tuple[int, ...] = _ABSENT_STATE,
    grad_initial_state: tuple[int, ...] = _ABSENT_STATE,
) -> None:
    """Fills the struct and calls; the caller keeps the tensors alive."""
    threads = torch.get_num_threads() if v.numel() >= MIN_PARALLEL else 1
    code = call(
        _PACK(
            *v.shape,
            *(*sequences[0], *sequences[1], *sequences[2]),
            *(*kept[0], *kept[1]),
            *flags,
            *(*initial_state, *final_state),
            *(*grads[0], *grads[1], *grad_v),
            *(*grad_final_state, *grad_initial_state),
            *(TYPES[v.dtype], threads),
        )
    )
    if code:
        raise RuntimeError(f"no kernel for v of {v.dtype}")
