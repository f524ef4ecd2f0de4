"""The diagonal linear recurrence h_t = a_t * h_{t-1} + x_t."""

import torch
from torch import Tensor


def diagonal_scan(a, x, initial_state=None, *, reset=None, mask=None, reverse=False, backend="auto"):
    """Placeholder while the kernels are written: the sequential form, with the final signature."""
    B, T, D = x.shape
    dtype = torch.promote_types(torch.promote_types(a.dtype, x.dtype), torch.float32)
    h = torch.zeros(B, D, dtype=dtype, device=x.device) if initial_state is None else initial_state.to(dtype)
    hs: list[Tensor | None] = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        a_t = (a if a.ndim == 1 else a[..., t, :]).to(dtype)
        carried = h if reset is None else torch.where(reset[:, t, None], 0, h)
        new = a_t * carried + x[:, t]
        h = new if mask is None else torch.where(mask[:, t, None], new, carried)
        hs[t] = h
    out = torch.stack(hs, 1) if T else torch.zeros(B, 0, D, dtype=dtype, device=x.device)
    out_dtype = torch.promote_types(x.dtype, dtype) if dtype.is_complex else x.dtype
    return out.to(out_dtype), h


def reset_from_cu_seqlens(cu_seqlens: Tensor, T: int, *, reverse: bool = False) -> Tensor:
    reset = torch.zeros(1, T, dtype=torch.bool, device=cu_seqlens.device)
    inner = cu_seqlens[:-1].long() if not reverse else cu_seqlens[1:].long() - 1
    reset[0, inner] = True
    return reset
