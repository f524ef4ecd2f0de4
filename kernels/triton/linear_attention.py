"""Launches linear attention: forward, backward, and token by token."""

import torch
import triton
from torch import Tensor

from linrnn.kernels.triton import chunks
from linrnn.kernels.triton.gradients import gradients
from linrnn.kernels.triton.plan import OPTIONS, Problem, decay_kind, device_of
from linrnn.kernels.triton.recurrent import recurrent
from linrnn.kernels.triton.tiles import CHANNEL, HEAD

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, V) in out_dtype and the last state (B, H, K, V) in float32. T >= 1.

    q, k (B, T, H, K) and v (B, T, H, V) of one dtype; log_decay None, (B, T, H) or (B, T, H, K).
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    with device_of(q):
        problem = Problem(q, v, log_decay, chunk_size)
        states = problem.states()
        last = carry(problem, k, v, initial_state, states)
        o = torch.empty_like(v, dtype=out_dtype)
        scores = pair_scores(problem, q, k)
        read(problem, (q, k, v), scores, states, o, scale)
    return o, last


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    grad_o: Tensor,
    grad_last: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Gradients:
    """Gradients of q, k, v, log_decay and the initial state, as shaped; the states are computed again."""
    q, k, v, grad_o = q.contiguous(), k.contiguous(), v.contiguous(), grad_o.contiguous()
    with device_of(q):
        problem = Problem(q, v, log_decay, chunk_size)
        before, after = problem.states(), problem.states()
        carry(problem, k, v, initial_state, before)
        grad_first = carry(problem, q, grad_o, grad_last, after, scale, reverse=True)
        grad_v = torch.empty_like(v)
        scores = pair_scores(problem, q, k)
        read(problem, (k, q, grad_o), scores, after, grad_v, scale, reverse=True)
        grad_q, grad_k, grad_decay = key_gradients(problem, q, k, v, grad_o, before, after, scale)
    return grad_q, grad_k, grad_v, grad_decay, grad_first


def carry(
    problem: Problem,
    x: Tensor,
    y: Tensor,
    first: Tensor | None,
    states: Tensor,
    scale: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Fills `states` and returns the last one."""
    last = problem.state()
    grid = (problem.B * problem.H, problem.blocks_of_keys(), problem.blocks_of_values())
    first = None if first is None else first.contiguous()
    chunks.carry[grid](
        *(x, y, problem.decay, problem.part, first, states, last, *problem.sizes(), scale),
        REVERSE=reverse,
        **problem.options(),
    )
    return last


def pair_scores(problem: Problem, x: Tensor, y: Tensor) -> Tensor | None:
    """Of every chunk, where there is one decay per channel; others compute them where they need them."""
    if problem.kind != CHANNEL.value:
        return None
    scores = problem.pairs(problem.stored)
    T, H, K, _, n = problem.sizes()
    chunks.scores_of_chunks[(problem.B * H * n,)](
        *(x, y, problem.decay, problem.part, scores, T, H, K, n), **problem.options(values=False)
    )
    return scores


def read(
    problem: Problem,
    xyz: tuple[Tensor, Tensor, Tensor],
    scores: Tensor | None,
    states: Tensor | None,
    out: Tensor,
    scale: float,
    reverse: bool = False,
) -> None:
    chunks.read[(problem.B * problem.H * problem.n, problem.blocks_of_values())](
        *(*xyz, problem.decay, problem.part, scores, states, out, *problem.sizes(), scale),
        REVERSE=reverse,
        **problem.options(),
    )


def key_gradients(
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_o: Tensor,
    before: Tensor,
    after: Tensor,
    scale: float,
    grad_kk: Tensor | None = None,
    grad_write: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and log_decay; see `gradients`."""
    B, T, H, _ = q.shape
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    parts = problem.blocks_of_keys()
    g, grad_g = problem.log_decay, None
    if g is not None:
        grad_g = q.new_empty(g.shape if problem.kind == CHANNEL.value else (parts, B, T, H), dtype=torch.float32)
    gradients[(B * H * problem.n, parts)](
        *(q, k, v, grad_o, g, problem.decay, problem.part, before, after, grad_kk, grad_write),
        *(grad_q, grad_k, grad_g, *problem.sizes(), B, scale),
        **problem.options(),
    )
    if g is not None and grad_g is not None:
        grad_g = (grad_g.sum(0) if problem.kind == HEAD.value else grad_g).to(g.dtype)
    return grad_q, grad_k, grad_g


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token, in one kernel: o and the last state, written to `out` if given (it may be the initial state).

    With beta (B, T, H) the delta rule. Dtypes may differ. Meant for a T of 1, right for any of at least 1.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    beta, log_decay, initial_state = (None if x is None else x.contiguous() for x in (beta, log_decay, initial_state))
    B, T, H, K = q.shape
    V = v.shape[-1]
    o = torch.empty_like(v, dtype=out_dtype)
    last = q.new_empty((B, H, K, V), dtype=torch.float32) if out is None else out
    BK = max(16, triton.next_power_of_2(K))
    BV = max(1, min(triton.next_power_of_2(V), 2048 // BK))
    with device_of(q):
        recurrent[(B * H, triton.cdiv(V, BV))](
            *(q, k, v, beta, log_decay, initial_state, last, o, T, H, K, V, scale),
            DECAY=decay_kind(log_decay),
            BK=BK,
            BV=BV,
            num_warps=4,
            **OPTIONS,
        )
    return o, last
