"""The recurrence of RWKV-7, a generalized delta rule: S_t = diag(w_t) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T."""

import torch
from torch import Tensor

from linrnn.ops import _inputs
from linrnn.ops._backend import choose
from linrnn.ops._chunks import (
    Row,
    chunk_length,
    decayed_scores,
    from_chunks,
    matrix_carry,
    plus_product,
    to_chunks,
    unit_lower_inverse,
)


def rwkv7_reference(r, log_decay, k, v, a, b, state, reset, mask):
    """The recurrence as written, token by token: the oracle of the tests. Widened inputs."""
    S, outs = state, []
    for t in range(r.shape[1]):
        S = S if reset is None else torch.where(reset[:, t, None, None, None], 0, S)
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], S)
        new = log_decay[:, t, :, :, None].exp() * S + b[:, t, :, :, None] * read[:, :, None, :]
        new = new + k[:, t, :, :, None] * v[:, t, :, None, :]
        S = new if mask is None else torch.where(mask[:, t, None, None, None], new, S)
        o = torch.einsum("bhk,bhkv->bhv", r[:, t], S)
        outs.append(o if mask is None else torch.where(mask[:, t, None, None], o, 0))
    return torch.stack(outs, 1), S


def rwkv7(
    r: Tensor,
    log_decay: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "chunk",
    chunk_size: int = 32,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RWKV-7's state: S_t = diag(exp(log_decay_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T and o_t = r_t^T S_t.

    "Goose" (Peng et al. 2025, arXiv:2503.14456), where a_t = -kappa_t and b_t = kappa_t * rate_t with kappa_t of
    length 1: then the transition contracts. Any diagonal plus rank-one transition can be written so; whether it is
    stable is the caller's business. All derivatives exist, from both outputs, with respect to every input.

    Args:
        r, k, a, b: (B, T, H, K), real; any T, also 0.
        log_decay: (B, T, H, K), at most 0.
        v: (B, T, H, V).
        initial_state: (B, H, K, V); zero if None.
        reset: (B, T) bool; where True the state is zeroed before token t.
        mask: (B, T) bool, True on real tokens. A padded token leaves the state unchanged, and its output is 0.
        mode: "chunk", "recurrent" (token by token; also what a T of 1 takes), "parallel" (one chunk) or "reference".
        chunk_size: of the chunk form; rounded up to a power of two.
        backend: "auto", "torch" or "reference".

    Returns:
        o, (B, T, H, V), in the common dtype of the sequences but log_decay; and the final state, in at least float32.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device or option that does not fit, or (looked at on CPU tensors) a log_decay
            above 0.
    """
    sizes: dict[str, int] = {}
    named = (("r", r), ("k", k), ("v", v), ("a", a), ("b", b))
    for name, x in named:
        _inputs.check_shape(name, x, "BTHV" if name == "v" else "BTHK", sizes, real=True)
        _inputs.check_device(name, x, r.device)
    _inputs.check_log_decay(log_decay, ("BTHK",), sizes, r.device, real=True)
    _inputs.check_flags(reset, mask, sizes["B"], sizes["T"], r.device)
    _inputs.check_mode(mode, chunk_size)
    if choose(backend, r, ()) == "reference":
        mode = "reference"
    out_dtype, wide = _inputs.dtypes((r, k, v, a, b), log_decay)
    r, k, v, a, b, log_decay = (x.to(wide) for x in (r, k, v, a, b, log_decay))
    with _inputs.full_precision(r.device.type):
        state = _inputs.matrix_state(initial_state, sizes, wide, r.device)
        o, state = _run(r, log_decay, k, v, a, b, state, reset, mask, mode, chunk_size)
        return o.to(out_dtype), state


def _run(r, log_decay, k, v, a, b, state, reset, mask, mode, chunk_size) -> tuple[Tensor, Tensor]:
    B, T, H, K = r.shape
    if T == 0:
        return v, r.new_zeros(B, H, K, v.shape[-1]) if state is None else state.clone()
    if state is None and (mode in ("reference", "recurrent") or T == 1):
        state = r.new_zeros(B, H, K, v.shape[-1])
    if mode == "reference":
        return rwkv7_reference(r, log_decay, k, v, a, b, state, reset, mask)
    if reset is not None:  # what the first token of a document reads is zero, and -inf in log_decay does the rest
        a = torch.where(_inputs.expand_flags(reset, a), 0, a)
    log_decay, (r, k, v, a, b) = _inputs.fold_flags(log_decay, reset, mask, r, r, k, v, a, b)
    if mode == "recurrent" or T == 1:
        return _recurrent(r, log_decay, k, v, a, b, state)
    return _chunked(r, log_decay, k, v, a, b, state, chunk_length(T, T if mode == "parallel" else chunk_size))


def _recurrent(r, log_decay, k, v, a, b, S) -> tuple[Tensor, Tensor]:
    w, outs = log_decay.exp()[..., None], []
    for t in range(r.shape[1]):
        read = a[:, t, :, None, :] @ S
        S = torch.addcmul(S * w[:, t], b[:, t, :, :, None], read)
        S = torch.addcmul(S, k[:, t, :, :, None], v[:, t, :, None, :])
        outs.append((r[:, t, :, None, :] @ S).squeeze(-2))
    return outs[0].unsqueeze(1) if len(outs) == 1 else torch.stack(outs, 1), S


def _chunked(r, log_decay, k, v, a, b, state, C: int) -> tuple[Tensor, Tensor]:
    """What the tokens of a chunk read is u = U + W S, S the state before the chunk; U and W solve a triangular system.

    Token i reads u_i = a_i^T (the decayed S, and b_j u_j^T + k_j v_j^T of the tokens before it).
    """
    T = r.shape[1]
    r, log_decay, k, v, a, b = (to_chunks(x, C) for x in (r, log_decay, k, v, a, b))  # (n, B, H, C, ...)
    rows = (Row(a, diagonal=False, before=True), Row(r))
    ((ab, ak), (rb, rk)), decays = decayed_scores(rows, (b, k), log_decay)
    inverse = unit_lower_inverse(-ab)
    U, W = inverse @ (ak @ v), inverse @ (a * decays.into_before)
    b_out, k_out = (b * decays.out).mT, (k * decays.out).mT
    before, last = matrix_carry(decays.total, b_out @ W, plus_product(k_out @ v, b_out, U), state)
    reads = plus_product(U, W, before)
    o = plus_product(plus_product(rk @ v, rb, reads), r * decays.into, before)
    return from_chunks(o, T), last
