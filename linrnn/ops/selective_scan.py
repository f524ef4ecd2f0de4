"""Mamba's selective scan: a diagonal state space model whose step size, input and output maps depend on the token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops import _inputs
from linrnn.ops._selective_scan import scan
from linrnn.ops.diagonal_scan import flags_of


def selective_scan_reference(x, dt, A, B, C, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Widened inputs; B, C (B, T, D, N)."""
    ys = []
    for t in range(x.shape[1]):
        h = state if reset is None else torch.where(reset[:, t, None, None], 0, state)
        Δ = dt[:, t, :, None]
        new = (Δ * A).exp() * h + Δ * B[:, t] * x[:, t, :, None]
        state = new if mask is None else torch.where(mask[:, t, None, None], new, h)
        y = (C[:, t] * state).sum(-1)
        ys.append(2 * y.real if y.is_complex() else y)
    return torch.stack(ys, 1), state


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Runs the S6 recurrence of Mamba (Gu and Dao 2023, arXiv:2312.00752, algorithm 2) on every channel.

        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        h: (D, N), for every sequence
        y_t = (C_t^T h_t + D x_t) silu(z_t)             2 Re(C_t^T h_t) where A is complex

    The discretisation, the scan over (D, N) states and the contraction with C happen together: nothing of the size
    (B, T, D, N) is stored, and the backward computes the states again from one in `_selective_scan.SPACING`. All
    derivatives exist, from y and from the state.

    Args:
        x: inputs, (B, T, D), real; any T, also 0.
        dt: step sizes, (B, T, D), real; after `dt_bias` and `dt_softplus` they should not be negative.
        A: (D, N), real or complex; its real part should be negative.
        B, C: (B, T, N), or (B, T, G, N) for G groups of D / G neighbouring channels; complex only beside a complex A.
        D: skip connection, (D,).
        z: gate, (B, T, D).
        initial_state: (B, D, N); zero if None.
        dt_bias: (D,), added to dt.
        dt_softplus: whether dt (with its bias) passes through softplus.
        reset: (B, T) bool; where True the state is zeroed before token t.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, whatever stands there, and
            its output is 0.
        backend: "auto", "reference", "torch", "cpu" or "cuda". "torch" runs in pieces of time: its memory does not grow
            with T, but for what it returns.

    Returns:
        y, (B, T, D), in the common dtype of x and z; and the final state, (B, D, N), in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
        BackendUnavailable: (a ValueError and a RuntimeError) a known backend that cannot run here.
    """
    B, C = (v[:, :, None] if isinstance(v, Tensor) and v.ndim == 3 else v for v in (B, C))
    sizes = _check(x, dt, A, B, C, D, z, initial_state, dt_bias, reset, mask)
    out_dtype = x.dtype if z is None else torch.promote_types(x.dtype, z.dtype)
    wide = state_dtype(x.dtype)
    for v in (dt, A, B, C):
        wide = torch.promote_types(wide, v.dtype)
    real = _inputs.real_dtype(wide)
    A = A.to(wide)
    if initial_state is not None:
        initial_state = _inputs.widen("initial_state", initial_state, wide)
    if mask is not None:  # what stands at padded tokens must reach no gradient
        x, dt = (torch.where(mask[..., None], v, 0) for v in (x, dt))
        z = None if z is None else torch.where(mask[..., None], z, 0)
    with _inputs.full_precision(x.device.type):
        if dt_bias is not None:
            dt = dt.to(real) + dt_bias
        if dt_softplus:
            dt = F.softplus(dt.to(real))
        if backend == "reference":
            state = initial_state
            if state is None:
                state = x.new_zeros((sizes["B"], sizes["D"], sizes["N"]), dtype=wide)
            y, state = _by_reference(x.to(real), dt.to(real), A, B.to(wide), C.to(wide), state, reset, mask)
        else:
            y, state = scan(x, dt, A, B, C, initial_state, flags_of(reset, mask), backend)
        if D is not None:
            y = y + D.to(real) * x
        if z is not None:
            y = y * F.silu(z.to(real))
        return y.to(out_dtype), state


def _by_reference(x, dt, A, B, C, state, reset, mask) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 0:
        return x, state.clone()
    if mask is not None:
        x, dt = (torch.where(mask[..., None], v, 0) for v in (x, dt))
        B, C = (torch.where(mask[..., None, None], v, 0) for v in (B, C))
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    return selective_scan_reference(x, dt, A, B, C, state, reset, mask)


def _check(x, dt, A, B, C, D, z, initial_state, dt_bias, reset, mask) -> dict[str, int]:
    """Shapes, dtypes and devices; returns the sizes of the dimensions."""
    sizes: dict[str, int] = {}
    _inputs.check_shape("x", x, "BTD", sizes, real=True)
    _inputs.check_shape("dt", dt, "BTD", sizes, real=True)
    _inputs.check_shape("A", A, "DN", sizes)
    _inputs.check_shape("B", B, "BTGN", sizes, real=not A.is_complex())
    _inputs.check_shape("C", C, "BTGN", sizes, real=not A.is_complex())
    if sizes["N"] < 1:
        raise ValueError(f"A must be (D, N) with N of at least 1, got shape {tuple(A.shape)}")
    if sizes["G"] < 1 or sizes["D"] % sizes["G"]:
        raise ValueError(f"B and C must have a number of groups that divides D = {sizes['D']}, got {sizes['G']}")
    optional = (("D", D, "D", True), ("z", z, "BTD", True), ("dt_bias", dt_bias, "D", True))
    for name, v, letters, real in (*optional, ("initial_state", initial_state, "BDN", False)):
        if v is not None:
            _inputs.check_shape(name, v, letters, sizes, real=real)
    named = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "initial_state": initial_state, "dt_bias": dt_bias}
    for name, v in named.items():
        _inputs.check_device(name, v, x.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], x.device)
    return sizes
