"""Linear attention as a recurrence with a matrix state: S_t = a_t S_{t-1} + k_t v_t^T, o_t = q_t^T S_t."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops import _inputs, _triton
from linrnn.ops._backend import choose
from linrnn.ops._chunks import (
    Row,
    carry,
    chunk_length,
    decayed_scores,
    from_chunks,
    plus_product,
    scaled,
    step_decays,
    to_chunks,
)
from linrnn.ops._running_max import mark_flags, nothing, running_max, units


class NormalizedState(NamedTuple):
    """The state of normalized linear attention: S (B, H, K, V) and the denominator's z (B, H, K).

    With log_features, m (B, H, K) is the running maximum of the exponents of each feature, and S and z are in units of
    exp(m); else m is None.
    """

    S: Tensor
    z: Tensor
    m: Tensor | None = None


def linear_attention_reference(q, k, v, log_decay, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Scaled q, widened inputs, a zero state."""
    S, outs = state, []
    for t in range(q.shape[1]):
        S = S if reset is None else torch.where(reset[:, t, None, None, None], 0, S)
        new = S if log_decay is None else step_decays(log_decay, t) * S
        new = new + k[:, t, :, :, None] * v[:, t, :, None, :]
        S = new if mask is None else torch.where(mask[:, t, None, None, None], new, S)
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        outs.append(o if mask is None else torch.where(mask[:, t, None, None], o, 0))
    return torch.stack(outs, 1), S


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | NormalizedState | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    log_features: bool = False,
    eps: float = 0.0,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "chunk",
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Any]:
    """Causal linear attention with decay: S_t = exp(log_decay_t) * S_{t-1} + k_t v_t^T and o_t = scale * q_t^T S_t.

    Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) without decay, RetNet (2307.08621) with a constant
    one per head, Mamba-2 (2405.21060) with one per head and token, GLA (2312.06635) with one per key channel and token.
    All derivatives exist, from both outputs, with respect to q, k, v, log_decay and the initial state.

    Args:
        q, k: (B, T, H, K), feature maps already applied; any T, also 0. Real, or complex (nothing is conjugated).
        v: (B, T, H, V).
        initial_state: S before the first token, (B, H, K, V), or with `normalize` a NormalizedState; zero if None.
        log_decay: None, (H,), (B, T, H) or (B, T, H, K); at most 0 (its real part), -inf forgets all.
        scale: of q; K ** -0.5 if None, as in softmax attention. None with `normalize`, which divides it out.
        normalize: divides o_t by q_t^T z_t, where z_t = exp(log_decay_t) * z_{t-1} + k_t. Where that is exactly 0,
            as before the first real token, o_t is 0.
        log_features: q and k hold the logarithms of the features: exponential feature maps, exact for exponents of any
            size. Needs `normalize`.
        eps: added to the denominator, for feature maps that may vanish.
        reset: (B, T) bool; where True the state is zeroed before token t, as at the first token of a packed document.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, and its output is 0.
        mode: "chunk" (matrix products within chunks of time, a scan between them), "recurrent" (token by token; also
            what a T of 1 takes), "parallel" (one chunk: work quadratic in T) or "reference".
        chunk_size: of the chunk form; rounded up to a power of two.
        backend: "auto", "torch", "reference", or "triton" (which "auto" takes on CUDA, in float32 and half precision;
            chunks of 16 to 64 tokens, token by token in one kernel where no gradient is asked for).

    Returns:
        o, (B, T, H, V), in the common dtype of q, k and v; and the final state, in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device or option that does not fit, or (looked at on CPU tensors) a log_decay
            above 0.
    """
    sizes = _check(q, k, v, log_decay, reset, mask)
    _inputs.check_mode(mode, chunk_size)
    chosen = choose(backend, q, _triton.BACKENDS)
    if chosen == "reference":
        mode = "reference"
    if log_features and (not normalize or eps != 0.0):
        raise ValueError(
            f"log_features=True needs normalize=True and eps=0.0 (exponentials have no fixed scale), "
            f"got normalize={normalize}, eps={eps}"
        )
    if normalize and scale is not None:
        raise ValueError(f"scale must be None with normalize=True, which divides it out, got {scale}")
    if eps < 0 or (eps and not normalize):
        raise ValueError(f"eps must be at least 0, and needs normalize=True, got eps={eps}, normalize={normalize}")
    out_dtype, wide = _inputs.dtypes((q, k, v), log_decay)
    if log_features and wide.is_complex:
        raise ValueError(f"log_features=True needs real inputs, got {wide}")
    scale = 1.0 if normalize else sizes["K"] ** -0.5 if scale is None else scale
    call, narrow = None, wide
    if chosen == "triton" and _triton.fits(backend, mode, wide):
        call = _triton.Call(scale, wide if normalize else out_dtype)
        narrow = wide if log_features else out_dtype
    q, k, v = q.to(narrow), k.to(narrow), v.to(narrow)
    if log_decay is not None:
        log_decay = log_decay.to(wide if log_decay.is_complex() else _inputs.real_dtype(wide))
        if log_decay.is_complex():
            log_decay = torch.complex(log_decay.real.clamp(min=_inputs.FORGET), log_decay.imag)
    q = q if scale == 1.0 or call is not None else q * scale

    with _inputs.full_precision(q.device.type):
        if not normalize:
            S = _inputs.matrix_state(initial_state, sizes, wide, q.device)
            o, S = _run(q, k, v, log_decay, S, reset, mask, mode, chunk_size, call)
            return o.to(out_dtype), S
        S, z, m = _normalized(initial_state, q, wide, sizes, log_features)
        state = torch.cat((S, z[..., None]), -1)
        unit = None
        if m is not None:
            q = q if mask is None else torch.where(_inputs.expand_flags(mask, q), q, 0)
            exponent, marked = mark_flags(k, _per_channel(log_decay), reset, mask)
            state = state * (m - m.detach()).exp()[..., None]
            q, k, log_decay, m, unit = _exponentiate(q, exponent, marked, m)
        # the denominator is one more column of values, of ones
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
        o, state = _run(q, k, v, log_decay, state, reset, mask, mode, chunk_size, call)
        state = scaled(state, unit)
        below = o[..., -1:] + eps
        o = o[..., :-1] / torch.where(below == 0, 1, below)
        return o.to(out_dtype), NormalizedState(state[..., :-1].contiguous(), state[..., -1].contiguous(), m)


def _per_channel(log_decay: Tensor | None) -> Tensor | None:
    """(H,) or (B, T, H) to what broadcasts to (B, T, H, K)."""
    return log_decay if log_decay is None or log_decay.ndim == 4 else log_decay[..., None]


def _exponentiate(q: Tensor, k: Tensor, log_decay: Tensor | None, m0: Tensor):
    """Features out of their logarithms, each in units of its running maximum m_t: to change units is one more decay.

    The units are constants to autograd. Returns q, k and log_decay in them, the last m with its gradient, and the
    factor (of 1, with a gradient) that puts the final state in units of that.
    """
    if k.shape[1] == 0:
        return q, k, None, m0, (m0.detach() - m0).exp()[..., None]
    m, change = running_max(k, log_decay, m0)
    level = q + m
    q = (level - level.detach().amax(-1, keepdim=True)).exp()
    last, unit = units(k, log_decay, m0, m)
    return q, (k - m).exp(), change, last, unit[..., None]


def _run(q, k, v, log_decay, state, reset, mask, mode, chunk_size, call=None) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    if T == 0:
        zero = q.new_zeros((B, H, K, v.shape[-1]), dtype=state_dtype(q.dtype))
        return v, zero if state is None else state.clone()
    if mode == "reference":
        zero = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state
        return linear_attention_reference(q, k, v, log_decay, zero, reset, mask)
    log_decay, (q, k, v) = _inputs.fold_flags(log_decay, reset, mask, q, q, k, v)
    if call is not None:
        recurrent = mode == "recurrent" or T == 1
        return _triton.run(call, q, k, v, None, log_decay, state, chunk_size, recurrent)
    if mode == "recurrent" or T == 1:
        return _recurrent(q, k, v, log_decay, state)
    return _chunked(q, k, v, log_decay, state, chunk_length(T, T if mode == "parallel" else chunk_size))


def _recurrent(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, S: Tensor | None) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(q.shape[1]):
        key, value = k[:, t, :, :, None], v[:, t, :, None, :]
        if S is None:
            S = key * value
        else:
            decayed = S if log_decay is None else S * step_decays(log_decay, t)
            S = torch.addcmul(decayed, key, value)
        outs.append((q[:, t, :, None, :] @ S).squeeze(-2))
    assert S is not None
    return outs[0].unsqueeze(1) if len(outs) == 1 else torch.stack(outs, 1), S


def _chunked(q, k, v, log_decay, state, C: int) -> tuple[Tensor, Tensor]:
    """Within chunks of C tokens (Q K^T * decays) V; before them Q S, with the states S of a scan over the chunks."""
    B, T, H = q.shape[:3]
    if log_decay is not None and log_decay.ndim == 1 and T % C:  # the padding of the last chunk must not decay
        whole = T - T % C
        o, state = (
            _chunked(q[:, :whole], k[:, :whole], v[:, :whole], log_decay, state, C) if whole else (v[:, :0], state)
        )
        log_decay = log_decay.expand(B, T - whole, H)
        q, k, v, C = q[:, whole:], k[:, whole:], v[:, whole:], chunk_length(T - whole, C)
        rest, state = _chunked(q, k, v, log_decay, state, C)
        return torch.cat((o, rest), 1), state
    q, k, v = (to_chunks(x, C) for x in (q, k, v))  # (n, B, H, C, ...)
    if log_decay is not None:
        log_decay = log_decay.view(1, 1, H, 1).expand(1, 1, H, C) if log_decay.ndim == 1 else to_chunks(log_decay, C)
    ((scores,),), decays = decayed_scores((Row(q),), (k,), log_decay)
    before, last = carry(decays.total, scaled(k, decays.out).mT @ v, state)
    o = scores @ v
    if before is not None:
        o = plus_product(o, scaled(q, decays.into), before)
    return from_chunks(o, T), last


def _check(q, k, v, log_decay, reset, mask) -> dict[str, int]:
    """Shapes, dtype kinds, devices and the sign of log_decay; returns the sizes of the dimensions."""
    sizes: dict[str, int] = {}
    for name, x, letters in (("q", q, "BTHK"), ("k", k, "BTHK"), ("v", v, "BTHV")):
        _inputs.check_shape(name, x, letters, sizes)
        _inputs.check_device(name, x, q.device)
    if log_decay is not None:
        _inputs.check_log_decay(log_decay, ("H", "BTH", "BTHK"), sizes, q.device)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], q.device)
    return sizes


def _normalized(state, q: Tensor, wide: torch.dtype, sizes: dict[str, int], log_features: bool) -> NormalizedState:
    """The initial state, checked, or a zero one."""
    if state is None:
        z = q.new_zeros([sizes[letter] for letter in "BHK"], dtype=wide)
        m = torch.full_like(z, nothing(z.dtype)) if log_features else None
        return NormalizedState(z.new_zeros(*z.shape, sizes["V"]), z, m)
    if not isinstance(state, tuple) or len(state) != 3 or (state[2] is not None) != log_features:
        wanted = "(S, z, m)" if log_features else "(S, z, None)"
        given = f"a tuple of {len(state)}" if isinstance(state, tuple) else type(state).__name__
        raise TypeError(
            f"initial_state must be a NormalizedState {wanted} with normalize=True and log_features={log_features}, "
            f"got {given}" + (" with m = None" if log_features else " with m") * (given == "a tuple of 3")
        )
    parts = []
    for name, part, letters in zip(("S", "z", "m"), state, ("BHKV", "BHK", "BHK"), strict=True):
        if part is not None:
            _inputs.check_shape(f"initial_state.{name}", part, letters, sizes)
            _inputs.check_device(f"initial_state.{name}", part, q.device)
            part = _inputs.widen(f"initial_state.{name}", part, wide)
        parts.append(part)
    return NormalizedState(*parts)
