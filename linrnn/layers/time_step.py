"""The time steps of Mamba's family: how softplus(dt_bias) starts."""

import torch
from torch import Tensor


def check_time_steps(dt_min: float, dt_max: float) -> None:
    """Raises ValueError unless 0 < dt_min <= dt_max."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min, dt_max: expected 0 < dt_min <= dt_max, got {dt_min}, {dt_max}")


def dt_bias_(dt_bias: Tensor, dt_min: float, dt_max: float, floor: float = 0.0) -> None:
    """Draws softplus(dt_bias) log-uniformly in [dt_min, dt_max], nothing below the floor, in place."""
    with torch.no_grad():
        dt = (dt_min * (dt_max / dt_min) ** torch.rand_like(dt_bias)).clamp(min=floor)
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
