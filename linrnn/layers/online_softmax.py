"""Softmax over keys that come in blocks, with a state of constant size (arXiv:1805.02867, arXiv:2112.05682).

m' = max(m, max_j s_j),   z' = e^{m - m'} z + Σ_j e^{s_j - m'},   y' = e^{m - m'} y + Σ_j e^{s_j - m'} v_j,   o = y / z
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype
from linrnn.layers.softmax_attention import mix


class SoftmaxSum(NamedTuple):
    """What the queries of a block have read so far, at least float32.

    m (B, H, C): largest logit, -inf before the first key; z (B, H, C): sum of exp(logit - m); y (B, H, C, V): the same
    sum of values.
    """

    m: Tensor
    z: Tensor
    y: Tensor


def softmax_sum(q: Tensor, width: int) -> SoftmaxSum:
    """Returns the empty sum for queries q (B, C, H, K) and values as wide as `width`."""
    B, C, H, _ = q.shape
    zero = q.new_zeros(B, H, C, dtype=accumulation_dtype(q.dtype))
    return SoftmaxSum(zero - torch.inf, zero, zero[..., None].expand(-1, -1, -1, width))


def absorb(total: SoftmaxSum, logits: Tensor, v: Tensor) -> SoftmaxSum:
    """Adds keys with logits (B, H, C, W), -inf where they are not seen, and values v (B, W, H_kv, V)."""
    m = torch.maximum(total.m, logits.amax(-1)) if logits.shape[-1] else total.m
    shift = torch.where(m == -torch.inf, 0, m)  # no key yet: exp(-inf - 0) is zero, exp(-inf + inf) is not
    p = (logits - shift[..., None]).exp()
    decay = (total.m - shift).exp()
    return SoftmaxSum(m, decay * total.z + p.sum(-1), decay[..., None] * total.y + mix(p, v))


def read_out(total: SoftmaxSum) -> Tensor:
    """Returns o (B, C, H, V), y / z."""
    return (total.y / total.z[..., None]).transpose(1, 2)
