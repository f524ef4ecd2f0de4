"""Linear attention and the delta rule on their Triton kernels, as one torch.library operator with its derivatives.

Two doors lead to it, as in `_scan_autograd`: under torch.compile the operator with the backward registered on it, in
eager mode an autograd.Function. A derivative of the backward comes from the torch form, computed again; so does what
torch.func (vmap, jvp, grad) and forward-mode AD ask for, which never come here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from linrnn.ops._backend import BackendUnavailable, transformed, unwatched

BACKENDS = ("triton",)


class Call(NamedTuple):
    """How the kernels are called where the torch form has other conventions: q comes unscaled and unwidened."""

    scale: float
    out_dtype: torch.dtype


def fits(backend: str, mode: str, wide: torch.dtype) -> bool:
    """Whether the kernels can run this call; raises BackendUnavailable if they cannot and were asked for by name."""
    if mode == "reference":
        return False
    reason = None
    if wide != torch.float32:
        reason = f"they compute in float32 and these inputs need {wide}"
    elif mode == "parallel":
        reason = "they have no mode='parallel'"
    elif not torch.compiler.is_compiling() and transformed():
        reason = "torch.func and forward-mode AD go through the torch form"
    if reason is not None and backend == "triton":
        raise BackendUnavailable(f"backend='triton' cannot run this call: {reason}; use backend='auto'")
    return reason is None


def run(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    chunk_size: int,
    recurrent: bool,
) -> tuple[Tensor, Tensor]:
    """o in call.out_dtype and the final state in float32; q, k and v of one dtype, T at least 1, no flags."""
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = log_decay.expand(q.shape[:3])
    inputs = (q, k, v, beta, log_decay, initial_state)
    present = tuple(x for x in inputs if x is not None)
    if torch.compiler.is_compiling() or not unwatched(present):
        return attention_op(*inputs, call.scale, chunk_size, call.out_dtype, recurrent)
    if torch.is_grad_enabled() and any(x.requires_grad for x in present):
        return TritonAttention.apply(*inputs, call.scale, chunk_size, call.out_dtype, recurrent)
    return _forward(*inputs, call.scale, chunk_size, call.out_dtype, recurrent)


def _forward(q, k, v, beta, log_decay, initial_state, scale, chunk_size, out_dtype, recurrent) -> tuple[Tensor, Tensor]:
    from linrnn.kernels.triton import delta_rule, linear_attention

    if recurrent:
        return linear_attention.step(q, k, v, beta, log_decay, initial_state, scale, out_dtype)
    if beta is None:
        return linear_attention.forward(q, k, v, log_decay, initial_state, scale, chunk_size, out_dtype)
    return delta_rule.forward(q, k, v, beta, log_decay, initial_state, scale, chunk_size, out_dtype)


@torch.library.custom_op("linrnn::triton_attention", mutates_args=())
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk_size: int,
    out_dtype: torch.dtype,
    recurrent: bool,
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, beta, log_decay, initial_state, scale, chunk_size, out_dtype, recurrent)


@attention_op.register_fake
def _(q, k, v, beta, log_decay, initial_state, scale, chunk_size, out_dtype, recurrent):
    B, _, H, K = q.shape
    o = v.new_empty(v.shape, dtype=out_dtype)
    return o, q.new_empty((B, H, K, v.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("linrnn::triton_attention_backward", mutates_args=())
def attention_backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    grad_o: Tensor,
    grad_last: Tensor | None,
    scale: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(q, k, v, beta, log_decay, initial_state, grad_o, grad_last, scale, chunk_size)


def _gradients(q, k, v, beta, log_decay, initial_state, grad_o, grad_last, scale, chunk_size):
    """Gradients of the six tensors; of no elements for those that are None, but for the initial state."""
    from linrnn.kernels.triton import delta_rule, linear_attention

    arguments = (log_decay, initial_state, grad_o, grad_last, scale, chunk_size)
    if beta is None:
        grad_q, grad_k, grad_v, grad_decay, grad_s = linear_attention.backward(q, k, v, *arguments)
        grad_beta = q.new_empty(0)
    else:
        grad_q, grad_k, grad_v, grad_beta, grad_decay, grad_s = delta_rule.backward(q, k, v, beta, *arguments)
    return grad_q, grad_k, grad_v, grad_beta, q.new_empty(0) if grad_decay is None else grad_decay, grad_s


@attention_backward_op.register_fake
def _(q, k, v, beta, log_decay, initial_state, grad_o, grad_last, scale, chunk_size):
    B, _, H, K = q.shape
    beta, log_decay = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (beta, log_decay))
    state = q.new_empty((B, H, K, v.shape[-1]), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), beta, log_decay, state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.chunk_size, _, _ = inputs
    ctx.save_for_backward(*tensors)
    if hasattr(ctx, "set_materialize_grads"):
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_o: Tensor | None, grad_last: Tensor | None):
    inputs = ctx.saved_tensors
    q, v = inputs[0], inputs[2]
    if grad_o is None and grad_last is None:
        return (None,) * 10
    if torch.is_grad_enabled():  # a derivative of this backward may be asked for
        return *_torch_gradients(inputs, grad_o, grad_last, ctx.scale, ctx.chunk_size), None, None, None, None
    if grad_o is None:
        grad_o = torch.zeros(v.shape, dtype=q.dtype, device=v.device)
    direct = not torch.compiler.is_compiling() and unwatched((q, grad_o))
    compute: Callable[..., tuple[Tensor, ...]] = _gradients if direct else attention_backward_op
    grads = compute(*inputs, grad_o, grad_last, ctx.scale, ctx.chunk_size)
    given = (grad if x is not None else None for grad, x in zip(grads, inputs, strict=True))
    return *given, None, None, None, None


def _torch_gradients(inputs, grad_o, grad_last, scale: float, chunk_size: int) -> tuple[Tensor | None, ...]:
    """The gradients with a graph behind them, through the torch form."""
    from linrnn.ops.delta_rule import delta_rule
    from linrnn.ops.linear_attention import linear_attention

    # those without a graph need one for the inner derivative
    inputs = [x if x is None or x.requires_grad else x.detach().requires_grad_() for x in inputs]
    q, k, v, beta, log_decay, state = inputs
    options = {"log_decay": log_decay, "scale": scale, "chunk_size": chunk_size, "backend": "torch"}
    if beta is None:
        outputs = linear_attention(q, k, v, state, **options)
    else:
        outputs = delta_rule(q, k, v, beta, state, **options)
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, (grad_o, grad_last), strict=True) if grad is not None]
    present = [x for x in inputs if x is not None]
    outs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, present, grads, create_graph=True, allow_unused=True))
    return tuple(None if x is None else next(found) for x in inputs)


attention_op.register_autograd(_backward, setup_context=_setup_context)


class TritonAttention(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    backward = staticmethod(_backward)
