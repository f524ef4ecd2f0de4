"""Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

S_t = diag(α_t) S_{t-1} + k_t v_t^T      q, k, v = W_Q x, W_K x, W_V x
o_t = q_t^T S_t / √K                     α_t = σ(W_2 W_1 x_t + b)^(1/τ), a decay for every key channel
y_t = W_O (swish(W_G x_t) ⊙ RMSNorm_h(o_t))
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, positive_int
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads, white_
from linrnn.layers.short_conv import QKVConv
from linrnn.ops import linear_attention


class GLAState(NamedTuple):
    """S (B, H, K, V), and conv (B, W-1, channels), the inputs of the short convolution; None without one.

    Both float32; float64 for a float64 layer.
    """

    S: Tensor
    conv: Tensor | None = None


class GLA(RecurrentLayer):
    """Linear attention whose keys' channels forget at rates that the input decides.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        d_key: width K of a head's queries and keys; D / 2 H if None, as in the paper.
        d_value: width V of a head's values; D / H if None.
        gate_low_rank: rank of W_2 W_1.
        gate_temperature: τ; the larger, the slower the forgetting.
        conv: short convolution of "none", "k" or "qkv".
        conv_width: length W of its filters.
    """

    state_type = GLAState

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        gate_low_rank: int = 16,
        gate_temperature: float = 16.0,
        conv: str = "none",
        conv_width: int = 4,
    ):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads)
        self.d_key = max(1, d_model // (2 * self.n_heads)) if d_key is None else positive_int("d_key", d_key)
        self.d_value = d_model // self.n_heads if d_value is None else positive_int("d_value", d_value)
        if not gate_temperature > 0:
            raise ValueError(f"gate_temperature: expected a number > 0, got {gate_temperature}")
        self.gate_temperature = gate_temperature
        keys, values = self.n_heads * self.d_key, self.n_heads * self.d_value
        sizes = (keys, keys, values)
        self.qkvg = nn.Linear(d_model, sum(sizes) + values, bias=False)
        self.conv = QKVConv(conv, sizes, width=conv_width, activation=None)
        self.decay_in = nn.Linear(d_model, positive_int("gate_low_rank", gate_low_rank), bias=False)
        self.decay_out = nn.Linear(gate_low_rank, keys)
        self.norm = HeadNorm(self.d_value)
        self.out = nn.Linear(values, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white q, k, v, gate and decay logits; so α is about 0.5^(1/τ)."""
        white_(self.qkvg, self.decay_in, self.decay_out, self.out)
        self.norm.reset_parameters()
        self.conv.reset_parameters()

    def state_spec(self) -> StateSpec:
        shape = (self.n_heads, self.d_key, self.d_value)
        return {"S": (shape, accumulation_dtype(self.out.weight.dtype)), **self.conv.state_spec()}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        S, before = (None, None) if state is None else state
        values = self.n_heads * self.d_value
        qkv, gate = self.qkvg(x).split((self.qkvg.out_features - values, values), -1)
        qkv, before = self.conv(qkv, before, reset=reset, mask=mask)
        q, k, v = (split_heads(s, self.n_heads) for s in qkv)
        logits = self.decay_out(self.decay_in(x))
        log_decay = F.logsigmoid(logits.to(accumulation_dtype(logits.dtype))) / self.gate_temperature
        log_decay = split_heads(log_decay, self.n_heads)  # (B, T, H, K)
        o, S = linear_attention(q, k, v, S, log_decay=log_decay, reset=reset, mask=mask)
        y = self.out(F.silu(gate) * merge_heads(self.norm(o)))
        return y, GLAState(S, before)
