"""Launches the CUDA kernels of the selective scan: tensors in, a packed argument struct, one to three kernels."""

import functools
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels import KernelUnavailable, cuda
from linrnn.kernels.cuda.diagonal_scan import NAMES
from linrnn.kernels.cuda.driver import Kernel
from linrnn.kernels.cuda.selective_plan import (
    MAX_THREADS,
    Plan,
    Problem,
    Tile,
    choose_plan,
    choose_tile,
    most_states,
    shared_bytes,
)
from linrnn.kernels.tensors import ABSENT, View, address, contiguous, resolved, rows, view

MOST_SUMS = 512 << 20  # bytes of sums over tiles of channels that a backward call may hold at once

# Args of selective_scan.cuh: words of 8 bytes.
_PACK = struct.Struct("41q").pack


@functools.cache
def _program(backward: bool, x: torch.dtype, tile: Tile) -> tuple[str, tuple[str, ...]]:
    values = {"BACKWARD": int(backward), "X": NAMES[x], "V": tile.V, "LANES": tile.lanes, "STATES": tile.states}
    return "selective_scan.cu", tuple(f"LINRNN_{name}={value}" for name, value in values.items())


PROGRAMS = tuple(
    _program(backward, x, choose_tile(N, x == torch.float64))
    for backward in (False, True)
    for x in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for N in (8, 16, 32, 64, 128, 256)
)


def unsupported(A: Tensor) -> str | None:
    """Why the kernels cannot take this A (D, N); None if they can."""
    if A.is_complex():
        return "the CUDA kernels of selective_scan take a real A, got a complex one"
    if A.shape[1] > most_states():
        return f"the CUDA kernels of selective_scan take at most {most_states()} states, got {A.shape[1]}"
    return None


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
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, D) in A's dtype, the final state (B, D, N) and the states before every `spacing`-th token.

    x, dt (B, T, D), B and C (B, T, G, N) come in any dtype, A (D, N), real, and the initial state in that of states.
    The states (B, ceil(T / spacing), D, N) have no elements unless `keep`. Raises KernelUnavailable for what
    `unsupported` names.
    """
    x, dt, A, B, C, initial_state, flags = _prepared(x, dt, A, B, C, initial_state, flags)
    y = x.new_empty(x.shape, dtype=A.dtype)
    final_state = A.new_empty((x.shape[0], *A.shape))
    checkpoints = A.new_empty((x.shape[0], -(-x.shape[1] // spacing) if keep else 0, *A.shape))
    layout = _layout(False, x.dtype, A.dtype, tuple(x.shape), tuple(B.shape[2:]), 0, _device(x), plan)
    _launch(layout, x, dt, y, A, B, C, flags, initial_state, final_state, checkpoints if keep else None, spacing)
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
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, in the dtypes that the forward computes in; x's in its own.

    The sums over channels for B and C take memory for each tile of channels: the batch goes in parts where that would
    be more than MOST_SUMS bytes.
    """
    x, dt, A, B, C, grad_final_state, flags = _prepared(x, dt, A, B, C, grad_final_state, flags)
    grad_y, checkpoints = rows(grad_y.to(A.dtype)), resolved(checkpoints).contiguous()
    key = (True, x.dtype, A.dtype, tuple(x.shape), tuple(B.shape[2:]), spacing, _device(x), plan)
    layout = _layout(*key)
    stage = layout.plan.stage
    if stage < spacing:  # no room for so many tokens: states closer by
        first = checkpoints[:, 0].contiguous()
        checkpoints = forward(x, dt, A, B, C, first, flags, stage, True)[2]
        spacing = stage
    grad_x, grad_dt = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape, dtype=A.dtype)
    grad_s = A.new_empty((x.shape[0], *A.shape))
    grad_A, grad_B, grad_C = A.new_zeros(A.shape), torch.empty_like(B), torch.empty_like(C)
    size = max(1, MOST_SUMS // (layout.parts * 2 * B[0].nbytes))
    for b in range(0, x.shape[0], size):
        some = slice(b, b + size)
        part = _layout(*key[:3], tuple(x[some].shape), *key[4:]) if size < x.shape[0] else layout
        grads = (grad_x[some], grad_dt[some], grad_s[some])
        entry = None if grad_final_state is None else grad_final_state[some]
        marked = None if flags is None else flags[some]
        of_A, sums = _backward(
            part, x[some], dt[some], A, B[some], C[some], marked, checkpoints[some], grad_y[some], entry, spacing, grads
        )
        grad_A += of_A
        grad_B[some], grad_C[some] = sums
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_s


def _backward(layout, x, dt, A, B, C, flags, checkpoints, grad_y, entry, spacing, grads) -> tuple[Tensor, Tensor]:
    """Writes `grads`, of x, dt and the initial state; returns those of A, and of B and C (2, B, T, G, N)."""
    grad_x, grad_dt, grad_s = grads
    grad_A = A.new_empty((layout.chunks, x.shape[0], *A.shape))
    sums = B.new_empty((layout.parts, 2, *B.shape))
    _launch(layout, x, dt, grad_y, A, B, C, flags, entry, grad_s, checkpoints, spacing, (grad_x, grad_dt, grad_A, sums))
    return grad_A.sum((0, 1)), sums.sum(0) if layout.parts > 1 else sums[0]


def _prepared(x, dt, A, B, C, state, flags) -> tuple[Any, ...]:
    """Everything but x in A's dtype, x in that or in half precision; rows dense."""
    reason = unsupported(A)
    if reason is not None:
        raise KernelUnavailable(reason)
    dtype = A.dtype
    if x.itemsize != 2 or dtype != torch.float32:
        x = x.to(dtype)
    B, C = (contiguous(v.to(dtype)) for v in (B, C))
    return rows(x), rows(dt.to(dtype)), contiguous(A), B, C, contiguous(state), contiguous(flags)


@dataclass(frozen=True)
class _Layout:
    """All about a pass but its addresses."""

    device: int
    problem: Problem
    N: int
    plan: Plan
    chunks: int
    parts: int  # tiles of channels of a group
    launches: tuple[tuple[Kernel, int, int, int], ...]  # kernel, blocks, threads, shared bytes


@functools.lru_cache(maxsize=4096)
def _layout(
    backward: bool,
    x: torch.dtype,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    coefficients: tuple[int, int],
    spacing: int,
    device: int,
    plan: Plan | None,
) -> _Layout:
    """`coefficients`: G and N; `spacing` that of the checkpoints that the backward finds."""
    (batch, T, D), (G, N) = shape, coefficients
    tile = choose_tile(N, dtype == torch.float64)
    problem = Problem(batch, T, G, D // G, tile, x.itemsize, dtype.itemsize)
    plan = plan or choose_plan(problem, backward, spacing, cuda.properties(device))
    program = cuda.program(*_program(backward, x, tile), device)
    if plan.chunk % plan.stage or plan.stage > spacing > 0:
        raise ValueError(f"a chunk has to hold whole stages, and a stage at most {spacing} tokens, got {plan}")
    chunks = -(-T // plan.chunk) if plan.chunk else 1
    grid = problem.blocks(plan.threads) * chunks
    shared = functools.partial(shared_bytes, problem, plan.threads, plan.stage, backward)
    launches: tuple[tuple[Kernel, int, int, int], ...] = (
        (program.kernel("selective_scan"), grid, plan.threads, shared()),
    )
    if chunks > 1:
        carriers = -(-batch * D * N // MAX_THREADS)
        launches = (
            (program.kernel("selective_reduce"), grid, plan.threads, shared(reduces=True)),
            (program.kernel("selective_carry"), carriers, MAX_THREADS, 0),
            *launches,
        )
    parts = problem.blocks(plan.threads) // (batch * G)
    return _Layout(device, problem, N, plan, chunks, parts, launches)


def _launch(
    layout: _Layout,
    x: Tensor,
    dt: Tensor,
    y: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    flags: Tensor | None,
    entry: Tensor | None,
    exit: Tensor,
    checkpoints: Tensor | None,
    spacing: int,
    grads: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """Packs the arguments and launches; the caller keeps the tensors alive, and torch's allocator the workspace."""
    problem, plan, chunks = layout.problem, layout.plan, layout.chunks
    batch, T, D = x.shape
    decay = carry = None
    if chunks > 1:
        decay, carry = (A.new_empty((chunks, batch, *A.shape)) for _ in range(2))
    grad_x, grad_dt, grad_A, sums = (*map(_view, grads[:2]), *grads[2:]) if grads else (ABSENT, ABSENT, None, None)
    channels = problem.tile.channels(plan.threads)
    packed = _PACK(
        *(batch, T, D, layout.N, problem.G),
        *(*_view(x), *_view(dt), *_view(y)),
        *(A.data_ptr(), B.data_ptr(), C.data_ptr()),
        *(address(entry), exit.data_ptr()),
        *(address(checkpoints), 0 if checkpoints is None else checkpoints.shape[1], spacing),
        address(flags),
        *(*grad_x, *grad_dt),
        *(address(grad_A), address(sums)),
        *(plan.stage, plan.chunk or T, chunks),
        *(address(decay), address(carry)),
        *(_copy(_unit(v, channels, problem.of_group), channels * v.itemsize, plan.threads) for v in (x, dt, y)),
        _copy(_common(layout.N * B.itemsize, B.data_ptr(), C.data_ptr()), layout.N * B.itemsize, plan.threads),
        problem.of_group % problem.tile.V == 0,
    )
    stream = cuda.current_stream(layout.device)
    for kernel, blocks, threads, shared in layout.launches:
        kernel.launch(blocks, threads, shared, stream, packed)


def _view(v: Tensor) -> View:
    return view(v, False)


def _unit(v: Tensor, channels: int, of_group: int) -> int:
    """The bytes, up to 16, in which the rows of the tiles of v (B, T, D) can be copied."""
    strides = (v.stride(0), v.stride(1), channels, of_group)
    return _common(v.data_ptr(), *(n * v.itemsize for n in strides))


def _copy(unit: int, row_bytes: int, threads: int) -> int:
    """A word of Args: the unit, and in bits how many threads go along a row."""
    along = min(row_bytes // unit, threads)
    return unit | (along - 1).bit_length() << 8


def _common(*numbers: int) -> int:
    """The largest power of two up to 16 that divides all."""
    together = functools.reduce(int.__or__, numbers, 16)
    return together & -together


def _device(v: Tensor) -> int:
    return v.device.index or 0
