"""What attention multiplies its logits with, where that depends on n, the number of keys a query sees.

A softmax over more keys is flatter. Logits that grow with log n hold its entropy where they are peaked (log n,
kexue.fm 8823), or the size of its gradient, max_α α (1 - Σ p²) (kexue.fm 9812); cosines, which are at most one, need
about 4 log n (CosA, kexue.fm 9859).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers.base import accumulation_dtype, positive_int
from linrnn.layers.positions import check_number


@dataclass(frozen=True)
class LogN:
    """Logits times ln n / ln `length`; of a model trained without it, `retrofit`, no less than one (kexue.fm 8823)."""

    length: int = 512
    retrofit: bool = False

    def __post_init__(self) -> None:
        if positive_int("length", self.length) < 2:
            raise ValueError(f"length: expected an integer >= 2, whose logarithm is above zero, got {self.length}")


Scale = float | str | LogN | None
QK_NORMS = (None, "qk", "key", "cos")


def check_scale(scale: Scale, qk_norm: str | None) -> Scale:
    """Returns `scale`, with "logn" as LogN(), or raises ValueError."""
    if scale == "logn":
        scale = LogN()
    if not isinstance(scale, LogN) and scale not in (None, "gradient"):
        if isinstance(scale, str):
            raise ValueError(f"scale: expected a number, 'logn', LogN, 'gradient' or None, got {scale!r}")
        check_number("scale", scale, above=0)
    if isinstance(scale, LogN) and qk_norm == "cos":
        raise ValueError('scale: "logn" goes not with qk_norm="cos", whose logits are 4 ln n cos as they are')
    return scale


def constant_scale(scale: Scale, qk_norm: str | None, d_head: int) -> float:
    """Returns the factor of the logits that is the same for all queries."""
    if isinstance(scale, (int, float)):
        return float(scale)
    return 1.0 if qk_norm in ("key", "cos") else d_head**-0.5


def query_factor(scale: Scale, qk_norm: str | None, n: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Returns the other factor, in `dtype`, for queries that see n (1 or B, T) >= 1 keys; None where that is one."""
    if isinstance(scale, (int, float)) or (scale is None and qk_norm != "cos"):
        return None
    log = n.to(dtype).log()
    if isinstance(scale, LogN):
        factor = log / math.log(scale.length)
        return factor.clamp(min=1) if scale.retrofit else factor
    if qk_norm == "cos":
        return (4.0 if scale is None else 3.5) * log
    return 0.84 * log.sqrt()


def unit(x: Tensor) -> Tensor:
    """Divides x (..., K) by its length."""
    return F.normalize(x.to(accumulation_dtype(x.dtype)), dim=-1, eps=1e-6).to(x.dtype)
