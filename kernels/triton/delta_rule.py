"""Launches the delta rule: forward and backward. Its single step is `linear_attention.step` with beta."""

import torch
from torch import Tensor

from linrnn.kernels.triton import delta
from linrnn.kernels.triton.linear_attention import key_gradients, pair_scores, read
from linrnn.kernels.triton.plan import Problem, device_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """o (B, T, H, V) in out_dtype and the last state (B, H, K, V) in float32. T >= 1,

    q, k (B, T, H, K) and v (B, T, H, V) of one dtype, beta (B, T, H); log_decay None, (B, T, H) or (B, T, H, K).
    """
    q, k, v, beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous()
    with device_of(q):
        problem = Problem(q, v, log_decay, chunk_size, delta=True)
        _, states, u, last = _write(problem, k, v, beta, initial_state)
        o = torch.empty_like(v, dtype=out_dtype)
        read(problem, (q, k, u), pair_scores(problem, q, k), states, o, scale)
    return o, last


def _write(
    problem: Problem, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inverse of every chunk, the states before them, what is written, and the last state."""
    T, H, K, V, n = problem.sizes()
    inverse, states, u, last = problem.pairs(), problem.states(), problem.written(), problem.state()
    decay = (problem.decay, problem.part)
    delta.inverse_of_chunks[(problem.B * H * n,)](
        *(k, beta, *decay, inverse, T, H, K, n), **problem.options(values=False)
    )
    first = None if initial_state is None else initial_state.contiguous()
    delta.write[(problem.B * H, problem.blocks_of_values())](
        *(k, v, beta, *decay, inverse, first, states, last, u, T, H, K, V, n),
        WHOLE=problem.layout.K >= K,
        **problem.options(),
    )
    return inverse, states, u, last


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    grad_o: Tensor,
    grad_last: Tensor | None,
    scale: float,
    chunk_size: int,
) -> Gradients:
    """Gradients of q, k, v, beta, log_decay and the initial state, as shaped; all else is computed again."""
    q, k, v, beta, grad_o = (x.contiguous() for x in (q, k, v, beta, grad_o))
    with device_of(q):
        problem = Problem(q, v, log_decay, chunk_size, delta=True)
        T, H, K, V, n = problem.sizes()
        decay = (problem.decay, problem.part)
        inverse, before, u, _ = _write(problem, k, v, beta, initial_state)
        grad_u, after, grad_first = problem.written(), problem.states(), problem.state()
        scores = pair_scores(problem, q, k)
        read(problem, (k, q, grad_o), scores, None, grad_u, scale, reverse=True)
        grad_v = problem.written()
        grad_last = None if grad_last is None else grad_last.contiguous()
        delta.write_backward[(problem.B * H, problem.blocks_of_values())](
            *(q, k, beta, grad_o, grad_u, *decay, inverse, grad_last, after, grad_first, grad_v, T, H, K, V, n, scale),
            WHOLE=problem.layout.K >= K,
            **problem.options(),
        )
        grad_kk, grad_beta = problem.pairs(), torch.empty_like(beta, dtype=torch.float32)
        delta.inverse_backward[(problem.B * H * n,)](
            *(k, v, beta, grad_u, *decay, inverse, before, grad_kk, grad_beta, T, H, K, V, n),
            **problem.options(),
        )
        grad_q, grad_k, grad_decay = key_gradients(problem, q, k, u, grad_o, before, after, scale, grad_kk, grad_v)
    return grad_q, grad_k, grad_v.to(v.dtype), grad_beta.to(beta.dtype), grad_decay, grad_first
