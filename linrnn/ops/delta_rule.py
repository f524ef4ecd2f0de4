"""The delta rule, gated or not: a linear RNN whose matrix state overwrites what a key held."""

import torch
from torch import Tensor

from linrnn.ops import _inputs, _triton
from linrnn.ops._backend import choose
from linrnn.ops._chunks import (
    Row,
    chunk_length,
    decayed_scores,
    from_chunks,
    matrix_carry,
    plus_product,
    scaled,
    step_decays,
    to_chunks,
    unit_lower_inverse,
)


def delta_rule_reference(q, k, v, beta, log_decay, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Scaled q, widened inputs."""
    S, outs = state, []
    for t in range(q.shape[1]):
        S = S if reset is None else torch.where(reset[:, t, None, None, None], 0, S)
        new = S if log_decay is None else step_decays(log_decay, t) * S
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], new)
        write = beta[:, t, :, None] * (v[:, t] - read)
        new = new + k[:, t, :, :, None] * write[:, :, None, :]
        S = new if mask is None else torch.where(mask[:, t, None, None, None], new, S)
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], S)
        outs.append(o if mask is None else torch.where(mask[:, t, None, None], o, 0))
    return torch.stack(outs, 1), S


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "chunk",
    chunk_size: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = (I - beta_t k_t k_t^T) exp(log_decay_t) S_{t-1} + beta_t k_t v_t^T and o_t = scale * q_t^T S_t.

    One step of gradient descent on |S^T k_t - v_t|^2 / 2 (DeltaNet: Schlag et al. 2021, arXiv:2102.11174; in chunks:
    Yang et al. 2024, 2406.06484; gated: 2412.06464; with a decay per channel: Kimi Delta Attention, 2510.26692). It is
    stable while beta_t |k_t|^2 lies in [0, 2]: normalize k to length 1. Where it stays near 2 for thousands of tokens
    nothing contracts, and the chunk form loses about two more digits to rounding than a loop. All derivatives exist,
    from both outputs, with respect to q, k, v, beta, log_decay and the initial state.

    Args:
        q, k: (B, T, H, K), real; any T, also 0.
        v: (B, T, H, V).
        beta: (B, T, H), in [0, 2]: 0 leaves the state, 1 replaces what k_t held, above 1 reflects it.
        initial_state: (B, H, K, V); zero if None.
        log_decay: None, (H,), (B, T, H) or (B, T, H, K); at most 0, -inf forgets all.
        scale: of q; K ** -0.5 if None.
        reset: (B, T) bool; where True the state is zeroed before token t.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, and its output is 0.
        mode: "chunk" (the UT transform: one triangular inverse and matrix products per chunk), "recurrent" (token by
            token; also what a T of 1 takes), "parallel" (one chunk) or "reference".
        chunk_size: of the chunk form; rounded up to a power of two.
        backend: "auto", "torch", "reference", or "triton" (which "auto" takes on CUDA, in float32 and half precision;
            chunks of 16 to 64 tokens, token by token in one kernel where no gradient is asked for).

    Returns:
        o, (B, T, H, V), in the common dtype of q, k and v; and the final state, in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device or option that does not fit, or (looked at on CPU tensors) a beta outside
            [0, 2] or a log_decay above 0.
    """
    sizes = _check(q, k, v, beta, log_decay, reset, mask)
    _inputs.check_mode(mode, chunk_size)
    chosen = choose(backend, q, _triton.BACKENDS)
    if chosen == "reference":
        mode = "reference"
    out_dtype, wide = _inputs.dtypes((q, k, v), log_decay)
    scale = sizes["K"] ** -0.5 if scale is None else scale
    call, narrow = None, wide
    if chosen == "triton" and _triton.fits(backend, mode, wide):
        call, narrow = _triton.Call(scale, out_dtype), out_dtype
    q, k, v, beta = q.to(narrow), k.to(narrow), v.to(narrow), beta.to(wide)
    log_decay = None if log_decay is None else log_decay.to(wide)
    q = q if scale == 1.0 or call is not None else q * scale
    with _inputs.full_precision(q.device.type):
        state = _inputs.matrix_state(initial_state, sizes, wide, q.device)
        o, state = _run(q, k, v, beta, log_decay, state, reset, mask, mode, chunk_size, call)
        return o.to(out_dtype), state


def _run(q, k, v, beta, log_decay, state, reset, mask, mode, chunk_size, call=None) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    if T == 0:
        return v, q.new_zeros((B, H, K, v.shape[-1]), dtype=beta.dtype) if state is None else state.clone()
    if state is None and call is None and (mode in ("reference", "recurrent") or T == 1):
        state = q.new_zeros(B, H, K, v.shape[-1])
    if mode == "reference":
        return delta_rule_reference(q, k, v, beta, log_decay, state, reset, mask)
    log_decay, (q, k, v, beta) = _inputs.fold_flags(log_decay, reset, mask, q, q, k, v, beta)
    if call is not None:
        recurrent = mode == "recurrent" or T == 1
        return _triton.run(call, q, k, v, beta, log_decay, state, chunk_size, recurrent)
    if mode == "recurrent" or T == 1:
        return _recurrent(q, k, v, beta, log_decay, state)
    return _chunked(q, k, v, beta, log_decay, state, chunk_length(T, T if mode == "parallel" else chunk_size))


def _recurrent(q, k, v, beta, log_decay, S) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(q.shape[1]):
        key = k[:, t, :, None, :]  # (B, H, 1, K)
        S = S if log_decay is None else S * step_decays(log_decay, t)
        write = (v[:, t, :, None, :] - key @ S) * beta[:, t, :, None, None]
        S = torch.addcmul(S, key.mT, write)
        outs.append((q[:, t, :, None, :] @ S).squeeze(-2))
    return outs[0].unsqueeze(1) if len(outs) == 1 else torch.stack(outs, 1), S


def _chunked(q, k, v, beta, log_decay, state, C: int) -> tuple[Tensor, Tensor]:
    """What the tokens of a chunk write is u = U - W S, S the state before the chunk; U and W solve a triangular system.

    Token i writes u_i = beta_i (v_i - k_i^T (the decayed S, and the u_j before it)), so (I + M) u = beta v - beta k S
    with M_ij = beta_i k_i^T k_j decayed, j < i; and S <- total S + K^T u is linear in S again.
    """
    T = q.shape[1]
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(beta.shape)
    q, k, v, beta = (to_chunks(x, C) for x in (q, k, v, beta))  # (n, B, H, C, ...)
    log_decay = None if log_decay is None else to_chunks(log_decay, C)
    ((kk,), (qk,)), decays = decayed_scores((Row(k, diagonal=False), Row(q)), (k,), log_decay)
    inverse = unit_lower_inverse(beta[..., None] * kk) * beta[..., None, :]
    U, W = inverse @ v, inverse @ scaled(k, decays.into)
    k_out = scaled(k, decays.out).mT
    before, last = matrix_carry(decays.total, -(k_out @ W), k_out @ U, state)
    writes = plus_product(U, W, before, sign=-1)
    o = plus_product(qk @ writes, scaled(q, decays.into), before)
    return from_chunks(o, T), last


def _check(q, k, v, beta, log_decay, reset, mask) -> dict[str, int]:
    """Shapes, dtype kinds, devices and ranges; returns the sizes of the dimensions."""
    sizes: dict[str, int] = {}
    for name, x, letters in (("q", q, "BTHK"), ("k", k, "BTHK"), ("v", v, "BTHV"), ("beta", beta, "BTH")):
        _inputs.check_shape(name, x, letters, sizes, real=True)
        _inputs.check_device(name, x, q.device)
    _inputs.check_range("beta", beta, 0.0, 2.0, "in [0, 2]")
    if log_decay is not None:
        _inputs.check_log_decay(log_decay, ("H", "BTH", "BTHK"), sizes, q.device, real=True)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], q.device)
    return sizes
