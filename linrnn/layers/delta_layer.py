"""What `deltanet` and `gated_deltanet` share: projections, short convolution, unit keys, the delta rule, the output."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, positive_int
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads, white_
from linrnn.layers.short_conv import QKVConv
from linrnn.ops import delta_rule


class DeltaState(NamedTuple):
    """S (B, H, K, V) maps a key to its value; conv (B, conv_width - 1, channels) holds the last inputs of the filters.

    Both float32, or float64 for a float64 layer; conv is None without convolution.
    """

    S: Tensor
    conv: Tensor | None = None


class DeltaLayer(RecurrentLayer):
    """y = W_o RMSNorm(delta_rule(q, k, v, β)), with q, k, v = silu(conv(W x)) and q, k of length 1 per head.

    A subclass may give a log decay of the state, and calls `reset_parameters`.
    """

    state_type = DeltaState

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None,
        d_key: int | None,
        d_value: int | None,
        conv: str,
        conv_width: int,
        allow_neg_eigval: bool,
        use_gate: bool,
    ):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads, d_model if d_key is None or d_value is None else n_heads)
        self.d_key = d_model // self.n_heads if d_key is None else positive_int("d_key", d_key)
        self.d_value = d_model // self.n_heads if d_value is None else positive_int("d_value", d_value)
        self.allow_neg_eigval = allow_neg_eigval
        key, value = self.n_heads * self.d_key, self.n_heads * self.d_value
        self.qkv = nn.Linear(d_model, 2 * key + value, bias=False)
        self.conv = QKVConv(conv, (key, key, value), width=conv_width)
        self.beta = nn.Linear(d_model, self.n_heads, bias=False)
        self.gate = nn.Linear(d_model, value, bias=False) if use_gate else None
        self.norm = HeadNorm(self.d_value)
        self.out = nn.Linear(value, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white q, k, v, and β around a half of its range."""
        white_(self.qkv, self.beta, self.out, *(() if self.gate is None else (self.gate,)))
        self.conv.reset_parameters()
        self.norm.reset_parameters()

    def state_spec(self) -> StateSpec:
        S = (self.n_heads, self.d_key, self.d_value), accumulation_dtype(self.qkv.weight.dtype)
        return {"S": S, **self.conv.state_spec()}

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Maps x (B, T, D) to the log decay of S, (B, T, H), at least float32; None for no decay."""
        return None

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        S, conv = (None, None) if state is None else state
        qkv, conv = self.conv(self.qkv(x), conv, reset=reset, mask=mask)
        q, k, v = (split_heads(z, self.n_heads) for z in qkv)  # (B, T, H, K), (B, T, H, K), (B, T, H, V)
        wide = accumulation_dtype(x.dtype)
        # in float32 also beside bf16: a key longer than 1 and a β of 2 would leave the unit ball
        q, k = unit_length(q.to(wide)), unit_length(k.to(wide))
        beta = self.beta(x).to(wide).sigmoid()
        beta = 2 * beta if self.allow_neg_eigval else beta
        o, S = delta_rule(q, k, v, beta, S, log_decay=self.log_decay(x), reset=reset, mask=mask)
        o = merge_heads(self.norm(o.to(v.dtype)))
        o = o if self.gate is None else o * F.silu(self.gate(x))
        return self.out(o), DeltaState(S, conv)


def unit_length(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scales vectors (..., K) to a length just below 1, and zero ones to zero."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
