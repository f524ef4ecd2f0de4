"""Frozen steps in one call: what a layer, a block or a model adds to a `StepProgram`, and the function made of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linrnn.layers.base import State
from linrnn.ops.step_program import Ref, StepProgram, builder, can_run, flatten


class CannotEmit(Exception):
    """A part of a step has no operation in `StepProgram`: it runs in torch's own."""


def compiled_step(
    module: nn.Module, d_model: int, init_state: Callable[[int], State], d_out: int | None = None
) -> Callable[[Tensor, State], tuple[Tensor, State]] | None:
    """Returns the step (x (B, d_model), state) -> (y, state) of a module as one call; None if it cannot be had.

    It can where `emit_step(program, x, out, add)` exists in all its parts, parameters are float32 on a CPU, and the
    compiled kernels are installed. It records no gradient, and a row's numbers do not depend on the batch around it.
    """
    if not can_run(module.parameters()):
        return None
    program = StepProgram(d_model, d_model if d_out is None else d_out)
    with torch.no_grad():
        try:
            emit(module, program, program.x, program.y, None)
        except CannotEmit:
            return None
        example = init_state(1)
        expected = [(tuple(leaf.shape[1:]), leaf.dtype) for leaf in flatten(example, [])]
        if program.leaves != expected:
            raise RuntimeError(f"{type(module).__name__}.emit_step: state {program.leaves}, expected {expected}")
        run, build = program.function(), builder(example)

    def step(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, leaves = run(x, flatten(state, []))
        return y, build(iter(leaves))

    return step


def emit(module: nn.Module | None, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
    """Writes the module's step into the program: out = module(x) (+ add)."""
    method: Any = getattr(module, "emit_step", None)
    if type(module) is nn.Linear:
        linear(program, x, module, out=out, add=add)
        return
    if method is None:
        raise CannotEmit
    plain(module)
    method(program, x, out, add)


def plain(*modules: nn.Module | None) -> None:
    """Refuses modules with hooks: they want to see what goes through."""
    for module in modules:
        if module is not None and (module._forward_hooks or module._forward_pre_hooks):
            raise CannotEmit


def linear(program: StepProgram, x: Ref, module: nn.Module, **kwargs: Any) -> Ref:
    """Emits a torch.nn.Linear, and nothing that merely looks like one (adapters and parametrizations do)."""
    plain(module)
    if type(module) is not nn.Linear:
        raise CannotEmit
    return program.linear(x, module.weight, module.bias, **kwargs)


def norm(program: StepProgram, x: Ref, module: nn.Module | None, out: Ref | None = None) -> Ref:
    """Emits a torch.nn.RMSNorm or LayerNorm over the channels."""
    plain(module)
    if type(module) is nn.LayerNorm:
        return program.norm(x, module.weight, module.bias, eps=module.eps, centred=True, out=out)
    if type(module) is nn.RMSNorm:
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return program.norm(x, module.weight, eps=eps, out=out)
    raise CannotEmit
