"""What an optimiser and a fair comparison need to know of a model: parameter groups, parameter counts."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

NO_DECAY_MODULES = (nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d)


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW-ready groups: one per learning rate and weight decay, honouring every `optim_hints` inside.

    Biases, norms, embeddings and all other vectors do not decay. Each trainable parameter is in one group, once; the
    order depends on the model alone, so that optimiser states of a checkpoint fit.

    Raises:
        ValueError: lr or weight_decay is negative, or a hint names no parameter of its module.
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {value}")
    settings: dict[nn.Parameter, tuple[float, float]] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        for p in own.values():
            plain = p.ndim < 2 or isinstance(module, NO_DECAY_MODULES)
            settings.setdefault(p, (lr, 0.0 if plain else weight_decay))
        # asked of the class: the wrapper that torch.compile returns would hand on its content's hints as its own
        hints = module.optim_hints() if hasattr(type(module), "optim_hints") else {}
        for name, hint in hints.items():
            if name not in own:
                raise ValueError(f"{path or type(module).__name__}.optim_hints: no parameter is called {name!r}")
            _, decay = settings[own[name]]
            settings[own[name]] = (lr * hint.get("lr_scale", 1.0), hint.get("weight_decay", decay))

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for p, setting in settings.items():
        if p.requires_grad:
            groups.setdefault(setting, []).append(p)
    return [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]


def count_params(model: nn.Module) -> int:
    """Counts trainable numbers, shared ones once; a complex number stored as a real pair counts two."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def match_params(
    target: int, build: Callable[[int], nn.Module], widths: Iterable[int], *, tolerance: float = 0.1
) -> int:
    """Returns the width for which `build(width)` has the number of parameters nearest to `target`.

    Models are built on the meta device: nothing is allocated or drawn.

    Raises:
        ValueError: no widths, or the nearest number is further from the target than `tolerance` times it.
    """
    if target < 1:
        raise ValueError(f"target: expected a number of parameters >= 1, got {target}")
    with torch.device("meta"):
        counts = {width: count_params(build(width)) for width in widths}
    if not counts:
        raise ValueError("widths: expected at least one, got none")
    best = min(counts, key=lambda width: abs(counts[width] - target))
    if abs(counts[best] - target) > tolerance * target:
        raise ValueError(
            f"widths: none gives {target} parameters within {tolerance:.0%}; "
            f"the nearest is {best} with {counts[best]}, of {len(counts)} tried"
        )
    return best
