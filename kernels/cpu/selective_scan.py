"""Launches the CPU kernels of the selective scan: tensors in, a packed argument struct, one C call."""

import struct

import torch
from torch import Tensor

from linrnn.kernels.cpu import library
from linrnn.kernels.cpu.diagonal_scan import MIN_PARALLEL, TYPES
from linrnn.kernels.tensors import ABSENT, View, address, contiguous, rows, view

MAX_PARTS = 16  # sums over channels are kept apart in so many parts: parallel, and the same for any number of threads

# LinrnnSelectiveScan of selective_scan.cpp: 36 words of 8 bytes
_PACK = struct.Struct("36q").pack


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    spacing: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D) in A's real dtype, the final state (B, D, N) and the states before every `spacing`-th token.

    x, dt (B, T, D), B and C (B, T, G, N) come in any dtype, A (D, N) and the initial state in that of states. The
    states (B, ceil(T / spacing), D, N) have no elements unless `keep`.
    """
    x, dt, A, B, C, initial_state, flags = _prepared(x, dt, A, B, C, initial_state, flags)
    y = torch.empty_like(x)
    final_state = A.new_empty((x.shape[0], *A.shape))
    n_kept = -(-x.shape[1] // spacing) if keep else 0
    checkpoints = A.new_empty((x.shape[0], n_kept, *A.shape))
    kept = checkpoints.data_ptr() if keep else 0
    states = (address(initial_state), final_state.data_ptr(), kept)
    _launch(library().linrnn_selective_scan, x, dt, view(y, False), A, B, C, states, flags, spacing)
    return y, final_state, checkpoints


def backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    flags: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    spacing: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, in the dtypes that the forward computes in."""
    x, dt, A, B, C, grad_final_state, flags = _prepared(x, dt, A, B, C, grad_final_state, flags)
    grad_y, checkpoints = rows(grad_y.to(x.dtype)), checkpoints.contiguous()
    grad_x, grad_dt = torch.empty_like(x), torch.empty_like(x)
    grad_A, grad_s = (A.new_empty((x.shape[0], *A.shape)) for _ in range(2))
    groups = B.shape[2]
    parts = max(1, min(MAX_PARTS // groups, x.shape[2] // groups // 32))
    grad_B, grad_C = (B.new_zeros((parts, *B.shape)) for _ in range(2))
    _launch(
        library().linrnn_selective_scan_backward,
        x,
        dt,
        view(grad_y, False),
        A,
        B,
        C,
        (0, 0, checkpoints.data_ptr()),
        flags,
        spacing,
        grad_final_state=address(grad_final_state),
        grads=(view(grad_x, False), view(grad_dt, False)),
        sums=(grad_A.data_ptr(), grad_s.data_ptr(), grad_B.data_ptr(), grad_C.data_ptr(), parts),
    )
    return grad_x, grad_dt, grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_s


def _prepared(x, dt, A, B, C, state, flags):
    """In the dtypes of the arithmetic: A's, and its real one for x and dt."""
    real = torch.float64 if A.dtype in (torch.float64, torch.complex128) else torch.float32
    B, C = (contiguous(v.to(A.dtype)) for v in (B, C))
    return rows(x.to(real)).contiguous(), rows(dt.to(real)), contiguous(A), B, C, contiguous(state), contiguous(flags)


def _launch(
    call,
    x: Tensor,
    dt: Tensor,
    y: View,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    states: tuple[int, int, int],
    flags: Tensor | None,
    spacing: int,
    grad_final_state: int = 0,
    grads: tuple[View, View] = (ABSENT, ABSENT),
    sums: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0),
) -> None:
    """Fills the struct and calls; the caller keeps the tensors alive."""
    (batch, T, D), (G, N) = x.shape, B.shape[2:]
    threads = torch.get_num_threads() if batch * T * D * N >= MIN_PARALLEL else 1
    code = call(
        _PACK(
            *(batch, T, D, N, G, spacing),
            *(*view(x, False), *view(dt, False), *y),
            *(A.data_ptr(), B.data_ptr(), C.data_ptr()),
            *states,
            address(flags),
            grad_final_state,
            *(*grads[0], *grads[1]),
            *sums,
            *(TYPES[A.dtype], threads),
        )
    )
    if code:
        raise RuntimeError(f"no kernel for A of {A.dtype}")
