"""The running softmax in torch: in pieces of time with its backward written out, and expanded, for any derivative.

It is a diagonal scan of H (V + 1) channels: y and, as one more value of 1, z in units of e^m, which decay by
e^{m_{t-1} - m_t}. Logits and states are in the dtype of states here; v may be in half precision.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops._chunked_scan import split_flags
from linrnn.ops._running_max import mark_flags, nothing, running_max, units
from linrnn.ops._scan_autograd import scan_backward, scan_forward
from linrnn.ops.diagonal_scan import diagonal_scan

PIECE = 1 << 22  # numbers of a tensor (B, T, H, V + 1) that may be made at once

State = tuple[Tensor, Tensor, Tensor]  # m, z (B, H) and y (B, H, V)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor]  # o, and the final m, z, y


def expanded(logits, v, initial_state: State | None, flags, reverse: bool) -> Outputs:
    """The scan with all its states in memory, out of differentiable parts."""
    if reverse:
        logits, v, flags = flipped(logits, v, flags)
        o, m, z, y = expanded(logits, v, initial_state, flags, False)
        return o.flip(1), m, z, y
    m, z, y = _past(v, initial_state)
    if v.shape[1] == 0:
        return v, m.clone(), z.clone(), y.clone()
    exponent, marked, reset, mask = _exponent(logits, flags)
    largest, change = running_max(exponent, marked, m)
    last, unit = units(exponent, marked, m, largest)
    decay, drive = _coefficients(logits, v, largest, change, flags)
    past = torch.cat((y, z[..., None]), -1) * (m - m.detach()).exp()[..., None]
    sums, final = diagonal_scan(decay, drive, past.flatten(1), reset=reset, mask=mask)
    final = final.view(past.shape) * unit[..., None]
    o = _mean(sums.view(*v.shape[:3], past.shape[2]), flags)
    return o.to(v.dtype), last, final[..., -1], final[..., :-1]


def forward(logits, v, initial_state: State | None, flags, reverse: bool, keep: bool) -> tuple[Tensor, ...]:
    """o, the final m, z and y, and m and z after every token (of no elements unless `keep`); without autograd."""
    if reverse:
        logits, v, flags = flipped(logits, v, flags)
        o, *state, m, z = forward(logits, v, initial_state, flags, False, keep)
        return o.flip(1), *state, m.flip(1), z.flip(1)
    with torch.no_grad():
        m, z, y = _past(v, initial_state)
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


def gradients(
    logits, v, initial_state: State | None, flags, o, final_z, final_y, m, z, grad_o, grad_final, reverse: bool
) -> tuple[Tensor, ...]:
    """Gradients of the logits, v, and the initial m, z and y; o, m and z are the forward's. Without autograd.

    grad_final: of the final m, z and y, each a tensor or None.
    """
    if reverse:
        logits, v, flags, o, m, z, grad_o = flipped(logits, v, flags, o, m, z, grad_o)
        args = (logits, v, initial_state, flags, o, final_z, final_y, m, z, grad_o, grad_final, False)
        grad_logits, grad_v, *grads = gradients(*args)
        return grad_logits.flip(1), grad_v.flip(1), *grads
    past = _past(v, initial_state)
    grad_m, grad_z, grad_y = (
        torch.zeros_like(x) if grad is None else grad for x, grad in zip(past, grad_final, strict=True)
    )
    of_m = grad_m - (grad_y * final_y).sum(-1) - grad_z * final_z  # what m, a maximum, leaves to the logit that it is
    grad_logits, grad_v = torch.zeros_like(logits), torch.zeros_like(v)
    grad = torch.cat((grad_y, grad_z[..., None]), -1)
    for piece in reversed(list(_pieces(v))):
        before = past[0] if piece.start == 0 else m[:, piece.start - 1]
        sequences = _cut(piece, logits, v, flags, o, m, z, grad_o)
        grad_logits[:, piece], grad_v[:, piece], grad, of_m = _adjoint(*sequences, before=before, grad=grad, of_m=of_m)
    grad_y, grad_z = grad[..., :-1], grad[..., -1]
    grad_m = of_m + (grad_y * past[2]).sum(-1) + grad_z * past[1]
    return grad_logits, grad_v, grad_m, grad_z.clone(), grad_y.clone()


def _adjoint(logits, v, flags, o, m, z, grad_o, *, before, grad, of_m) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One piece: gradients of logits and v, of the sums (B, H, V + 1) in units of e^before, and what is left of_m.

    G_t = (grad_o_t, -grad_o_t . o_t) / z_t + e^{m_t - m_{t+1}} G_{t+1},   grad_(v, 1)_t = e^{l_t - m_t} G_t
    """
    earlier = torch.cat((before[:, None], m[:, :-1]), 1)  # the largest logit that each token found
    decay, values = (earlier - m).exp()[..., None].expand(*m.shape, v.shape[3] + 1).flatten(2), v.to(m.dtype)
    grad_sums = torch.zeros_like(torch.cat((values, z[..., None]), -1))
    if grad_o is not None:
        grad_o, scale = grad_o.to(m.dtype), torch.where(z == 0, 0, 1 / z)[..., None]
        grad_sums = torch.cat((grad_o, -(grad_o * o).sum(-1, keepdim=True)), -1) * scale
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


def flipped(*sequences: Tensor | None) -> list[Any]:
    """Each with the last token first."""
    return [None if x is None else x.flip(1) for x in sequences]


def _past(v: Tensor, state: State | None) -> State:
    """The initial state, or that of no past."""
    if state is not None:
        return state
    B, _, H, V = v.shape
    y = v.new_zeros((B, H, V), dtype=state_dtype(v.dtype))
    return y.new_full((B, H), nothing(y.dtype)), y.new_zeros((B, H)), y


def _exponent(logits: Tensor, flags: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `running_max` takes, finite so that a reset cuts off all that was before it; and reset and mask (B, T)."""
    none = nothing(logits.dtype)
    exponent = logits.clamp(none, -none / 2).nan_to_num(none)
    if flags is None:
        return exponent, None, None, None
    reset, padded = (flag[..., 0] for flag in split_flags(flags))
    return *mark_flags(exponent, None, reset, ~padded), reset, ~padded


def _coefficients(logits, v, m, change, flags) -> tuple[Tensor, Tensor]:
    """What diagonal_scan takes for y and z: decays and weighted values, (B, T, H (V + 1))."""
    exponent = (logits - m)[..., None]
    values = torch.cat((v.to(logits.dtype), torch.ones_like(exponent)), -1)
    if flags is not None:
        padded = split_flags(flags)[1][..., None]
        exponent, values = torch.where(padded, -torch.inf, exponent), torch.where(padded, 0, values)
    return change.exp()[..., None].expand(values.shape).flatten(2), (exponent.exp() * values).flatten(2)


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
