"""Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236), with a choice of feature maps (`feature_maps`).

    S_t = S_{t-1} + φ(k_t) v_t^T      o_t = φ(q_t)^T S_t / φ(q_t)^T z_t      q, k, v = W_q x, W_k x, W_v x
    z_t = z_{t-1} + φ(k_t)            y_t = W_o o_t

The identity map has no z: o_t = RMSNorm(q_t^T S_t / √K). "softmax" divides feature by feature,
o_t = sum_f softmax(q_t)_f S_tf / z_tf. Rotary positions turn φ(q) and φ(k) in S but not in z (kexue.fm 8265), with
"cosine" in both. Bidirectional layers read the S and z of the whole document.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.feature_maps import FEATURE_MAPS, FeatureMap, find_map
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads, white_
from linrnn.layers.kernel_attention import Features, causal, noncausal
from linrnn.layers.rotary import count_real, rotate_back, rotate_features
from linrnn.ops._running_max import nothing


class LinearAttentionState(NamedTuple):
    """S (B, H, F, V), the denominator's z (B, H, F), and m (B, H, F); float32, or float64 for a float64 layer.

    z is None for the identity map. For the exponential maps S and z are in units of exp(m), with m the running maximum
    of the exponents; else m is None.
    """

    S: Tensor
    z: Tensor | None = None
    m: Tensor | None = None


class KernelAttention(RecurrentLayer):
    """What layers of linear attention share, whatever their features: `kind` says which, `features` makes them."""

    state_type = LinearAttentionState

    def __init__(
        self,
        d_model: int,
        kind: FeatureMap,
        *,
        n_heads: int | None,
        d_key: int | None,
        n_features: int | None = None,
        rope_base: float | None = None,
        bidirectional: bool,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.kind, self.rope_base = kind, rope_base
        self.n_heads = count_heads(d_model, n_heads)
        self.d_head = d_model // self.n_heads
        self.d_key = self.d_head if d_key is None else positive_int("d_key", d_key)
        if rope_base is not None and self.d_key % 2:
            raise ValueError(f"d_key: rotary positions need an even key width, got {self.d_key}")
        self.n_features = kind.size(self.d_key) if n_features is None else positive_int("n_features", n_features)
        self.qkv = nn.Linear(d_model, 2 * self.n_heads * self.d_key + d_model, bias=False)
        self.norm = None if kind.normalize else HeadNorm(self.d_head)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white q, k, v."""
        white_(self.qkv, self.out)
        if self.norm is not None:
            self.norm.reset_parameters()

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.qkv.weight.dtype)
        vector = ((self.n_heads, self.n_features), dtype)
        matrix = ((self.n_heads, self.n_features, self.d_head), dtype)
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"S": matrix}
        if self.kind.normalize:
            fields["z"] = vector
        if self.kind.logs:
            fields["m"] = vector
        return fields

    def init_state(self, batch_size: int) -> LinearAttentionState:
        state = super().init_state(batch_size)
        return state if state.m is None else state._replace(m=torch.full_like(state.m, nothing(state.m.dtype)))

    def features(self, x: Tensor) -> Tensor:
        """Maps q or k (B, T, H, K) to φ, or log φ, (B, T, H, F)."""
        return self.kind.apply(x)

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        width = self.n_heads * self.d_key
        q, k, v = (split_heads(s, self.n_heads) for s in self.qkv(x).split((width, width, self.d_model), -1))
        features, below = Features(self.features(q), self.features(k)), None
        if self.rope_base is not None:
            position, count = count_real(x, mask)
            turned = Features(*rotate_features(*features, position, self.d_key, self.rope_base))
            features, below = turned, None if self.kind.rotates_below else features
        options: dict[str, Any] = {"below": below, "scale": self.d_key**-0.5, "reset": reset, "mask": mask}
        if self.causal:
            o, final = causal(self.kind, features, v, state, **options)
            if self.rope_base is not None:
                final = self.turn_back(final, count, self.rope_base)
        else:
            o, final = noncausal(self.kind, features, v, **options), None
        o = o.to(v.dtype)
        y = self.out(merge_heads(o if self.norm is None else self.norm(o)))
        return y, None if final is None else LinearAttentionState(*final)

    def turn_back(self, state: tuple, count: Tensor, base: float) -> tuple:
        """Puts what absolute positions turned into the frame of the last token."""
        S, z, m = state
        S = rotate_back(S, count, self.d_key, base)
        if self.kind.rotates_below:
            z = rotate_back(z[..., None], count, self.d_key, base)[..., 0]
        return S, z, m


class LinearAttention(KernelAttention):
    """Attention with a kernel φ(q) · φ(k) for exp(q · k): a state of constant size, work linear in T.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        d_key: width K of a query or key; if None that of a head, D / H, for "taylor" at most 16.
        feature_map: "elu", "exp", "softmax", "cosine", "taylor" or "identity".
        rope: rotary positions, for "elu", "cosine" and "identity".
        rope_base: base of their angles.
        bidirectional: every token sees its whole document; such a layer cannot step.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_key: int | None = None,
        feature_map: str = "elu",
        rope: bool = False,
        rope_base: float = 10000.0,
        bidirectional: bool = False,
    ):
        kind = find_map(feature_map)
        if rope and not kind.rotates:
            allowed = ", ".join(repr(name) for name, kind in FEATURE_MAPS.items() if kind.rotates)
            raise ValueError(f"rope: expected False with {feature_map!r}; rotary positions turn features of {allowed}")
        if not finite(rope_base) or not rope_base > 0:
            raise ValueError(f"rope_base: expected a number > 0, got {rope_base!r}")
        if feature_map == "taylor" and d_key is None:
            d_key = min(d_model // count_heads(d_model, n_heads), 16)
        super().__init__(
            d_model,
            kind,
            n_heads=n_heads,
            d_key=d_key,
            rope_base=rope_base if rope else None,
            bidirectional=bidirectional,
        )
        self.feature_map = feature_map
        self.reset_parameters()
