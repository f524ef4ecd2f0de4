"""Multi-head softmax attention with rotary positions (Vaswani et al. 2017, arXiv:1706.03762; RoPE: arXiv:2104.09864).

    o_t = sum_j softmax_j(q_t · k_j / sqrt(K)) v_j        q_t = R_t W_q x_t,  k_j = R_j W_k x_j,  v_j = W_v x_j
    y_t = W_o o_t                                         j <= t if causal, all j of the document otherwise

R_t turns the pair (i, i + K/2) of a head by the angle t * rope_base^(-2i/K), so that q_t · k_j depends on t - j.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, positive_int


class AttentionState(NamedTuple):
    """The tokens seen so far: S of them, whatever the document or padding they belong to.

    k (B, S, H, K): rotated keys; v (B, S, H, K): values; valid (B, S) bool: real tokens of the current document;
    position (B,) int64: how many of these there are, which is the position of the next token.
    """

    k: Tensor
    v: Tensor
    valid: Tensor
    position: Tensor


class Attention(RecurrentLayer):
    """Softmax attention over `torch.nn.functional.scaled_dot_product_attention`.

    The position of a token is the number of real tokens before it in its document, so padding (left, right, ragged),
    packed documents and carried states all give what the document alone gives. Without state, reset and mask no T x T
    mask is made. The state grows by one row per token.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads, of even width K = D / H; if None, at least 4 heads as wide as 16 to 64 allows.
        rope_base: base of the rotary angles; None for no positions at all.
        causal: token t sees tokens up to t.
        bidirectional: every token sees its whole document; such a layer cannot step. The same as causal=False.
        dropout: probability of dropping an attention weight in training.
    """

    state_type = AttentionState

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        rope_base: float | None = 10000.0,
        causal: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(d_model, causal=causal and not bidirectional)
        self.n_heads = default_heads(d_model) if n_heads is None else positive_int("n_heads", n_heads)
        if d_model % self.n_heads:
            raise ValueError(f"n_heads: expected a divisor of d_model = {d_model}, got {n_heads}")
        self.d_head = d_model // self.n_heads
        if rope_base is not None and rope_base <= 0:
            raise ValueError(f"rope_base: expected a number > 0 or None, got {rope_base}")
        if rope_base is not None and self.d_head % 2:
            raise ValueError(
                f"n_heads: rotary positions need an even head width, got d_model / n_heads = {self.d_head}; "
                "change n_heads or set rope_base=None"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout}")
        self.rope_base, self.dropout = rope_base, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white q, k, v."""
        nn.init.normal_(self.qkv.weight, std=self.d_model**-0.5)
        nn.init.normal_(self.out.weight, std=self.d_model**-0.5)

    def state_spec(self) -> StateSpec:
        cache = (None, self.n_heads, self.d_head)
        return {"k": (cache, None), "v": (cache, None), "valid": ((None,), torch.bool), "position": ((), torch.int64)}

    def init_state(self, batch_size: int) -> AttentionState:
        state = super().init_state(batch_size)
        dtype = self.qkv.weight.dtype
        return state._replace(k=state.k.to(dtype), v=state.v.to(dtype))

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        qk, v = self.qkv(x).unflatten(-1, (3, self.n_heads, self.d_head)).split((2, 1), 2)  # (B, T, 2 and 1, H, K)
        plain = state is None and reset is None and mask is None
        position, next_position = positions(x, state and state.position, reset, mask)  # (1 or B, T), (B)
        if self.rope_base is not None:
            qk = rotate(qk, position, self.rope_base)
        (q, k), v = qk.unbind(2), v.squeeze(2)  # (B, T, H, K) each
        if state is not None:
            # the cache takes the dtype of the activations, which autocast may have changed
            k, v = torch.cat((state.k.to(k.dtype), k), 1), torch.cat((state.v.to(v.dtype), v), 1)  # (B, S + T, H, K)
        o = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if plain else self.allowed(x, state, reset, mask),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=plain and self.causal,
        )
        y = self.out(o.transpose(1, 2).flatten(-2))
        if not self.causal:
            return y, None
        return y, AttentionState(k, v, valid_after(x, state and state.valid, reset, mask), next_position)

    def allowed(self, x: Tensor, state: State, reset: Tensor | None, mask: Tensor | None) -> Tensor:
        """Returns which keys a query sees, bool (B, 1, T or 1, S + T): at least one each, so that no row is NaN."""
        B, T, _ = x.shape
        if not self.causal and reset is None and mask is not None:
            return (mask | ~mask.any(1, keepdim=True))[:, None, None]  # (B, 1, 1, T): padding needs no T x T mask
        real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask
        seen = real[:, None].expand(B, T, T)
        if reset is not None:
            document = reset.cumsum(1)  # (B, T): 0 is the carried one
            seen = seen & (document[:, :, None] == document[:, None])
        if self.causal:
            seen = seen.tril()
        # a padded query sees itself: no real token reads the result, but it stays finite
        seen = seen | torch.eye(T, dtype=torch.bool, device=x.device)
        if state is not None:
            past = state.valid[:, None].expand(B, T, -1)
            if reset is not None:
                past = past & (document == 0)[:, :, None]
            seen = torch.cat((past, seen), -1)
        return seen[:, None]


def default_heads(d_model: int) -> int:
    """Returns a number of heads 16 to 64 wide: as wide as 4 heads allow."""
    widths = [width for width in range(16, 65, 2) if d_model % width == 0]
    if not widths:
        raise ValueError(f"n_heads: no even head width from 16 to 64 divides d_model = {d_model}; give n_heads")
    return d_model // max((width for width in widths if d_model >= 4 * width), default=min(widths))


def positions(x: Tensor, start: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Counts the real tokens before each token in its document, (1 or B, T), and before the next call's first, (B)."""
    B, T, _ = x.shape
    if start is None:
        start = torch.zeros(B, dtype=torch.int64, device=x.device)
        if reset is None and mask is None:
            return torch.arange(T, device=x.device)[None], start + T
    if T == 0:
        return start[:, None].expand(B, 0), start
    real = torch.ones(B, T, dtype=torch.int64, device=x.device) if mask is None else mask.long()
    count = start[:, None] + real.cumsum(1)  # up to and with token t, from the start of the carried document
    before = count - real
    if reset is None:
        return before, count[:, -1]
    base = torch.where(reset, before, 0).cummax(1).values  # the count at which the current document began
    return before - base, count[:, -1] - base[:, -1]


def valid_after(x: Tensor, valid: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    """Returns which of the S + T cached tokens (B, S + T) are real ones of the document that is open at the end."""
    B, T, _ = x.shape
    real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask
    if reset is not None and T:
        document = reset.cumsum(1)
        real = real & (document == document[:, -1:])
        valid = None if valid is None else valid & (document[:, -1:] == 0)
    return real if valid is None else torch.cat((valid, real), 1)


def rotate(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Turns x (B, T, 2, H, K), both q and k, by positions (1 or B, T): the halves of K are the pairs' coordinates."""
    dtype = accumulation_dtype(x.dtype)
    half = x.shape[-1] // 2
    # the phase of position 50 000 is wrong by 1e-3 in float32; Apple's GPUs have no float64
    exact = dtype if x.device.type == "mps" else torch.float64
    frequency = base ** (torch.arange(half, dtype=exact, device=x.device) / -half)  # (K / 2)
    angle = (position[..., None, None, None] * frequency).remainder(2 * math.pi).to(dtype)  # (1 or B, T, 1, 1, K / 2)
    cos, sin = angle.cos(), angle.sin()
    x1, x2 = x.to(dtype).chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x1 * sin + x2 * cos), -1).to(x.dtype)
