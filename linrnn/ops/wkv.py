"""RWKV-4's attention as a recurrence: a weighted mean of values with weights exp(k), which decay with the distance."""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.ops import _inputs
from linrnn.ops._backend import choose
from linrnn.ops._running_max import mark_flags, nothing, running_max, units
from linrnn.ops.diagonal_scan import diagonal_scan


class WKVState(NamedTuple):
    """Sums over the past in units of exp(p), each (B, D): a of exp(k) v, b of exp(k); p is their largest exponent."""

    p: Tensor
    a: Tensor
    b: Tensor


def wkv_reference(k, v, w, u, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Widened inputs."""
    p, a, b = state
    outs = []
    for t in range(k.shape[1]):
        if reset is not None:
            p = torch.where(reset[:, t, None], nothing(p.dtype), p)
            a, b = (torch.where(reset[:, t, None], 0, x) for x in (a, b))
        k_t, v_t, w_t = k[:, t], v[:, t], w if w.ndim == 1 else w[:, t]
        top = torch.maximum(p, u + k_t)
        past, now = (p - top).exp(), (u + k_t - top).exp()
        outs.append((past * a + now * v_t) / (past * b + now))
        larger = torch.maximum(p + w_t.real, k_t)
        past, now = p - larger, (k_t - larger).exp()
        new = larger, (past + w_t).exp() * a + now * v_t, (past + w_t.real).exp() * b + now
        p, a, b = (
            new if mask is None else (torch.where(mask[:, t, None], x, y) for x, y in zip(new, (p, a, b), strict=True))
        )
    return torch.stack(outs, 1), WKVState(p, a, b)


def wkv(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    initial_state: WKVState | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, WKVState]:
    """The time mixing of RWKV-4, exact for keys of any size.

        o_t = (sum_{i<t} e^{(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (the same sum without v)

    RWKV (Peng et al. 2023, arXiv:2305.13048), where w is the logarithm of the decay (its time_decay parameter gives
    -exp of it) and u the bonus of the current token. Every exponential is taken relative to a running maximum, which a
    scan finds first; numerator and denominator are then two diagonal scans. All derivatives exist, from o and from the
    state, with respect to k, v, w, u and the initial state.

    Args:
        k: (B, T, D), real; any T, also 0.
        v: (B, T, D), real or complex.
        w: log decay per channel, (D,) or (B, T, D); at most 0. A complex one turns the numerator; the denominator
            takes its real part.
        u: (D,), real.
        initial_state: WKVState(p, a, b), each (B, D); None for no past.
        reset: (B, T) bool; where True the past is forgotten before token t.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, and its output is 0.
        backend: of the diagonal scans, or "reference".

    Returns:
        o, (B, T, D), in the common dtype of k and v (complex if w is); and the final state, in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype or device that does not fit, or (looked at on CPU tensors) a w above 0.
    """
    sizes = _check(k, v, w, u, reset, mask)
    if backend not in ("auto", "cpu", "cuda"):  # those the diagonal scans judge
        choose(backend, k, ())
    out_dtype, wide = _inputs.dtypes((k, v), w)
    real = _inputs.real_dtype(wide)
    k, v, u, w = k.to(real), v.to(wide), u.to(real), w.to(wide if w.is_complex() else real)
    state = _state(initial_state, k, wide, sizes)
    if sizes["T"] == 0:
        return v.to(out_dtype), WKVState(*(x.clone() for x in state))
    if mask is not None:
        k, v = (torch.where(mask[..., None], x, 0) for x in (k, v))
    if backend == "reference" or sizes["T"] == 1:
        o, state = wkv_reference(k, v, w, u, state, reset, mask)
    else:
        o, state = _scanned(k, v, w, u, state, reset, mask, backend)
    o = o if mask is None else torch.where(mask[..., None], o, 0)
    return o.to(out_dtype), state


def _scanned(k, v, w, u, state: WKVState, reset, mask, backend: str) -> tuple[Tensor, WKVState]:
    decay = w.real if w.is_complex() else w
    exponent, marked = mark_flags(k, decay, reset, mask)
    p, change = running_max(exponent, marked, state.p)
    last, unit = units(exponent, marked, state.p, p)
    initial_unit = (state.p - state.p.detach()).exp()
    weight = (exponent - p).exp()
    if mask is not None:
        weight = torch.where(mask[..., None], weight, 0)
    numerator_decay = denominator_decay = change.exp()
    if w.is_complex():
        turn = w.imag if mask is None else torch.where(mask[..., None], w.imag, 0)
        numerator_decay = torch.polar(denominator_decay, turn.expand(k.shape))
    a, a_last = diagonal_scan(numerator_decay, weight * v, state.a * initial_unit, reset=reset, backend=backend)
    b, b_last = diagonal_scan(denominator_decay, weight, state.b * initial_unit, reset=reset, backend=backend)

    a, b = (
        torch.cat((state.a[:, None] * initial_unit[:, None], a[:, :-1]), 1),
        torch.cat(((state.b * initial_unit)[:, None], b[:, :-1]), 1),
    )
    p = torch.cat((state.p.detach()[:, None], p[:, :-1]), 1)
    if reset is not None:
        forgotten = reset[..., None]
        p, a, b = (
            torch.where(forgotten, nothing(p.dtype), p),
            torch.where(forgotten, 0, a),
            torch.where(forgotten, 0, b),
        )
    bonus = u + k
    top = torch.maximum(p, bonus.detach())
    past, now = (p - top).exp(), (bonus - top).exp()
    return (past * a + now * v) / (past * b + now), WKVState(last, a_last * unit, b_last * unit)


def _check(k, v, w, u, reset, mask) -> dict[str, int]:
    """Shapes, dtypes, devices and the sign of w; returns the sizes of the dimensions."""
    sizes: dict[str, int] = {}
    _inputs.check_shape("k", k, "BTD", sizes, real=True)
    _inputs.check_shape("v", v, "BTD", sizes)
    _inputs.check_log_decay(w, ("D", "BTD"), sizes, k.device, name="w")
    _inputs.check_shape("u", u, "D", sizes, real=True)
    for name, x in (("v", v), ("u", u)):
        _inputs.check_device(name, x, k.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], k.device)
    return sizes


def _state(state: WKVState | None, k: Tensor, wide: torch.dtype, sizes: dict[str, int]) -> WKVState:
    """The initial state, checked and in the dtypes of states, or that of no past."""
    if state is None:
        b = k.new_zeros(sizes["B"], sizes["D"])
        return WKVState(torch.full_like(b, nothing(b.dtype)), b.to(wide), b)
    if not isinstance(state, tuple) or len(state) != 3:
        raise TypeError(f"initial_state must be a WKVState (p, a, b), got {type(state).__name__}")
    for name, x in zip("pab", state, strict=True):
        _inputs.check_shape(f"initial_state.{name}", x, "BD", sizes)
        _inputs.check_device(f"initial_state.{name}", x, k.device)
    p, a, b = state
    return WKVState(
        *(
            _inputs.widen(f"initial_state.{n}", x, d)
            for n, x, d in (("p", p, k.dtype), ("a", a, wide), ("b", b, k.dtype))
        )
    )
