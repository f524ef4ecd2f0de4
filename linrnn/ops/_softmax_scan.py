"""The running softmax as one torch.library operator with its derivatives, on its kernels or in torch.

Two doors lead to it, as in `_selective_scan`: under torch.compile the operator with the backward registered on it, in
eager mode an autograd.Function. Beside o, the m and z after each token are kept, and no y: the backward needs none. A
derivative of the backward, and torch.func and forward-mode AD, go through the expanded form of `_softmax_torch`.

Logits and states are in the dtype of states of v, which may be in half precision.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linrnn.ops import _softmax_torch
from linrnn.ops._backend import attempt, choose, transformed, unwatched
from linrnn.ops._softmax_torch import Outputs, State, expanded

KERNELS = ("cpu", "cuda")


@cache
def _launcher(backend: str) -> ModuleType:
    """The module with the compiled `forward` and `backward`."""
    return import_module(f"linrnn.kernels.{backend}.softmax_scan")


def scan(logits, v, initial_state: State | None, flags, reverse: bool, backend: str) -> Outputs:
    """o (B, T, H, V) in v's dtype and the final m, z, y, by the fastest door that is right here."""
    inputs = (logits, v, *((None,) * 3 if initial_state is None else initial_state))
    present = tuple(x for x in inputs if x is not None)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in present)
    if torch.compiler.is_compiling():
        return scan_op(*inputs, flags, reverse, keep, backend)[:4]
    choose(backend, v, KERNELS)
    if transformed():
        return expanded(logits, v, initial_state, flags, reverse)
    if not unwatched(present):
        return scan_op(*inputs, flags, reverse, keep, backend)[:4]
    run: Callable[..., Any] = SoftmaxScan.apply if keep else _forward
    return run(*inputs, flags, reverse, keep, backend)[:4]


def _state(m: Tensor | None, z: Tensor | None, y: Tensor | None) -> State | None:
    """What the operator takes field by field."""
    return None if m is None or z is None or y is None else (m, z, y)


def _forward(logits, v, m, z, y, flags, reverse, keep, backend) -> Any:
    """o, the final m, z and y, and m and z after every token (of no elements unless `keep`)."""
    args = (logits, v, _state(m, z, y), flags, reverse, keep)
    chosen = choose(backend, v, KERNELS)
    if chosen in KERNELS and v.numel():
        outputs = attempt(backend, _launcher(chosen).forward, *args)
        if outputs is not None:
            return outputs
    return _softmax_torch.forward(*args)


def _gradients(
    logits, v, m0, z0, y0, flags, o, final_z, final_y, m, z, grad_o, grad_m, grad_z, grad_y, reverse, backend
) -> Any:
    """Gradients of the logits, v, and the initial m, z and y."""
    sequences = (logits, v, _state(m0, z0, y0), flags, o, final_z, final_y, m, z)
    args = (*sequences, grad_o, (grad_m, grad_z, grad_y), reverse)
    chosen = choose(backend, v, KERNELS)
    if chosen in KERNELS and v.numel():
        launcher = _launcher(chosen)
        if chosen == "cuda":  # two kernels, put together here
            grads = attempt(backend, _softmax_torch.gradients, *args, launcher)
        else:
            grads = attempt(backend, launcher.backward, *args)
        if grads is not None:
            return grads
    return _softmax_torch.gradients(*args, None)


@torch.library.custom_op("linrnn::softmax_scan", mutates_args=())
def scan_op(
    logits: Tensor,
    v: Tensor,
    m: Tensor | None,
    z: Tensor | None,
    y: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(logits, v, m, z, y, flags, reverse, keep, backend)


@scan_op.register_fake
def _(logits, v, m, z, y, flags, reverse, keep, backend):
    B, T, H, V = v.shape
    state = logits.new_empty((B, H)), logits.new_empty((B, H)), logits.new_empty((B, H, V))
    kept = T if keep else 0
    return v.new_empty(v.shape), *state, logits.new_empty((B, kept, H)), logits.new_empty((B, kept, H))


@torch.library.custom_op("linrnn::softmax_scan_backward", mutates_args=())
def scan_backward_op(
    logits: Tensor,
    v: Tensor,
    m0: Tensor | None,
    z0: Tensor | None,
    y0: Tensor | None,
    flags: Tensor | None,
    o: Tensor,
    final_z: Tensor,
    final_y: Tensor,
    m: Tensor,
    z: Tensor,
    grad_o: Tensor | None,
    grad_m: Tensor | None,
    grad_z: Tensor | None,
    grad_y: Tensor | None,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradients(
        *(logits, v, m0, z0, y0, flags, o, final_z, final_y, m, z, grad_o, grad_m, grad_z, grad_y, reverse, backend)
    )


@scan_backward_op.register_fake
def _(logits, v, m0, z0, y0, flags, o, final_z, final_y, *_):
    state = final_z.new_empty(final_z.shape), final_z.new_empty(final_z.shape), final_y.new_empty(final_y.shape)
    return logits.new_empty(logits.shape), v.new_empty(v.shape), *state


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _, ctx.backend = inputs
    o, _, final_z, final_y, m, z = output
    ctx.save_for_backward(*tensors, o, final_z, final_y, m, z)
    if hasattr(ctx, "set_materialize_grads"):
        ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None):
    grads, saved = grads[:4], ctx.saved_tensors
    inputs, flags = saved[:5], saved[5]
    if all(grad is None for grad in grads):
        return (None,) * 9
    if torch.is_grad_enabled():  # a derivative of this backward may be asked for
        return *_expanded_gradients(inputs, flags, grads, ctx.reverse), None, None, None, None
    compute: Callable[..., tuple[Tensor, ...]] = (
        _gradients if not torch.compiler.is_compiling() and unwatched(inputs[:2]) else scan_backward_op
    )
    found = compute(*saved, *grads, ctx.reverse, ctx.backend)
    of_state = (None,) * 3 if inputs[2] is None else found[2:]
    return *found[:2], *of_state, None, None, None, None


def _expanded_gradients(inputs, flags, grads, reverse) -> tuple[Tensor | None, ...]:
    """The gradients with a graph behind them, through the expanded form."""
    # those without a graph need one for the inner derivative
    inputs = [x if x is None or x.requires_grad else x.detach().requires_grad_() for x in inputs]
    logits, v, m, z, y = inputs
    outputs = expanded(logits, v, _state(m, z, y), flags, reverse)
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    outs, cotangents = zip(*((out, grad) for out, grad in pairs if out.requires_grad), strict=True)
    present = [x for x in inputs if x is not None]
    found = iter(torch.autograd.grad(outs, present, cotangents, create_graph=True, allow_unused=True))
    return tuple(None if x is None else next(found) for x in inputs)


scan_op.register_autograd(_backward, setup_context=_setup_context)


class SoftmaxScan(torch.autograd.Function):
    """The eager door."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[4:])
        return output

    backward = staticmethod(_backward)
