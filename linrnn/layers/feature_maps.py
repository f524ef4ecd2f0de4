"""Feature maps φ of linear attention, sim(q, k) = φ(q) · φ(k): (..., K) to (..., F), or to the logarithms of φ.

elu       φ(x) = elu(x) + 1                                  (Katharopoulos et al. 2020, arXiv:2006.16236)
exp       φ(x) = exp(x)                                      (kexue.fm 8338)
softmax   softmax of q over its features, of k over time     (Shen et al. 2018, arXiv:1812.01243)
cosine    sim(q, k) = 1 + cos(q, k)                          (kexue.fm 7546)
taylor    sim(q, k) = 1 + s + s² / 2,  s = q · k / √K        (Arora et al. 2024, arXiv:2402.18668)
identity  sim(q, k) = q · k, with RMSNorm of the output in the place of a denominator (Qin et al., arXiv:2210.10340)
FAVOR+    φ(x) = exp(ω x - |x|² / 2) / √F                    (Choromanski et al. 2020, arXiv:2009.14794)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers.base import accumulation_dtype
from linrnn.ops._inputs import full_precision


@dataclass(frozen=True)
class FeatureMap:
    """How a layer of linear attention maps queries and keys.

    apply: (..., K) to (..., F). size: F of K. logs: `apply` returns log φ. normalize: divides by φ(q) · Σ φ(k).
    each: divides feature by feature instead, and q is a softmax. rotates: the features are ones that rotary positions
    may turn, K of them, behind F - K others. rotates_below: also in the denominator, where that stays positive.
    eps: added to the denominator.
    """

    apply: Callable[[Tensor], Tensor]
    size: Callable[[int], int] = int
    logs: bool = False
    normalize: bool = True
    each: bool = False
    rotates: bool = False
    rotates_below: bool = False
    eps: float = 0.0


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, without the cancellation of the two ones below zero."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def identity(x: Tensor) -> Tensor:
    return x


def cosine(x: Tensor) -> Tensor:
    """[1, x / |x|]: 1 + K features."""
    return torch.cat((torch.ones_like(x[..., :1]), unit(x)), -1)


def unit(x: Tensor) -> Tensor:
    """x / |x|, zero at zero, where its gradient is that of x / eps."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-12).rsqrt()).to(x.dtype)


def taylor(x: Tensor) -> Tensor:
    """[1, x, x_i x_j for i < j, x_i² / √2] of x / K^(1/4): 1 + K + K (K + 1) / 2 features."""
    K = x.shape[-1]
    x = x * K**-0.25
    i, j = torch.triu_indices(K, K, 1, device=x.device)
    return torch.cat((torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j], x.square() * 0.5**0.5), -1)


FEATURE_MAPS = {
    "elu": FeatureMap(elu, rotates=True),
    "exp": FeatureMap(identity, logs=True),
    "softmax": FeatureMap(identity, logs=True, each=True),
    # 1 + cos is zero for opposite directions
    "cosine": FeatureMap(cosine, lambda K: 1 + K, rotates=True, rotates_below=True, eps=1e-6),
    "taylor": FeatureMap(taylor, lambda K: 1 + K + K * (K + 1) // 2),
    "identity": FeatureMap(identity, normalize=False, rotates=True),
}


def find_map(name: str) -> FeatureMap:
    """Returns the feature map of that name, or raises ValueError listing them."""
    if name not in FEATURE_MAPS:
        raise ValueError(f"feature_map: expected one of {', '.join(FEATURE_MAPS)}, got {name!r}")
    return FEATURE_MAPS[name]


def orthogonal_features(n_features: int, K: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Draws ω (n_features, K): every row is normal, N(0, I), and the rows of each block of K are orthogonal.

    An orthogonal matrix drawn evenly, with the lengths of K-dimensional normal vectors (the chi distribution). Float64,
    on the CPU, as `generator` must be.
    """

    def normal() -> Tensor:
        return torch.randn(K, K, dtype=torch.float64, device="cpu", generator=generator)

    blocks = []
    for start in range(0, n_features, K):
        Q, R = torch.linalg.qr(normal())
        # a QR decomposition leaves the signs to the algorithm, and Q is not uniform until they are taken out
        Q = Q * torch.sgn(R.diagonal())
        lengths = normal().norm(dim=1)
        blocks.append((lengths[:, None] * Q)[: n_features - start])
    return torch.cat(blocks)


def favor(x: Tensor, ω: Tensor) -> Tensor:
    """Logarithms of the positive random features (..., F): E[φ(q) · φ(k)] = exp(q · k) over draws of ω (F, K)."""
    wide = accumulation_dtype(x.dtype)
    x, ω = x.to(wide), ω.to(wide)
    with full_precision(x.device.type):
        return F.linear(x, ω) - (x.square().sum(-1, keepdim=True) + math.log(len(ω))) / 2
