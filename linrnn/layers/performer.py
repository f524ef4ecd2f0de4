"""Performer (Choromanski et al. 2020, arXiv:2009.14794): softmax attention estimated by positive random features.

    o_t = φ(q_t)^T S_t / φ(q_t)^T z_t      φ(x) = exp(ω x̂ - |x̂|² / 2) / √F,  x̂ = x / K^(1/4)

so that E[φ(q) · φ(k)] = exp(q · k / √K). The rows of ω are normal and, in blocks of K, orthogonal: FAVOR+.
"""

import torch
from torch import Tensor

from linrnn.layers.feature_maps import FeatureMap, favor, identity, orthogonal_features
from linrnn.layers.linear_attention import KernelAttention


class Performer(KernelAttention):
    """Linear attention whose features estimate exp(q · k / √K), shared by all heads.

    The features ω are a buffer: not trained, saved in the state_dict, the same in training and evaluation until
    `redraw`. Relative to exp(q · k) the estimate has a variance of about exp(|q + k|²) / F: it suits small norms.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        d_key: width K of a query or key; D / H if None.
        n_features: number F of random features; 4 K if None.
        bidirectional: every token sees its whole document; such a layer cannot step.
    """

    omega: Tensor

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_key: int | None = None,
        n_features: int | None = None,
        bidirectional: bool = False,
    ):
        kind = FeatureMap(identity, lambda K: 4 * K, logs=True)
        super().__init__(
            d_model, kind, n_heads=n_heads, d_key=d_key, n_features=n_features, bidirectional=bidirectional
        )
        self.register_buffer("omega", torch.empty(self.n_features, self.d_key))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters, white x gives white q, k, v, and new features."""
        super().reset_parameters()
        self.redraw()

    def redraw(self, *, generator: torch.Generator | None = None) -> None:
        """Draws new random features, in place; `generator` is one of the CPU. States of the old ones lose their use."""
        self.omega.copy_(orthogonal_features(self.n_features, self.d_key, generator=generator))

    def features(self, x: Tensor) -> Tensor:
        return favor(x * self.d_key**-0.25, self.omega)
