"""Aaren, attention as a recurrent network (Feng et al. 2024, arXiv:2405.13956, section 3.3).

    l_t = q · k_t / √K      o_t = sum_{j<=t} e^{l_j} v_j / sum_{j<=t} e^{l_j}      k_t, v_t = W_k x_t, W_v x_t
    y_t = W_o o_t

The query q is not made of the token but learned, one for each head: a softmax over the past then needs no cache, but
the sums (m, z, y) of `ops.softmax_scan`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding
from linrnn.layers.heads import count_heads, merge_heads, split_heads, white_
from linrnn.ops import SoftmaxState, softmax_scan
from linrnn.ops._inputs import full_precision
from linrnn.ops._running_max import nothing


class Aaren(RecurrentLayer):
    """A weighted mean of all values so far, whose weights depend on each token alone, not on which one asks.

    There are 3 D² + D parameters. (The paper makes q of another vector, by a matrix that only its product with it
    leaves a trace of.) The recurrence has none, so `optim_hints` has only that q does not decay.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads, of width K = D / H; if None, at least 4 heads as wide as 64 allows.
    """

    state_type = SoftmaxState

    def __init__(self, d_model: int, *, n_heads: int | None = None):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads)
        self.d_head = d_model // self.n_heads
        self.query = nn.Parameter(torch.empty(self.n_heads, self.d_head))
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white k and v, and logits of variance one."""
        nn.init.normal_(self.query)
        white_(self.key, self.value, self.out)

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.query.dtype)
        scalar = ((self.n_heads,), dtype)
        return {"m": scalar, "z": scalar, "y": ((self.n_heads, self.d_head), dtype)}

    def init_state(self, batch_size: int) -> State:
        state = super().init_state(batch_size)
        return state._replace(m=torch.full_like(state.m, nothing(state.m.dtype)))

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """A query is a direction in which to look, not a weight to keep small."""
        return {"query": {"weight_decay": 0.0}}

    def logits(self, x: Tensor) -> Tensor:
        """Maps x (B, T, D) to l (B, T, H), at least float32.

        All tokens share q, so it goes into W_k first: a token then costs H D multiplications, not D².
        """
        dtype = accumulation_dtype(x.dtype)
        with full_precision(x.device.type):
            W_k = self.key.weight.to(dtype).unflatten(0, self.query.shape)  # (H, K, D)
            weight = (self.query.to(dtype)[..., None] * W_k).sum(1) * self.d_head**-0.5  # (H, D)
            return F.linear(x.to(dtype), weight)

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        v = split_heads(self.value(x), self.n_heads)  # (B, T, H, V)
        o, state = softmax_scan(self.logits(x), v, state, reset=reset, mask=mask)
        return self.out(merge_heads(o)), state
