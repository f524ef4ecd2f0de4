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
from linrnn.ops._running_max import finite_exponent, mark_flags, nothing, running_max, units
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
    logits, v, initial_state: State | None, flags, o, final_z, final_y, m, z, grad_o, grad_final, reverse: bool, kernels
) -> tuple[Tensor, ...]:
    """Gradients of the logits, v, and the initial m, z and y; o, m and z are the forward's. Without autograd.

    grad_final: of the final m, z and y, each a tensor or None. kernels: a module with `head_scan` and `row_dots`, or
    None for those here, in pieces of time.
    """
    if reverse:
        logits, v, flags, o, m, z, grad_o = flipped(logits, v, flags, o, m, z, grad_o)
        args = (logits, v, initial_state, flags, o, final_z, final_y, m, z, grad_o, grad_final, False, kernels)
        grad_logits, grad_v, *grads = gradients(*args)
        return grad_logits.flip(1), grad_v.flip(1), *grads
    past = _past(v, initial_state)
    grad_m, grad_z, grad_y = (
        torch.zeros_like(x) if grad is None else grad for x, grad in zip(past, grad_final, strict=True)
    )
    of_m = grad_m - (grad_y * final_y).sum(-1) - grad_z * final_z  # what m, a maximum, leaves to the logit that it is
    if grad_o is None:
        grad_o = v.new_zeros(()).expand(v.shape)
    grad_o = grad_o.to(v.dtype)
    grad_logits, grad_v = torch.zeros_like(logits), torch.zeros_like(v)
    pieces = list(_pieces(v)) if kernels is None else [slice(0, v.shape[1])]
    for piece in reversed(pieces):
        before = past[0] if piece.start == 0 else m[:, piece.start - 1]
        sequences = _cut(piece, logits, v, flags, o, m, z, grad_o)
        found = _adjoint(sequences, before, grad_z, grad_y, of_m, kernels)
        grad_logits[:, piece], grad_v[:, piece], grad_z, grad_y, of_m = found
    grad_m = of_m + (grad_y * past[2]).sum(-1) + grad_z * past[1]
    return grad_logits, grad_v, grad_m, grad_z.clone(), grad_y.clone()


def _adjoint(sequences, before, grad_z, grad_y, of_m, kernels) -> tuple[Tensor, ...]:
    """One piece: gradients of logits and v, of z and y in units of e^before, and what is left of_m.

    G_t = (grad_o_t, -grad_o_t . o_t) / z_t + e^{m_t - m_{t+1}} G_{t+1},   grad_(v, 1)_t = e^{l_t - m_t} G_t
    """
    logits, v, flags, o, m, z, grad_o = sequences
    scan, dots = (head_scan, row_dots) if kernels is None else (kernels.head_scan, kernels.row_dots)
    earlier = torch.cat((before[:, None], m[:, :-1]), 1)  # the largest logit that each token found
    decay, scale, weight = (earlier - m).exp(), torch.where(z == 0, 0, 1 / z), (logits - m).exp()
    record, T = (logits == m) & (earlier < m), torch.arange(m.shape[1], device=m.device)[:, None]
    forgotten, of_z = torch.full_like(m[:, 0], -1, dtype=torch.int64), -dots(grad_o, o)
    padded = None
    if flags is not None:
        reset, padded = split_flags(flags)
        decay = torch.where(reset, 0, decay)
        scale, weight, of_z = (torch.where(padded, 0, x) for x in (scale, weight, of_z))
        record = (record | (reset & (logits == m))) & ~padded
        forgotten = torch.where(reset, T, -1).amax(1).expand_as(forgotten)
    grad_v, grad_y = scan(grad_o, decay, scale, weight, grad_y, flags)
    of_weight, grad_z = scan(of_z[..., None], decay, scale, weight, grad_z[..., None], flags)
    grad_logits = dots(v, grad_v)
    grad_logits = of_weight[..., 0] + (grad_logits if padded is None else torch.where(padded, 0, grad_logits))
    last = torch.where(record, T, -1).amax(1)
    here = (T == last[:, None]) & (last >= forgotten)[:, None]
    grad_logits = grad_logits + torch.where(here, of_m[:, None], 0)
    left = torch.where((last < 0) & (forgotten < 0), of_m, 0)
    return grad_logits, grad_v, grad_z[..., 0], grad_y, left


def head_scan(x, decay, scale, weight, final, flags) -> tuple[Tensor, Tensor]:
    """What kernels.cuda.softmax_scan has under this name, but its output is in the dtype of states."""
    drive = x.to(decay.dtype) * scale[..., None]
    if flags is not None:
        drive = torch.where(split_flags(flags)[1][..., None], 0, drive)
    flat, decays = drive.flatten(2), decay[..., None].expand(drive.shape).flatten(2)
    _, G, first = scan_backward(decays, flat, final.flatten(1), flags, flat, final.flatten(1), False, False, "auto")
    return weight[..., None] * G.view(drive.shape), first.view(final.shape)


def row_dots(u, v) -> Tensor:
    """The dot products over the last dimension, in the dtype of states."""
    return (u.to(state_dtype(u.dtype)) * v).sum(-1)


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
    exponent = finite_exponent(logits)
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
