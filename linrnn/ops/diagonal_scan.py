"""The diagonal linear recurrence h_t = a_t * h_{t-1} + x_t, the engine of every vector-state layer."""

import torch
from torch import Tensor

from linrnn.kernels import coefficient_dtype, state_dtype
from linrnn.ops._backend import choose, unwatched

_STATE_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
DTYPES = (torch.float16, torch.bfloat16, *_STATE_DTYPES)


def diagonal_scan_reference(a, x, initial_state, reset, mask, reverse):
    """The recurrence as written, token by token: the oracle of the tests. Arguments as diagonal_scan, checked."""
    _, T, _ = x.shape
    h, hs = initial_state, [x.new_empty(0)] * T
    for t in reversed(range(T)) if reverse else range(T):
        a_t = a if a.ndim == 1 else a[..., t, :]
        h = h if reset is None else torch.where(reset[:, t, None], 0, h)
        new = a_t * h + x[:, t]
        h = new if mask is None else torch.where(mask[:, t, None], new, h)
        hs[t] = h
    return torch.stack(hs, 1) if T else x, h


def diagonal_scan(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Scans h_t = a_t * h_{t-1} + x_t along time.

    The first-order linear recurrence of Martin and Cundy (2018, arXiv:1709.04057), elementwise over channels. All
    derivatives exist, with respect to `a`, `x` and `initial_state`, from both outputs.

    Args:
        a: coefficients, (D,) constant in time, (T, D), or (B, T, D); real or complex. A constant `a` is never
            streamed through memory: it costs less than one that varies.
        x: inputs, (B, T, D), real or complex; any T, also 0. float16 and bfloat16 are storage formats: the state is
            float32 then, and `a` may stay float32 beside them (bfloat16 cannot hold 0.999).
        initial_state: the state before the first token processed, (B, D); zero if None.
        reset: (B, T) bool; where True the state is zeroed before token t is processed, as at the first token of a
            packed document. A reverse scan enters a document at its last token: `reset_from_cu_seqlens` has a flag.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, h_t = h_{t-1}, and what x
            and a hold there is ignored.
        reverse: scans from T-1 down to 0; the final state is then the one after token 0.
        backend: "auto" takes the fastest that can run; "reference", "torch", "cpu" or "cuda" force one.

    Returns:
        h, (B, T, D), and the final state, (B, D). h has x's dtype for half-precision real inputs and otherwise the
        common dtype of `a` and `x`; the state has at least float32 (or complex64).

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a rank, shape, dtype or device that does not fit, or an unknown backend.
        BackendUnavailable: (a ValueError and a RuntimeError) a known backend that cannot run here.
    """
    if initial_state is not None and reset is None and mask is None and _single_step(a, x, initial_state, backend):
        h = torch.addcmul(x, a, initial_state.unsqueeze(1))
        return h, h.select(1, 0).clone()  # not a view: what is done to h in place must not reach the state
    B, D = _check(a, x, initial_state, reset, mask)
    a, x, wide_dtype = promote(a, x)
    if initial_state is not None and initial_state.dtype != wide_dtype:
        if initial_state.is_complex() and not wide_dtype.is_complex:
            raise ValueError(f"initial_state is {initial_state.dtype}, but a and x are real, so the state is real too")
        initial_state = initial_state.to(wide_dtype)

    if backend == "reference":
        wide = x.to(wide_dtype)
        state = wide.new_zeros(B, D) if initial_state is None else initial_state
        h, final_state = diagonal_scan_reference(a, wide, state, reset, mask, reverse)
        return h.to(x.dtype), final_state
    if torch.compiler.is_compiling():
        from linrnn.ops._scan_autograd import scan_op

        return scan_op(a, x, initial_state, flags_of(reset, mask), reverse, backend)
    if _plain(a, x, initial_state):
        from linrnn.ops._scan_autograd import scan_forward

        return scan_forward(a, x, initial_state, flags_of(reset, mask), reverse, backend)
    from linrnn.ops._scan_autograd import KERNELS, apply

    choose(backend, x, KERNELS)
    return apply(a, x, initial_state, flags_of(reset, mask), reverse, backend)


def reset_from_cu_seqlens(cu_seqlens: Tensor, T: int, *, reverse: bool = False) -> Tensor:
    """Resets (1, T) bool for documents packed in one row at boundaries cu_seqlens = (0, n_1, n_1 + n_2, ..., T).

    Marks the first token of each document, or with `reverse=True` the last one, where a reverse scan enters it.
    Empty documents are allowed. Raises ValueError for boundaries that do not rise from 0 to T.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point() or cu_seqlens.is_complex():
        raise ValueError(f"cu_seqlens must be a 1-d integer tensor (0, ..., T), got {cu_seqlens}")
    bounds = cu_seqlens.long()
    if bounds[0] != 0 or bounds[-1] != T or bool((bounds.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {T}, got {cu_seqlens.tolist()}")
    reset = torch.zeros(1, T, dtype=torch.bool, device=cu_seqlens.device)
    filled = bounds.diff() > 0
    reset[0, (bounds[1:] - 1 if reverse else bounds[:-1])[filled]] = True
    return reset


def _check(a, x, initial_state, reset, mask) -> tuple[int, int]:
    """Shapes, dtype kinds and devices; returns B, D."""
    for name, v in (("a", a), ("x", x), ("initial_state", initial_state), ("reset", reset), ("mask", mask)):
        if not isinstance(v, Tensor) and (v is not None or name in "ax"):
            raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
    if x.ndim != 3:
        raise ValueError(f"x must be (B, T, D), got shape {tuple(x.shape)}")
    B, T, D = x.shape
    if a.shape != (D,) and a.shape != (T, D) and a.shape != (B, T, D):
        raise ValueError(
            f"a must be (D,), (T, D) or (B, T, D) with (B, T, D) = {(B, T, D)} from x, got shape {tuple(a.shape)}"
        )
    for name, v in (("a", a), ("x", x), ("initial_state", initial_state)):
        if v is not None:
            check_dtype(name, v)
    if initial_state is not None and initial_state.shape != (B, D):
        raise ValueError(f"initial_state must be (B, D) = {(B, D)}, got shape {tuple(initial_state.shape)}")
    for name, v in (("reset", reset), ("mask", mask)):
        if v is not None and (v.dtype != torch.bool or v.shape != (B, T)):
            raise ValueError(f"{name} must be bool of shape (B, T) = {(B, T)}, got {v.dtype} {tuple(v.shape)}")
    for name, v in (("a", a), ("initial_state", initial_state), ("reset", reset), ("mask", mask)):
        if v is not None and v.device != x.device:
            raise ValueError(f"{name} is on {v.device} but x is on {x.device}; move them to one device")
    return B, D


def check_dtype(name: str, v: Tensor) -> None:
    if v.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name} must be floating point or complex, one of {names}, got {v.dtype}")


def promote(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """a and x in a pair of dtypes that the kernels have, and the dtype of the state.

    The pairs: equal dtypes; a real float32 (float64) beside a complex64 (complex128) x; float32 beside half x.
    """
    half = (torch.float16, torch.bfloat16)
    if a.dtype == x.dtype:
        pass
    elif x.dtype in half and a.dtype in (torch.float32, *half):
        a = a.float()
    else:
        common = torch.promote_types(a.dtype, x.dtype)
        x = x.to(common)
        a = a.to(coefficient_dtype(a.dtype, common))
    return a, x, state_dtype(x.dtype)


def flags_of(reset: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B, T) uint8 for the kernels: bit 0 is reset, bit 1 is padding."""
    if mask is None:
        return None if reset is None else reset.to(torch.uint8)
    padding = (~mask).to(torch.uint8) << 1
    return padding if reset is None else padding | reset.to(torch.uint8)


def _single_step(a: Tensor, x: Tensor, initial_state: Tensor, backend: str) -> bool:
    """Whether the call is one decoding step with nothing to convert and nobody watching.

    It is then one torch operation, and these checks are most of what it costs: the rest of the file is passed by.
    """
    return (
        not torch.compiler.is_compiling()
        and backend == "auto"
        and _plain(a, x, initial_state)
        and x.ndim == 3
        and x.shape[1] == 1
        and (a.shape == x.shape[2:] or a.shape == x.shape[1:] or a.shape == x.shape)
        and initial_state.shape == (x.shape[0], x.shape[2])
        and a.dtype == x.dtype == initial_state.dtype
        and a.device == x.device == initial_state.device
        and x.dtype in _STATE_DTYPES
    )


def _plain(a: Tensor, x: Tensor, initial_state: Tensor | None) -> bool:
    """Whether the call goes straight to the kernel: no gradient is wanted and nothing watches."""
    tensors = (a, x) if initial_state is None else (a, x, initial_state)
    return unwatched(tensors) and not (torch.is_grad_enabled() and any(v.requires_grad for v in tensors))
