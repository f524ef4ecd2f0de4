"""The time steps of Mamba's family: how softplus(dt_bias) starts, and where Δ is held."""

from collections.abc import Sequence

import torch
from torch import Tensor

from linrnn.layers.base import finite


def check_time_steps(dt_min: float, dt_max: float) -> None:
    """Raises ValueError unless 0 < dt_min <= dt_max < inf."""
    if not finite(dt_min, dt_max) or not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got {dt_min!r}, {dt_max!r}")


def check_dt_limit(limit: Sequence[float]) -> tuple[float, float]:
    """Returns (lower, upper), or raises ValueError unless 0 <= lower <= upper; upper may be infinite."""
    pair = tuple(limit) if isinstance(limit, (tuple, list)) else ()
    numbers = len(pair) == 2 and finite(pair[0]) and (finite(pair[1]) or pair[1] == float("inf"))
    if not numbers or not 0 <= pair[0] <= pair[1]:
        raise ValueError(f"dt_limit: expected None or numbers 0 <= lower <= upper, got {limit!r}")
    return float(pair[0]), float(pair[1])


def dt_bias_(dt_bias: Tensor, dt_min: float, dt_max: float, floor: float = 0.0) -> None:
    """Draws softplus(dt_bias) log-uniformly in [dt_min, dt_max], nothing below the floor, in place."""
    with torch.no_grad():
        dt = (dt_min * (dt_max / dt_min) ** torch.rand_like(dt_bias)).clamp(min=floor)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
