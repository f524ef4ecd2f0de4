"""RetNet's multi-scale retention (Sun et al. 2023, arXiv:2307.08621).

    S_t = γ_h R_{-1} S_{t-1} + k_t v_t^T                     q, k, v = W_Q x, W_K x / √K, W_V x
    o_t = q_t^T S_t                                          γ_h = 1 - 2^(-5-h), head h = 0, 1, ...
    y_t = W_O (swish(W_G x_t) ⊙ GroupNorm_h(o_t))

R_{-1} turns back the pairs of a key by the angles θ_i = base^(-2i/K): γ e^{iθ} is the paper's decay with xPos, and
o_t = sum_j γ^(t-j) (R_t q_t) · (R_j k_j) v_j. The norm of each head makes o's scale, and any normaliser of it, moot.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads
from linrnn.layers.rotary import count_real, rotate_back, rotate_features
from linrnn.ops import linear_attention


class RetNetState(NamedTuple):
    """S (B, H, K, V) float32; float64 for a float64 layer."""

    S: Tensor


class RetNet(RecurrentLayer):
    """Linear attention that every head forgets at its own constant rate.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads, of even key width D / H; if None, at least 4 heads as wide as 64 allows.
        d_value: width V of a head's values; 2 D / H if None, as in the paper.
        rope_base: base of the angles.
    """

    state_type = RetNetState

    def __init__(
        self, d_model: int, *, n_heads: int | None = None, d_value: int | None = None, rope_base: float = 10000.0
    ):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads)
        self.d_key = d_model // self.n_heads
        self.d_value = 2 * self.d_key if d_value is None else positive_int("d_value", d_value)
        if self.d_key % 2:
            raise ValueError(f"n_heads: rotary positions need an even width d_model / n_heads, got {self.d_key}")
        if not finite(rope_base) or not rope_base > 0:
            raise ValueError(f"rope_base: expected a number > 0, got {rope_base!r}")
        self.rope_base = rope_base
        values = self.n_heads * self.d_value
        self.sizes = (d_model, d_model, values, values)  # of q, k, v and the gate
        self.qkvg = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.norm = HeadNorm(self.d_value, center=True, affine=False, eps=1e-6)
        self.out = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: Glorot uniform, with a gain of 2^-2.5 on all but W_O, as the authors' code."""
        for weight in self.qkvg.weight.split(self.sizes):
            nn.init.xavier_uniform_(weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight)

    def state_spec(self) -> StateSpec:
        shape = (self.n_heads, self.d_key, self.d_value)
        return {"S": (shape, accumulation_dtype(self.out.weight.dtype))}

    def log_decay(self) -> Tensor:
        """Returns log γ (H), at least float32."""
        dtype = accumulation_dtype(self.out.weight.dtype)
        h = torch.arange(self.n_heads, dtype=dtype, device=self.out.weight.device)
        return torch.log1p(-torch.exp2(-5 - h))

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        *qkv, gate = self.qkvg(x).split(self.sizes, -1)
        q, k, v = (split_heads(s, self.n_heads) for s in qkv)
        position, count = count_real(x, mask)
        q, k = rotate_features(q, k, position, self.d_key, self.rope_base)
        S = None if state is None else state.S
        o, S = linear_attention(q, k, v, S, log_decay=self.log_decay(), reset=reset, mask=mask)
        y = self.out(F.silu(gate) * merge_heads(self.norm(o)))
        return y, RetNetState(rotate_back(S, count, self.d_key, self.rope_base))
