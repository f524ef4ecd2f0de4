"""Tensors of a model by name, and a model made of them: built without numbers, then filled."""

import sys
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
PROGRESS_BYTES = 1 << 30  # what takes seconds to read


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and saved buffers by name, shared ones once, under their first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def skeleton(build: Callable[[], M]) -> M:
    """Builds a model on the meta device; on the CPU where it has numbers that `fill` does not replace.

    The caller's random numbers stay as they are.

    Raises:
        ValueError: the sizes are those of no tensor.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                model = build()
        except RuntimeError as error:
            if "overflow" in str(error):
                raise ValueError(f"sizes beyond any memory ({error})") from error
            model = None  # its constructor computes with numbers
        if model is None or loose_tensors(model):
            with torch.device("cpu"):
                model = build()
    return model


def loose_tensors(model: nn.Module) -> bool:
    """Returns whether a model has tensors that its state_dict does not have."""
    kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    held = [t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return any(id(tensor) not in kept for tensor in [*held, *model.parameters(), *model.buffers()])


def misfits(model: nn.Module, saved: Mapping[str, Tensor], *, converted: bool = False) -> list[str]:
    """Returns what keeps tensors from being those of a model: names, shapes and dtypes.

    Args:
        model: with or without numbers.
        saved: tensors by name.
        converted: floating point numbers may be in any precision. Else those of one precision in the model are.
    """
    own = unique_tensors(model)
    problems = [f"missing: {name}" for name in own if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in own]
    common: dict[torch.dtype, torch.dtype] = {}
    for name, tensor in saved.items():
        if name not in own:
            continue
        kind, dtype = own[name].dtype, tensor.dtype
        if own[name].shape != tensor.shape:
            problems.append(f"shape of {name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}")
        elif not kind.is_floating_point:
            if dtype.is_complex != kind.is_complex or (dtype != kind and not kind.is_complex):
                problems.append(f"dtype of {name}: expected {kind}, got {dtype}")
        elif not dtype.is_floating_point or dtype.itemsize < 2:  # what is smaller is quantised
            problems.append(f"dtype of {name}: expected a floating point one, got {dtype}")
        elif not converted and common.setdefault(kind, dtype) != dtype:
            problems.append(
                f"dtype of {name}: expected {common[kind]} as the others, got {dtype}; or ask for one dtype"
            )
    return problems


def shorten(problems: list[str]) -> str:
    """Returns the first of what may be thousands."""
    return "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")


def fill(
    model: M,
    saved: Mapping[str, Tensor],
    source: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> M:
    """Gives a skeleton the saved tensors, one after the other: no number is in memory twice.

    Args:
        model: of `skeleton`; shared parameters stay shared.
        saved: tensors by name, as mapped from files, of which nothing is kept.
        source: what errors call the checkpoint.
        dtype: of the floating point tensors; None: as they were saved.
        device: None: torch's default.

    Raises:
        ValueError: names, shapes or dtypes that do not fit.
    """
    problems = misfits(model, saved, converted=dtype is not None)
    if problems:
        raise ValueError(f"{source}: does not fit {type(model).__name__} ({shorten(problems)})")
    device = torch.get_default_device() if device is None else torch.device(device)
    names = {id(tensor): name for name, tensor in unique_tensors(model).items()}
    made: dict[str, Tensor] = {}
    total, done, shown = sum(tensor.nbytes for tensor in saved.values()), 0, 0
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for key, old in place.items():
                if old is None:
                    continue
                as_is = dtype is None or not old.is_floating_point()
                name = names.get(id(old))
                if name is None:
                    old.data = old.data.to(device=device, dtype=None if as_is else dtype)
                    continue
                if name not in made:
                    # a copy, since what is mapped from a file lies at any address, where sums round in another order
                    new = saved[name].to(device=device, dtype=None if as_is else dtype, copy=True)
                    made[name] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    done += saved[name].nbytes
                    if done - shown >= PROGRESS_BYTES:
                        shown = done
                        print(f"{source}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr)
                place[key] = made[name]  # type: ignore[assignment]
    return model
