"""Frozen steps in one call: what a layer, a block or a model adds to a `StepProgram`, and the function made of it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as any_module

from linrnn.ops.step_program import Ref, StepProgram, builder, can_run, flatten


class CannotEmit(Exception):
    """A part of a step has no operation in `StepProgram`: it runs in torch's own."""


def compiled_step(
    module: nn.Module, d_model: int, init_state: Callable[[int], Any], d_out: int | None = None
) -> Callable[[Tensor, Any], tuple[Tensor, Any]] | None:
    """Returns the step (x (B, d_model), state) -> (y, state) of a module as one call; None if it cannot be had.

    It can where `emit_step(program, x, out, add)` exists in all its parts, parameters are float32 on a CPU, and the
    compiled kernels are installed. It records no gradient, and a row's numbers do not depend on the batch around it.
    """
    if not (type(module) is nn.Linear or hasattr(module, "emit_step")) or not can_run(module.parameters()):
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

    def step(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, leaves = run(x, flatten(state, []))
        return y, build(iter(leaves))

    return step


def emit(module: nn.Module | None, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
    """Writes the module's step into the program: out = module(x) (+ add)."""
    if type(module) is nn.Linear:
        linear(program, x, module, out=out, add=add)
        return
    written_for(module, "emit_step")
    method: Any = getattr(module, "emit_step", None)
    method(program, x, out, add)


def stands_for_call(module: nn.Module | None, shortcut: str, *methods: str) -> bool:
    """Returns whether the method `shortcut` does what a call of the module does.

    It does not where a hook would see or change what goes through, and where `forward`, `step` or one of `methods` has
    been replaced since it was written: by a subclass, or on this object.
    """
    methods = ("forward", "step", *methods)
    if module is None or hooked(module) or any(name in vars(module) for name in methods):
        return False
    for cls in type(module).__mro__:
        if shortcut in vars(cls):
            return True
        if any(name in vars(cls) for name in methods):
            return False
    return False


def written_for(module: nn.Module | None, shortcut: str, *methods: str) -> None:
    """Raises CannotEmit unless `stands_for_call`."""
    if not stands_for_call(module, shortcut, *methods):
        raise CannotEmit


def hooked(module: nn.Module) -> bool:
    """Returns whether a forward hook, the module's own or one for all modules, sees its calls."""
    everywhere = any_module._global_forward_hooks or any_module._global_forward_pre_hooks
    return bool(module._forward_hooks or module._forward_pre_hooks or everywhere)


def plain(kind: type[nn.Module], *modules: nn.Module) -> None:
    """Refuses modules that are not of this very class (adapters and parametrizations are not), and changed ones."""
    for module in modules:
        if type(module) is not kind or hooked(module) or "forward" in vars(module):
            raise CannotEmit


def linear(program: StepProgram, x: Ref, module: nn.Module, **kwargs: Any) -> Ref:
    """Emits a torch.nn.Linear, and nothing that merely looks like one."""
    plain(nn.Linear, module)
    weight: Any = module.weight
    bias: Any = module.bias
    return program.linear(x, weight, bias, **kwargs)


def norm(program: StepProgram, x: Ref, module: nn.Module | None, out: Ref | None = None) -> Ref:
    """Emits a torch.nn.RMSNorm or LayerNorm over the channels."""
    if type(module) is nn.LayerNorm:
        plain(nn.LayerNorm, module)
        return program.norm(x, module.weight, module.bias, eps=module.eps, centred=True, out=out)
    if type(module) is nn.RMSNorm:
        plain(nn.RMSNorm, module)
        eps = torch.finfo(torch.float32).eps if module.eps is None else module.eps
        return program.norm(x, module.weight, eps=eps, out=out)
    raise CannotEmit
