"""The selective scan on its kernels and in torch, as one torch.library operator with its derivatives.

Two doors lead to it, as in `_scan_autograd`: under torch.compile the operator with the backward registered on it, in
eager mode an autograd.Function. The states before every `spacing`-th token are kept, and those between are computed
again in the backward. A derivative of the backward, and torch.func and forward-mode AD, go through the expanded form.

B and C are (B, T, G, N) and A and states in the dtype of states here; x, dt, B and C may be in half precision.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linrnn.ops import _inputs
from linrnn.ops._backend import BackendUnavailable, attempt, choose, transformed, unwatched
from linrnn.ops._chunked_scan import split_flags
from linrnn.ops._scan_autograd import scan_backward, scan_forward
from linrnn.ops.diagonal_scan import diagonal_scan

KERNELS = ("cpu", "cuda")
# Tokens from one kept state to the next: N / SPACING numbers are kept for each number of x. The CUDA kernels hold the
# states between in shared memory and registers.
SPACING = {"cpu": 64, "cuda": 16}
PIECE = 1 << 22  # numbers of a tensor (B, T, D, N) that the torch form may make at once


@cache
def _launcher(backend: str) -> ModuleType:
    """The module with the compiled `forward` and `backward`."""
    return import_module(f"linrnn.kernels.{backend}.selective_scan")


def _choose(backend: str, x: Tensor, A: Tensor) -> str:
    """`choose`, where the CUDA kernels do not take every A."""
    if backend in ("auto", "cuda") and x.device.type == "cuda":
        reason = _launcher("cuda").unsupported(A)
        if reason is not None:
            if backend == "auto":
                return "torch"
            raise BackendUnavailable(f"backend='cuda' cannot run here: {reason}; use backend='auto'")
    return choose(backend, x, KERNELS)


def _spacing(backend: str, x: Tensor, A: Tensor) -> int:
    cuda = backend in ("auto", "cuda") and x.device.type == "cuda" and not A.is_complex()
    return SPACING["cuda" if cuda else "cpu"]


def scan(x, dt, A, B, C, initial_state, flags, backend: str) -> tuple[Tensor, Tensor]:
    """y (B, T, D) in A's real dtype and the final state, by the fastest door that is right here."""
    inputs = (x, dt, A, B, C, initial_state)
    present = tuple(v for v in inputs if v is not None)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in present)
    spacing = _spacing(backend, x, A)
    if torch.compiler.is_compiling():
        return scan_op(*inputs, flags, spacing, keep, backend)[:2]
    _choose(backend, x, A)
    if transformed():
        return expanded(*inputs, flags)
    if not unwatched(present):
        return scan_op(*inputs, flags, spacing, keep, backend)[:2]
    if keep:
        return SelectiveScan.apply(*inputs, flags, spacing, True, backend)[:2]
    return _forward(*inputs, flags, spacing, False, backend)[:2]


def expanded(x, dt, A, B, C, initial_state, flags) -> tuple[Tensor, Tensor]:
    """The scan with all its states in memory, out of differentiable parts: (B, T, D N) channels of diagonal_scan."""
    y, states = _states(x, dt, A, B, C, initial_state, flags)
    if x.shape[1] == 0:
        last = A.new_zeros((x.shape[0], *A.shape)) if initial_state is None else initial_state.clone()
        return y, last
    return y, states[:, -1]


def _states(x, dt, A, B, C, initial_state, flags) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and the states (B, T, D, N)."""
    x, dt, B, C = _blank(x, dt, A, B, C, flags)
    a, u = _coefficients(x, dt, A, B)
    reset = mask = None
    if flags is not None:
        reset, padded = (flag[..., 0] for flag in split_flags(flags))
        mask = ~padded
    state = None if initial_state is None else initial_state.flatten(1)
    h, _ = diagonal_scan(a.flatten(2), u.flatten(2), state, reset=reset, mask=mask)
    y = (h.view(u.shape) * C[:, :, :, None]).sum(-1).flatten(2)
    return 2 * y.real if y.is_complex() else y, h.unflatten(-1, tuple(A.shape))


def _blank(x, dt, A, B, C, flags) -> tuple[Tensor, ...]:
    """x, dt, B and C in the dtypes of the arithmetic, zero at padded tokens."""
    real = _inputs.real_dtype(A.dtype)
    sequences = x.to(real), dt.to(real), B.to(A.dtype), C.to(A.dtype)
    if flags is None:
        return sequences
    real_tokens = flags & 2 == 0
    return tuple(torch.where(_inputs.expand_flags(real_tokens, v), v, 0) for v in sequences)


def _coefficients(x, dt, A, B) -> tuple[Tensor, Tensor]:
    """What diagonal_scan takes: exp(dt A) (B, T, D, N), and dt x B (B, T, G, D / G, N)."""
    groups = (B.shape[2], x.shape[2] // B.shape[2])
    return (dt[..., None] * A).exp(), (dt * x).unflatten(-1, groups)[..., None] * B[:, :, :, None]


def _adjoint(x, dt, A, B, C, state, flags, grad_y, grad_last) -> tuple[Tensor, ...]:
    """Gradients of the six inputs of `_states`, from those of y and of the last state; without autograd."""
    x, dt, B, C = _blank(x, dt, A, B, C, flags)
    a, u = _coefficients(x, dt, A, B)
    a_flat, s = a.flatten(2), state.flatten(1)
    h, _ = scan_forward(a_flat, u.flatten(2), s, flags, False, "auto")
    grad_h = (grad_y.unflatten(-1, u.shape[2:4])[..., None] * C.conj()[:, :, :, None]).flatten(2)
    scale = 2 if A.is_complex() else 1  # y is 2 Re(C h) there
    last = grad_last.flatten(1)
    grad_a, grad_u, grad_s = scan_backward(a_flat, h, s, flags, scale * grad_h, last, False, True, "auto")
    h, grad_u = h.view(u.shape), grad_u.view(u.shape)
    grad_C = scale * (grad_y.unflatten(-1, u.shape[2:4])[..., None] * h.conj()).sum(3)
    grad_B = (grad_u * (dt * x).unflatten(-1, u.shape[2:4])[..., None]).sum(3)
    grad_dtx = (grad_u * B.conj()[:, :, :, None]).real.sum(-1).flatten(2)
    grad_dtA = grad_a.view(a.shape) * a.conj()
    grad_A = (grad_dtA * dt[..., None]).sum((0, 1))
    grad_dt = (grad_dtA * A.conj()).real.sum(-1) + grad_dtx * x
    grads = _blank(grad_dtx * dt, grad_dt, A, grad_B, grad_C, flags)
    return *grads[:2], grad_A, *grads[2:], grad_s.view_as(state)


def _pieces(x: Tensor, N: int, spacing: int) -> Iterator[slice]:
    """Slices of time, whole multiples of the spacing, small enough for the expanded form."""
    B, T, D = x.shape
    length = max(1, PIECE // max(1, B * D * N * spacing)) * spacing
    return (slice(t, min(t + length, T)) for t in range(0, T, length))


def _forward(x, dt, A, B, C, initial_state, flags, spacing, keep, backend) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before every `spacing`-th token (of no elements unless `keep`)."""
    chosen = _choose(backend, x, A)
    if chosen in KERNELS and x.numel():
        args = (x, dt, A, B, C, initial_state, flags, spacing, keep)
        outputs = attempt(backend, _launcher(chosen).forward, *args)
        if outputs is not None:
            return outputs
    with torch.no_grad():
        s = A.new_zeros((x.shape[0], *A.shape)) if initial_state is None else initial_state
        ys, kept = [x.new_zeros((x.shape[0], 0, x.shape[2]), dtype=_inputs.real_dtype(A.dtype))], [s[:, None][:, :0]]
        for piece in _pieces(x, A.shape[1], spacing):
            x_piece, dt_piece, B_piece, C_piece, flags_piece = _cut(piece, x, dt, B, C, flags)
            y, states = _states(x_piece, dt_piece, A, B_piece, C_piece, s, flags_piece)
            ys.append(y)
            if keep:
                kept += [s[:, None], states[:, spacing - 1 : -1 : spacing]]
            s = states[:, -1]
        return torch.cat(ys, 1), s.clone(), torch.cat(kept, 1)


def _cut(piece: slice, *sequences: Tensor | None) -> list[Any]:
    return [None if v is None else v[:, piece] for v in sequences]


def _gradients(x, dt, A, B, C, flags, checkpoints, grad_y, grad_last, spacing, backend) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C and the initial state."""
    chosen = _choose(backend, x, A)
    if chosen in KERNELS and x.numel():
        args = (x, dt, A, B, C, flags, checkpoints, grad_y, grad_last, spacing)
        grads = attempt(backend, _launcher(chosen).backward, *args)
        if grads is not None:
            return tuple(_in_dtype_of(v, g) for g, v in zip(grads, (x, dt, A, B, C, A), strict=True))
    grad_x, grad_dt, grad_A, grad_B, grad_C = (v.new_zeros(v.shape) for v in (x, dt, A, B, C))
    grad_s = A.new_zeros((x.shape[0], *A.shape)) if grad_last is None else grad_last.clone()
    for piece in reversed(list(_pieces(x, A.shape[1], spacing))):
        x_piece, dt_piece, B_piece, C_piece, flags_piece, grad_piece = _cut(piece, x, dt, B, C, flags, grad_y)
        state = checkpoints[:, piece.start // spacing]
        found = _adjoint(x_piece, dt_piece, A, B_piece, C_piece, state, flags_piece, grad_piece, grad_s)
        for total, part in zip((grad_x, grad_dt, grad_B, grad_C), (*found[:2], *found[3:5]), strict=True):
            total[:, piece] = _in_dtype_of(total, part)
        grad_A += found[2]
        grad_s = found[5]
    return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_s


def _in_dtype_of(v: Tensor, grad: Tensor) -> Tensor:
    """The gradient in v's dtype; of a real B or C beside a complex A, the real part."""
    return (grad.real if grad.is_complex() and not v.is_complex() else grad).to(v.dtype)


@torch.library.custom_op("linrnn::selective_scan", mutates_args=())
def scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    spacing: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, dt, A, B, C, initial_state, flags, spacing, keep, backend)


@scan_op.register_fake
def _(x, dt, A, B, C, initial_state, flags, spacing, keep, backend):
    kept = (x.shape[1] + spacing - 1) // spacing if keep else 0
    y = x.new_empty(x.shape, dtype=_inputs.real_dtype(A.dtype))
    return y, A.new_empty((x.shape[0], *A.shape)), A.new_empty((x.shape[0], kept, *A.shape))


@torch.library.custom_op("linrnn::selective_scan_backward", mutates_args=())
def scan_backward_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    flags: Tensor | None,
    checkpoints: Tensor,
    grad_y: Tensor,
    grad_last: Tensor | None,
    spacing: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, dt, A, B, C, flags, checkpoints, grad_y, grad_last, spacing, backend)  # type: ignore[return-value]


@scan_backward_op.register_fake
def _(x, dt, A, B, C, flags, checkpoints, grad_y, grad_last, spacing, backend):
    state = A.new_empty((x.shape[0], *A.shape))
    return *(v.new_empty(v.shape) for v in (x, dt, A, B, C)), state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.spacing, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    if hasattr(ctx, "set_materialize_grads"):
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, _: Tensor | None):
    *inputs, flags, checkpoints = ctx.saved_tensors
    x, initial_state = inputs[0], inputs[5]
    if grad_y is None and grad_last is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # a derivative of this backward may be asked for
        return *_expanded_gradients(inputs, flags, grad_y, grad_last), None, None, None, None
    if grad_y is None:
        grad_y = torch.zeros(x.shape, dtype=_inputs.real_dtype(inputs[2].dtype), device=x.device)
    compute: Callable[..., tuple[Tensor, ...]] = (
        _gradients if not torch.compiler.is_compiling() and unwatched((x, grad_y)) else scan_backward_op
    )
    grads = compute(*inputs[:5], flags, checkpoints, grad_y, grad_last, ctx.spacing, ctx.backend)
    return *grads[:5], grads[5] if initial_state is not None else None, None, None, None, None


def _expanded_gradients(inputs, flags, grad_y, grad_last) -> tuple[Tensor | None, ...]:
    """The gradients with a graph behind them, through the expanded form."""
    # those without a graph need one for the inner derivative
    inputs = [v if v is None or v.requires_grad else v.detach().requires_grad_() for v in inputs]
    x, dt, A, B, C, initial_state = inputs
    outputs = expanded(x, dt, A, B, C, initial_state, flags)
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, (grad_y, grad_last), strict=True) if grad is not None]
    present = [v for v in inputs if v is not None]
    outs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, present, grads, create_graph=True, allow_unused=True))
    return tuple(None if v is None else next(found) for v in inputs)


scan_op.register_autograd(_backward, setup_context=_setup_context)


class SelectiveScan(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])
        return output

    backward = staticmethod(_backward)
