"""The running softmax on its kernels and in torch, as one torch.library operator with its derivatives.

Two doors lead to it, as in `_selective_scan`: under torch.compile the operator with the backward registered on it, in
eager mode an autograd.Function. Beside o, the m and z after each token are kept, and no y: the backward needs none. A
derivative of the backward, and torch.func and forward-mode AD, go through the expanded form.

In torch it is a diagonal scan of H (V + 1) channels: y and, as one more value of 1, z in units of e^m, which decay by
e^{m_{t-1} - m_t}. Logits and states are in the dtype of states here; v may be in half precision.
"""

from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops._backend import attempt, choose, transformed, unwatched
from linrnn.ops._chunked_scan import split_flags
from linrnn.ops._running_max import mark_flags, nothing, running_max, units
from linrnn.ops._scan_autograd import scan_backward, scan_forward
from linrnn.ops.diagonal_scan import diagonal_scan

KERNELS = ("cpu",)
PIECE = 1 << 22  # numbers of a tensor (B, T, H, V + 1) that the torch form may make at once

State = tuple[Tensor, Tensor, Tensor]  # m, z, y
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # o, and the final m, z, y


@cache
def _launcher(backend: str) -> ModuleType:
    """The module with the compiled `forward` and `backward`."""
    return import_module(f"linrnn.kernels.{backend}.softmax_scan")


def scan(logits, v, initial_state: State | None, flags, reverse: bool, backend: str) -> Outputs:
    """o (B, T, H, V) in v's dtype and the final state, by the fastest door that is right here."""
    m, z, y = (None, None, None) if initial_state is None else initial_state
    inputs = (logits, v, m, z, y)
    present = tuple(x for x in inputs if x is not None)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in present)
    if torch.compiler.is_compiling():
        return scan_op(*inputs, flags, reverse, keep, backend)[:4]
    choose(backend, v, KERNELS)
    if transformed():
        return expanded(*inputs, flags, reverse)
    if not unwatched(present):
        return scan_op(*inputs, flags, reverse, keep, backend)[:4]
    if keep:
        return SoftmaxScan.apply(*inputs, flags, reverse, True, backend)[:4]
    return _forward(*inputs, flags, reverse, False, backend)[:4]


def expanded(logits, v, m, z, y, flags, reverse: bool) -> Outputs:
    """The scan with all its states in memory, out of differentiable parts."""
    if reverse:
        o, *state = expanded(logits.flip(1), v.flip(1), m, z, y, None if flags is None else flags.flip(1), False)
        return o.flip(1), *state
    state = m, z, y = _past(v, m, z, y)
    if v.shape[1] == 0:
        return v, *(x.clone() for x in state)
    exponent, marked, reset, mask = _exponent(logits, flags)
    largest, change = running_max(exponent, marked, m)
    last, unit = units(exponent, marked, m, largest)
    initial_unit = (m - m.detach()).exp()
    decay, drive = _coefficients(logits, v, largest, change, flags)
    past = torch.cat((y, z[..., None]), -1) * initial_unit[..., None]
    sums, final = diagonal_scan(decay, drive, past.flatten(1), reset=reset, mask=mask)
    final = final.view(past.shape) * unit[..., None]
    return _mean(sums.view(*v.shape[:3], past.shape[2]), flags).to(v.dtype), last, final[..., -1], final[..., :-1]


def _past(v: Tensor, m: Tensor | None, z: Tensor | None, y: Tensor | None) -> State:
    """The initial state, or that of no past."""
    if m is not None and z is not None and y is not None:
        return m, z, y
    B, _, H, V = v.shape
    y = v.new_zeros((B, H, V), dtype=state_dtype(v.dtype))
    return y.new_full((B, H), nothing(y.dtype)), y.new_zeros((B, H)), y


def _coefficients(logits, v, m, change, flags) -> tuple[Tensor, Tensor]:
    """What diagonal_scan takes for y and z: decays and weighted values, (B, T, H (V + 1))."""
    V = v.shape[3]
    exponent = (logits - m)[..., None]
    values = torch.cat((v.to(logits.dtype), torch.ones_like(exponent)), -1)
    if flags is not None:
        padded = split_flags(flags)[1][..., None]
        exponent, values = torch.where(padded, -torch.inf, exponent), torch.where(padded, 0, values)
    return change.exp()[..., None].expand(*change.shape, V + 1).flatten(2), (exponent.exp() * values).flatten(2)


def _mean(sums: Tensor, flags: Tensor | None) -> Tensor:
    """y / z (B, T, H, V) from both (B, T, H, V + 1); zero where there is nothing, and at padded tokens."""
    z = sums[..., -1:]
    o = sums[..., :-1] / torch.where(z == 0, torch.inf, z)
    return o if flags is None else torch.where(split_flags(flags)[1][..., None], 0, o)


def _pieces(v: Tensor) -> Iterator[slice]:
    """Slices of time, small enough for tensors of all states."""
    B, T, H, V = v.shape
    length = max(1, PIECE // max(1, B * H * (V + 1)))
    return (slice(t, min(t + length, T)) for t in range(0, T, length))


def _cut(piece: slice, *sequences: Tensor | None) -> list[Any]:
    return [None if x is None else x[:, piece] for x in sequences]


def _forward(logits, v, m, z, y, flags, reverse: bool, keep: bool, backend: str) -> tuple[Tensor, ...]:
    """o, the final m, z and y, and m and z after every token (of no elements unless `keep`)."""
    chosen = choose(backend, v, KERNELS)
    if chosen in KERNELS and v.numel():
        state = None if m is None else (m, z, y)
        outputs = attempt(backend, _launcher(chosen).forward, logits, v, state, flags, reverse, keep)
        if outputs is not None:
            return outputs
    if reverse:
        o, *state, ms, zs = _forward(*_flipped(logits, v), m, z, y, *_flipped(flags), False, keep, "torch")
        return *_flipped(o), *state, *_flipped(ms, zs)
    with torch.no_grad():
        m, z, y = _past(v, m, z, y)
        os, ms, zs = [v[:, :0]], [logits[:, :0]], [logits[:, :0]]
        for piece in _pieces(v):
            l_piece, v_piece, flags_piece = _cut(piece, logits, v, flags)
            largest, change = running_max(*_exponent(l_piece, flags_piece)[:2], m)
            decay, drive = _coefficients(l_piece, v_piece, largest, change, flags_piece)
            past = torch.cat((y, z[..., None]), -1)
            sums, final = scan_forward(decay, drive, past.flatten(1), flags_piece, False, "auto")
            sums, final = sums.view(*v_piece.shape[:3], past.shape[2]), final.view(past.shape)
            os.append(_mean(sums, flags_piece).to(v.dtype))
            m, z, y = largest[:, -1], final[..., -1], final[..., :-1]
            if keep:
                ms.append(largest)
                zs.append(sums[..., -1])
        return torch.cat(os, 1), m.clone(), z.clone(), y.clone(), torch.cat(ms, 1), torch.cat(zs, 1)


def _flipped(*sequences: Tensor | None) -> list[Any]:
    return [None if x is None else x.flip(1) for x in sequences]


def _exponent(logits: Tensor, flags: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `running_max` takes, finite so that a reset cuts off all that was before it; and reset and mask (B, T)."""
    none = nothing(logits.dtype)
    exponent = logits.clamp(none, -none / 2).nan_to_num(none)
    if flags is None:
        return exponent, None, None, None
    reset, padded = (flag[..., 0] for flag in split_flags(flags))
    return *mark_flags(exponent, None, reset, ~padded), reset, ~padded


def _gradients(
    logits, v, m0, z0, y0, flags, o, final_z, final_y, m, z, grad_o, grad_m, grad_z, grad_y, reverse, backend
) -> tuple[Tensor, ...]:
    """Gradients of the logits, v, and the initial m, z and y."""
    final, grad_final = (None, final_z, final_y), (grad_m, grad_z, grad_y)
    chosen = choose(backend, v, KERNELS)
    if chosen in KERNELS and v.numel():
        state = None if m0 is None else (m0, z0, y0)
        args = (logits, v, state, flags, o, final, m, z, grad_o, grad_final, reverse)
        grads = attempt(backend, _launcher(chosen).backward, *args)
        if grads is not None:
            return grads
    if reverse:
        args = (*_flipped(logits, v), m0, z0, y0, *_flipped(flags, o), final_z, final_y, *_flipped(m, z, grad_o))
        grad_logits, grad_v, *grads = _gradients(*args, *grad_final, False, "torch")
        return *_flipped(grad_logits, grad_v), *grads
    m0, z0, y0 = _past(v, m0, z0, y0)
    grad_y, grad_z, grad_m = (
        torch.zeros_like(x) if grad is None else grad for x, grad in ((y0, grad_y), (z0, grad_z), (m0, grad_m))
    )
    if v.shape[1] == 0:
        return torch.zeros_like(logits), torch.zeros_like(v), *(x.clone() for x in (grad_m, grad_z, grad_y))
    of_m = grad_m - (grad_y * final_y).sum(-1) - grad_z * final_z  # what m, a maximum, leaves to the logit that it is
    grad_logits, grad_v = torch.empty_like(logits), torch.empty_like(v)
    grad = torch.cat((grad_y, grad_z[..., None]), -1)
    for piece in reversed(list(_pieces(v))):
        sequences = _cut(piece, logits, v, flags, o, m, z, grad_o)
        before = m0 if piece.start == 0 else m[:, piece.start - 1]
        grad_logits[:, piece], grad_v[:, piece], grad, of_m = _adjoint(*sequences, before, grad, of_m)
    grad_y, grad_z = grad[..., :-1], grad[..., -1]
    grad_m = of_m + (grad_y * y0).sum(-1) + grad_z * z0
    return grad_logits, grad_v, grad_m, grad_z.clone(), grad_y.clone()


def _adjoint(logits, v, flags, o, m, z, grad_o, before, grad, of_m) -> tuple[Tensor, ...]:
    """One piece: gradients of logits and v, of the sums (B, H, V + 1) in units of e^before, and what is left of_m.

    G_t = (grad_o_t, -grad_o_t . o_t) / z_t + e^{m_t - m_{t+1}} G_{t+1},   grad_(v, 1)_t = e^{l_t - m_t} G_t
    """
    earlier = torch.cat((before[:, None], m[:, :-1]), 1)  # the largest logit that each token found
    decay, values = (earlier - m).exp()[..., None].expand(*m.shape, v.shape[3] + 1).flatten(2), v.to(m.dtype)
    grad_sums = torch.zeros_like(torch.cat((values, z[..., None]), -1))
    if grad_o is not None:
        grad_o, scale = grad_o.to(m.dtype), torch.where(z == 0, 0, 1 / z)[..., None]
        of_z = -(grad_o * o).sum(-1, keepdim=True)
        grad_sums = torch.cat((grad_o, of_z), -1) * scale
    weight = (logits - m).exp()
    record, T = (logits == m) & (earlier < m), torch.arange(m.shape[1], device=m.device)[:, None]
    forgotten = torch.full_like(m[:, 0], -1, dtype=torch.int64)
    if flags is not None:
        reset, padded = split_flags(flags)
        values, grad_sums = (torch.where(padded[..., None], 0, x) for x in (values, grad_sums))
        weight = torch.where(padded, 0, weight)
        record = (record | (reset & (logits == m))) & ~padded
        forgotten = torch.where(reset, T, -1).amax(1).expand_as(forgotten)
    flat = grad_sums.flatten(2)
    _, G, grad = scan_backward(decay, flat, grad.flatten(1), flags, flat, grad.flatten(1), False, False, "auto")
    G = G.view(grad_sums.shape)
    grad_logits = weight * ((values * G[..., :-1]).sum(-1) + G[..., -1])
    last = torch.where(record, T, -1).amax(1)
    here = (T == last[:, None]) & (last >= forgotten)[:, None]
    grad_logits = grad_logits + torch.where(here, of_m[:, None], 0)
    left = torch.where((last < 0) & (forgotten < 0), of_m, 0)
    return grad_logits, (weight[..., None] * G[..., :-1]).to(v.dtype), grad.view(*of_m.shape, v.shape[3] + 1), left


@torch.library.custom_op("linrnn::softmax_scan", mutates_args=())
def scan_op(
    logits: Tensor,
    v: Tensor,
    m: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(logits, v, m, z, y, flags, reverse, keep, backend)  # type: ignore[return-value]


@scan_op.register_fake
def _(logits, v, m, z, y, flags, reverse, keep, backend):
    B, T, H, V = v.shape
    state = logits.new_empty((B, H)), logits.new_empty((B, H)), logits.new_empty((B, H, V))
    kept = T if keep else 0
    return v.new_empty(v.shape), *state, logits.new_empty((B, kept, H)), logits.new_empty((B, kept, H))


@torch.library.custom_op("linrnn::softmax_scan_backward", mutates_args=())
def scan_backward_op(
    logits: Tensor,
    v: Tensor,
    m0: Tensor | None,
    z0: Tensor | None,
    y0: Tensor | None,
    flags: Tensor | None,
    o: Tensor,
    final_z: Tensor,
    final_y: Tensor,
    m: Tensor,
    z: Tensor,
    grad_o: Tensor | None,
    grad_m: Tensor | None,
    grad_z: Tensor | None,
    grad_y: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    args = (logits, v, m0, z0, y0, flags, o, final_z, final_y, m, z, grad_o, grad_m, grad_z, grad_y, reverse, backend)
    return _gradients(*args)  # type: ignore[return-value]


@scan_backward_op.register_fake
def _(logits, v, m0, z0, y0, flags, o, final_z, final_y, *_):
    state = final_z.new_empty(final_z.shape), final_z.new_empty(final_z.shape), final_y.new_empty(final_y.shape)
    return logits.new_empty(logits.shape), v.new_empty(v.shape), *state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _, ctx.backend = inputs
    o, _, final_z, final_y, m, z = output
    ctx.save_for_backward(*tensors, o, final_z, final_y, m, z)
    if hasattr(ctx, "set_materialize_grads"):
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None):
    given = grads[:4]
    saved = ctx.saved_tensors
    inputs, flags = saved[:5], saved[5]
    if all(grad is None for grad in given):
        return (None,) * 9
    if torch.is_grad_enabled():  # a derivative of this backward may be asked for
        return *_expanded_gradients(inputs, flags, given, ctx.reverse), None, None, None, None
    compute: Callable[..., tuple[Tensor, ...]] = (
        _gradients if not torch.compiler.is_compiling() and unwatched((inputs[0], inputs[1])) else scan_backward_op
    )
    found = compute(*saved, *given, ctx.reverse, ctx.backend)
    of_state = found[2:] if inputs[2] is not None else (None, None, None)
    return *found[:2], *of_state, None, None, None, None


def _expanded_gradients(inputs, flags, grads, reverse) -> tuple[Tensor | None, ...]:
    """The gradients with a graph behind them, through the expanded form."""
    # those without a graph need one for the inner derivative
    inputs = [x if x is None or x.requires_grad else x.detach().requires_grad_() for x in inputs]
    outputs = expanded(*inputs, flags, reverse)
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    pairs = [(out, grad) for out, grad in pairs if out.requires_grad]
    outs, cotangents = zip(*pairs, strict=True)
    present = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(outs, present, cotangents, create_graph=True, allow_unused=True))
    return tuple(None if x is None else next(found) for x in inputs)


scan_op.register_autograd(_backward, setup_context=_setup_context)


class SoftmaxScan(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[4:])
        return output

    backward = staticmethod(_backward)
