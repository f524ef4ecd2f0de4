"""The time steps of Mamba's family: how softplus(dt_bias) starts."""

import torch
from torch import Tensor

from linrnn.layers.base import finite


def check_time_steps(dt_min: float, dt_max: float) -> None:
    """Raises ValueError unless 0 < dt_min <= dt_max < inf."""
    if not finite(dt_min, dt_max) or not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got {dt_min!r}, {dt_max!r}")


def dt_bias_(dt_bias: Tensor, dt_min: float, dt_max: float, floor: float = 0.0) -> None:
    """Draws softplus(dt_bias) log-uniformly in [dt_min, dt_max], nothing below the floor, in place."""
    with torch.no_grad():
        dt = (dt_min * (dt_max / dt_min) ** torch.rand_like(dt_bias)).clamp(min=floor)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
