"""The diagonal scan as a torch.library operator, and its derivatives of every kind.

Two doors lead to the same operator. Under torch.compile and torch.export it is called directly, with the backward
registered on it. In eager mode an autograd.Function stands before it, since torch.func (grad, vmap, jvp) is right
through a Function with setup_context and wrong, or refused, through register_autograd; Dynamo in turn refuses a
Function that defines jvp.

`flags` (B, T) uint8 holds reset (bit 0) and padding (bit 1). dtypes are already those of the contract here.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels import coefficient_dtype, state_dtype
from linrnn.ops._backend import attempt, choose, unwatched
from linrnn.ops._chunked_scan import chunked_scan, decayed, effective, flip_time, split_flags

KERNELS = ("cpu", "cuda")


@cache
def _launcher(backend: str) -> ModuleType:
    """The module with the compiled `forward` and `backward`."""
    return import_module(f"linrnn.kernels.{backend}.diagonal_scan")


@torch.library.custom_op("linrnn::diagonal_scan", mutates_args=())
def scan_op(
    a: Tensor, x: Tensor, initial_state: Tensor | None, flags: Tensor | None, reverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return scan_forward(a, x, initial_state, flags, reverse, backend)


@scan_op.register_fake
def _(a, x, initial_state, flags, reverse, backend):
    B, T, D = x.shape
    return x.new_empty(B, T, D), x.new_empty(B, D, dtype=state_dtype(x.dtype))


@torch.library.custom_op("linrnn::diagonal_scan_backward", mutates_args=())
def scan_backward_op(
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    grad_h: Tensor | None,
    grad_final_state: Tensor | None,
    reverse: bool,
    needs_grad_a: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    args = (a, h, initial_state, flags, grad_h, grad_final_state, reverse, needs_grad_a, backend)
    return scan_backward(*args)


@scan_backward_op.register_fake
def _(a, h, initial_state, flags, grad_h, grad_final_state, reverse, needs_grad_a, backend):
    B, T, D = h.shape
    grad_a = a.new_empty(a.shape) if needs_grad_a else a.new_empty(0)
    return grad_a, h.new_empty(B, T, D), h.new_empty(B, D, dtype=state_dtype(h.dtype))


def scan_backward(
    a, h, initial_state, flags, grad_h, grad_final_state, reverse, needs_grad_a, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a (of no elements unless it is needed), x and the initial state, without autograd."""
    chosen = choose(backend, h, KERNELS)
    if chosen in KERNELS:
        args = (a, h, initial_state, flags, grad_h, grad_final_state, reverse, needs_grad_a)
        grads = attempt(backend, _launcher(chosen).backward, *args)
        if grads is not None:
            grad_x, grad_a, grad_s = grads
            return a.new_empty(0) if grad_a is None else grad_a, grad_x, grad_s
    grad_a, grad_x, grad_s = adjoint(chunked_scan, a, h, initial_state, flags, grad_h, grad_final_state, reverse)
    return grad_a if needs_grad_a else a.new_empty(0), grad_x.clone(), grad_s.clone()


def scan_forward(a, x, initial_state, flags, reverse, backend) -> tuple[Tensor, Tensor]:
    """The scan without autograd, on the backend chosen."""
    chosen = choose(backend, x, KERNELS)
    if chosen in KERNELS:
        outputs = attempt(backend, _launcher(chosen).forward, a, x, initial_state, flags, reverse)
        if outputs is not None:
            return outputs
    return chunked_scan(a, x, initial_state, flags, reverse)


def _fold_or_loop(op, info, in_dims, args):
    """vmap: joins the mapped dimension to the batch; a gate shared by the batch is looped over, to stay shared."""
    size, a = info.batch_size, args[0]
    moved = [v.movedim(d, 0) if d is not None else v for v, d in zip(args, in_dims, strict=True)]
    if a.ndim - (in_dims[0] is not None) < 3:
        picked = [[v[i] if d is not None else v for v, d in zip(moved, in_dims, strict=True)] for i in range(size)]
        return tuple(torch.stack(outs) for outs in zip(*(op(*one) for one in picked), strict=True))
    folded = [
        (v if d is not None else v.expand(size, *v.shape)).flatten(0, 1) if isinstance(v, Tensor) else v
        for v, d in zip(moved, in_dims, strict=True)
    ]
    # an output of one dimension is the gradient nobody wants, without elements
    return tuple(
        out.unflatten(0, (size, out.shape[0] // size)) if out.ndim > 1 else out.expand(size, 0) for out in op(*folded)
    )


@scan_op.register_vmap
def _(info, in_dims, a, x, initial_state, flags, reverse, backend):
    args = (a, x, initial_state, flags, reverse, backend)
    return _fold_or_loop(scan_op, info, in_dims, args), (0, 0)


@scan_backward_op.register_vmap
def _(info, in_dims, *args):
    return _fold_or_loop(scan_backward_op, info, in_dims, args), (0, 0, 0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    a, _, initial_state, flags, ctx.reverse, ctx.backend = inputs
    saved = (a, output[0], initial_state, flags)
    ctx.save_for_backward(*saved)
    if hasattr(ctx, "save_for_forward"):
        ctx.save_for_forward(*saved)
    if hasattr(ctx, "set_materialize_grads"):
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_h: Tensor | None, grad_final_state: Tensor | None):
    a, h, initial_state, flags = ctx.saved_tensors
    if grad_h is None and grad_final_state is None:
        return None, None, None, None, None, None
    if torch.is_grad_enabled():  # a derivative of this backward may be asked for: the same, from differentiable parts
        grads = adjoint(
            _differentiable_scan(ctx.backend), a, h, initial_state, flags, grad_h, grad_final_state, ctx.reverse
        )
    else:
        run = scan_backward if unwatched((a, h)) else scan_backward_op
        grads = run(
            a, h, initial_state, flags, grad_h, grad_final_state, ctx.reverse, ctx.needs_input_grad[0], ctx.backend
        )
    grad_a, grad_x, grad_s = grads
    return (
        grad_a if ctx.needs_input_grad[0] else None,
        grad_x,
        grad_s if initial_state is not None else None,
        None,
        None,
        None,
    )


scan_op.register_autograd(_backward, setup_context=_setup_context)


class DiagonalScan(torch.autograd.Function):
    """With backward, double backward, vmap and jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a, x, initial_state, flags, reverse, backend):
        return scan_op(a, x, initial_state, flags, reverse, backend)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def jvp(ctx, da, dx, ds, *_):
        # The tangent is one more scan: dh_t = a_t dh_{t-1} + (dx_t + da_t h_{t-1}).
        a, h, initial_state, flags = ctx.saved_tensors
        dx = torch.zeros_like(h) if dx is None else dx
        if da is not None:
            drive = _coefficient(da, h.dtype) * before(h, initial_state, ctx.reverse)
            dx = dx + (drive if flags is None else torch.where((flags == 0)[..., None], drive, 0)).to(dx.dtype)
        return apply(a, dx, ds, flags, ctx.reverse, ctx.backend)


class PlainDiagonalScan(torch.autograd.Function):
    """The same where nothing watches: without vmap and jvp, torch need not bind arguments by name at every call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = scan_forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)


def apply(a, x, initial_state, flags, reverse, backend) -> tuple[Tensor, Tensor]:
    """The eager door."""
    function = PlainDiagonalScan if unwatched((a, x)) else DiagonalScan
    return function.apply(a, x, initial_state, flags, reverse, backend)


def _differentiable_scan(backend: str):
    def scan(a, x, initial_state, flags, reverse):
        return apply(a, x, initial_state, flags, reverse, backend)

    return scan


def before(h: Tensor, initial_state: Tensor | None, reverse: bool) -> Tensor:
    """The state each token found: h shifted by one, with the initial state (or zero) in front."""
    first = torch.zeros_like(h[:, :1]) if initial_state is None else initial_state[:, None].to(h.dtype)
    if h.shape[1] == 0:
        return h
    return torch.cat((h[:, 1:], first), 1) if reverse else torch.cat((first, h[:, :-1]), 1)


def _coefficient(a: Tensor, dtype: torch.dtype) -> Tensor:
    """a in the precision of the states."""
    return a.to(coefficient_dtype(a.dtype, state_dtype(dtype)))


def adjoint(scan, a, h, initial_state, flags, grad_h, grad_final_state, reverse) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state, out of `scan(a, x, initial_state, flags, reverse)` and plain torch.

        g_t = grad_h_t + conj(a_{t+1}) g_{t+1},   grad_x_t = g_t,   grad_a_t = g_t conj(h_{t-1})

    Everything is in the state's precision. Reset and padding become values of a, which may then vary in time.
    """
    dtype = state_dtype(h.dtype)
    wide_a = _coefficient(a, h.dtype)
    hidden_before = before(h, initial_state, reverse).to(dtype)
    g = torch.zeros_like(h, dtype=dtype) if grad_h is None else grad_h.to(dtype)
    if flags is not None:
        wide_a, _ = effective(wide_a, h, flags)
    if h.shape[1] == 0:
        grad_s = torch.zeros_like(h.sum(1), dtype=dtype) if grad_final_state is None else grad_final_state
        return torch.zeros_like(a), g.to(h.dtype), grad_s
    resets = None if flags is None else flags & 1
    if reverse:
        wide_a, g = flip_time(wide_a, g)
        resets = None if resets is None else resets.flip(1)
    if grad_final_state is not None:
        g = torch.cat((g[:, :-1], g[:, -1:] + grad_final_state[:, None]), 1)
    # a_{t+1}; what stands at the last token meets the zero state.
    later = wide_a if wide_a.ndim == 1 else wide_a.roll(-1, -2)
    g, _ = scan(later.conj().resolve_conj(), g, None, None if resets is None else resets.roll(-1, 1), True)
    first = (wide_a if wide_a.ndim == 1 else wide_a[..., 0, :]).conj()
    grad_s = decayed(first, g[:, 0], None if resets is None else resets[:, :1].bool())
    g = g.flip(1) if reverse else g
    grad_a = g * hidden_before.conj()
    if flags is not None:
        grad_a = torch.where((flags == 0)[..., None], grad_a, 0)
        g = torch.where(split_flags(flags)[1], 0, g)
    if grad_a.is_complex() and not a.is_complex():
        grad_a = grad_a.real
    if a.ndim < 3:
        grad_a = grad_a.sum(tuple(range(3 - a.ndim)))
    return grad_a.to(a.dtype), g.to(h.dtype), grad_s
