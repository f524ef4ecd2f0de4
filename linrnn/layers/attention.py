"""Multi-head softmax attention (Vaswani et al. 2017, arXiv:1706.03762), with grouped queries (arXiv:2305.13245).

    o_t = sum_j softmax_j(scale q_t · k_j) v_j        q_t = R_t W_q x_t,  k_j = R_j W_k x_j,  v_j = W_v x_j
    y_t = W_o o_t                                     j <= t if causal, all j of the document otherwise

R_t stands for what `positions` says: rotary positions (RoPE) turn queries and keys, so that q_t · k_j depends on t - j.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linrnn.layers.append import append
from linrnn.layers.attention_scale import QK_NORMS, Scale, check_scale, constant_scale, query_factor, unit
from linrnn.layers.attention_state import AttentionState, first_tokens, next_state
from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, finite, positive_int
from linrnn.layers.heads import HeadNorm, heads_of_width, white_
from linrnn.layers.local_attention import Packed, Sight, pack, sight, unpack
from linrnn.layers.positions import ALiBi, Positions, ReRoPE, RoPE, as_positions
from linrnn.layers.softmax_attention import Rule, Sinks, attend, fused, keeps_weights, products


class Attention(RecurrentLayer):
    """Softmax attention over `torch.nn.functional.scaled_dot_product_attention`.

    The position of a token is the number of real tokens before it in its document, so padding (left, right, ragged),
    packed documents and carried states all give what the document alone gives. Masks are made for blocks of queries, or
    not at all. The state grows by one row per token, without being copied each time, or with `window` has a fixed size.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 16 to 64 allows, or D / K of them.
        d_head: width K of a head; if None, D / H.
        n_kv_heads: heads of keys and values, a divisor of H; if None, H. Groups of H / n_kv_heads heads share them.
        positions: a value of `linrnn.layers.positions` (RoPE, ReRoPE, ALiBi, NoPE), its name, a mapping, or None.
        scale: factor of the logits. None: 1 / sqrt(K), one with qk_norm="key", 4 ln n with "cos", where a query sees n
            keys. "logn", LogN(length): times ln n / ln length. "gradient": times 0.84 sqrt(ln n), 3.5 ln n with "cos".
        qk_norm: "qk": RMSNorm with a gain on the heads of queries and keys; "key": keys of length one (KeyNorm);
            "cos": both (CosA, kexue.fm 9859).
        qk_bias: adds a bias to queries and keys, before R_t (kexue.fm 9577).
        out_bias: adds a bias to the output. (One of the values would be the same: the weights of a token sum to one.)
        window: a token sees those at distances below it, on both sides if bidirectional.
        sink: how many first tokens of a document are seen beside the window (arXiv:2309.17453).
        half_causal: of a bidirectional layer, half of the heads see tokens up to t, the others those from t on
            (kexue.fm 9529).
        causal: token t sees tokens up to t.
        bidirectional: every token sees its whole document; such a layer cannot step. The same as causal=False: a layer
            is bidirectional if one of the two says so, whatever the other says.
        dropout: probability of dropping an attention weight in training.

    Raises:
        ValueError: a value outside its range, or two options that exclude each other.
    """

    state_type = AttentionState

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_head: int | None = None,
        n_kv_heads: int | None = None,
        positions: Positions | str | Mapping[str, Any] | None = RoPE(),  # noqa: B008
        scale: Scale = None,
        qk_norm: str | None = None,
        qk_bias: bool = False,
        out_bias: bool = False,
        window: int | None = None,
        sink: int = 0,
        half_causal: bool = False,
        causal: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(d_model, causal=causal and not bidirectional)
        self.n_heads, self.d_head = heads_of_width(d_model, n_heads, d_head)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else positive_int("n_kv_heads", n_kv_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads: expected a divisor of n_heads = {self.n_heads}, got {n_kv_heads}")
        self.positions = as_positions(positions)
        if isinstance(self.positions, RoPE):
            self.positions.turned(self.d_head)
        elif isinstance(self.positions, ReRoPE) and self.d_head % 2:
            raise ValueError(f"n_heads: ReRoPE needs an even head width, got heads of {self.d_head}")
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm: expected one of 'qk', 'key', 'cos', None, got {qk_norm!r}")
        self.scale, self.qk_norm = check_scale(scale, qk_norm), qk_norm
        self.window = None if window is None else positive_int("window", window)
        if not isinstance(sink, int) or isinstance(sink, bool) or sink < 0:
            raise ValueError(f"sink: expected an integer >= 0, got {sink!r}")
        if not finite(dropout) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {dropout!r}")
        self.sink, self.half_causal, self.dropout = sink, half_causal, dropout
        self.check_together()
        self.qkv = nn.Linear(d_model, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=False)
        self.out = nn.Linear(self.n_heads * self.d_head, d_model, bias=out_bias)
        self.qk_bias = nn.Parameter(torch.empty(self.n_heads + self.n_kv_heads, self.d_head)) if qk_bias else None
        self.q_norm = HeadNorm(self.d_head) if qk_norm == "qk" else None
        self.k_norm = HeadNorm(self.d_head) if qk_norm == "qk" else None
        self.reset_parameters()

    def check_together(self) -> None:
        """Raises ValueError for two options that exclude each other."""
        ahead, rerope = not self.causal, isinstance(self.positions, ReRoPE)
        for wrong, one, other, why in (
            (self.half_causal and self.causal, "half_causal", "causal", "half of the heads look ahead"),
            (self.half_causal and self.n_kv_heads % 2, "half_causal", f"n_kv_heads={self.n_kv_heads}", "no half of it"),
            (self.sink and self.window is None, "sink", "window=None", "without a window all tokens are seen"),
            (self.sink and ahead, "sink", "bidirectional", "the first tokens stay visible to later ones"),
            (rerope and self.window is not None, "ReRoPE", "window", "distances have one of the two windows"),
            (rerope and ahead, "ReRoPE", "bidirectional", "distances below zero have no window"),
        ):
            if wrong:
                raise ValueError(f"{one}, {other}: these exclude each other, {why}")

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white q, k, v. Biases are zero, gains one."""
        white_(self.qkv, self.out)
        if self.qk_bias is not None:
            nn.init.zeros_(self.qk_bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on biases, also where they are a matrix."""
        return {} if self.qk_bias is None else {"qk_bias": {"weight_decay": 0.0}}

    def state_spec(self) -> StateSpec:
        shape = self.n_kv_heads, self.d_head
        cache = (None if self.window is None else self.window - 1, *shape)
        spec: dict[str, Any] = {"k": (cache, None), "v": (cache, None), "position": ((), torch.int64)}
        return spec | (
            {"sink_k": ((self.sink, *shape), None), "sink_v": ((self.sink, *shape), None)} if self.sink else {}
        )

    # the pieces: what a decoder puts together in its own way (`linrnn.layers.online_softmax`)

    def project(self, x: Tensor, position: Tensor, count: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x (B, T, D) at positions (1 or B, T) to q (B, T, H, K) and k, v (B, T, H_kv, K), as they are cached.

        Args:
            x: the tokens.
            position: of each in its document.
            count: how many keys each query sees, (1 or B, T), or (1 or B, T, H) where heads differ; if None, as many as
                causality and the window allow.
        """
        split = self.n_heads + self.n_kv_heads, self.n_kv_heads
        qk, v = self.qkv(x).unflatten(-1, (sum(split), self.d_head)).split(split, 2)
        if self.qk_bias is not None:
            qk = (qk + self.qk_bias).to(v.dtype)
        count = self.count(position) if count is None else count
        factor = query_factor(self.scale, self.qk_norm, count, accumulation_dtype(v.dtype))
        if factor is not None or self.qk_norm is not None:
            q, k = qk.split((self.n_heads, self.n_kv_heads), 2)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            k = unit(k) if self.qk_norm in ("key", "cos") else k
            q = unit(q) if self.qk_norm == "cos" else q
            if factor is not None:
                by_head = factor if factor.ndim == 3 else factor[..., None]  # (1 or B, T, 1 or H)
                q = (q * by_head[..., None]).to(q.dtype)
            qk = torch.cat((q, k), 2)
        if isinstance(self.positions, RoPE):
            qk = self.positions.turn(qk, position)
        q, k = qk.split((self.n_heads, self.n_kv_heads), 2)
        return q, k, v

    def scores(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor, far: int = 0, near: int | None = None) -> Tensor:
        """Returns the logits (B, H, C, W), at least float32, of q (B, C, H, K) and cached k (B, W, H_kv, K).

        Queries and keys are at positions `query` (C) or (1 or B, C) and `key` (W) or (1 or B, W) of one document; what
        is not seen is not left out (`visible`). ReRoPE saves work where the first `far` keys are known to be at its
        window's distance or more from all queries, and those from `near` on at less.
        """
        query, key = (p[None] if p.ndim == 1 else p for p in (query, key))
        if isinstance(self.positions, ReRoPE):
            logits = self.positions.products(q, k, query, key, far, k.shape[1] if near is None else near)
        else:
            logits = products(q, k)
        logits = logits * self.logit_scale
        slopes = self.slopes(logits)
        if slopes is None:
            return logits
        return logits - slopes[:, None, None] * (query.to(slopes.dtype)[:, None, :, None] - key[:, None, None]).abs()

    def visible(self, query: Tensor, key: Tensor) -> Tensor:
        """Returns which keys of one document are seen, bool (C, W) or (1 or B, C, W), positions as in `scores`."""
        key = key[..., None, :]
        distance = query[..., None] - key
        seen = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        return seen if self.window is None else seen & ((distance.abs() < self.window) | (key < self.sink))

    def merge(self, o: Tensor) -> Tensor:
        """Maps what the heads read, o (B, T, H, K), to y (B, T, D)."""
        return self.out(o.flatten(-2))

    @property
    def logit_scale(self) -> float:
        """The factor of the logits that is the same for all queries."""
        more = self.positions.logit_factor if isinstance(self.positions, RoPE) else 1.0
        return constant_scale(self.scale, self.qk_norm, self.d_head) * more

    def slopes(self, like: Tensor) -> Tensor | None:
        """Returns ALiBi's slopes (H), at least float32, or None."""
        if not isinstance(self.positions, ALiBi):
            return None
        return torch.tensor(
            self.positions.slopes(self.n_heads), dtype=accumulation_dtype(like.dtype), device=like.device
        )

    def count(self, before: Tensor, after: Tensor | None = None) -> Tensor:
        """Returns how many keys a query sees that has so many tokens before and after it in its document.

        (1 or B, T) as these are, or (1 or B, T, H) for half-causal heads.
        """
        if self.window is not None:
            before = before.clamp(max=self.window - 1 + self.sink)
            after = None if after is None else after.clamp(max=self.window - 1)
        if after is None:
            return before + 1
        if self.half_causal:
            return 1 + torch.stack(torch.broadcast_tensors(before, after), -1).repeat_interleave(self.n_heads // 2, -1)
        return before + 1 + after

    # the whole

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        if x.shape[1] == 0:
            empty = self.merge(x.new_empty(len(x), 0, self.n_heads, self.d_head))
            return empty, (self.init_state(len(x)) if state is None else state) if self.causal else None
        packed = pack(x, reset, mask)
        seen = sight(packed, state and state.position, None, self.causal)
        q, k, v = self.project(packed.x, seen.before, self.count(seen.before, seen.after))
        if state is not None:
            k, v = append(state.k, k), append(state.v, v)  # (B, S + T, H_kv, K)
        elif self.causal and self.window is None:
            k, v = append(None, k), append(None, v)
        sinks = first_tokens(k, v, state, packed, seen, self.sink) if self.sink else None
        o = self.halves(q, k, v, packed, seen) if self.half_causal else self.read(q, k, v, packed, seen, sinks)
        y = unpack(self.merge(o), packed.place)
        return y, next_state(k, v, state, packed, seen, sinks, self.window) if self.causal else None

    def read(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, seen: Sight, sinks: Sinks | None = None) -> Tensor:
        """Maps queries q (B, T, H, K) and the columns k, v (B, S + T, H_kv, K) to o (B, T, H, K)."""
        how: dict[str, Any] = {"scale": self.logit_scale, "dropout": self.dropout if self.training else 0.0}
        T = q.shape[1]
        carried = k.shape[1] > T or (sinks is not None and self.window == 1)  # a window of one carries sinks alone
        everything = not carried and packed.reset is None and (self.window or T) >= T
        in_blocks = isinstance(self.positions, (ALiBi, ReRoPE)) or keeps_weights(q, how["dropout"])
        if everything and not in_blocks:
            if seen.after is None:  # padding is behind what is real
                return fused(q, k, v, causal=True, **how)
            real = packed.real
            return fused(q, k, v, mask=None if real is None else (real | ~real[:, :1])[:, None, None], **how)
        return attend(q, k, v, self.rule(q, seen, sinks), **how)

    def halves(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed, seen: Sight) -> Tensor:
        """Half of the heads reads up to each token, the other half from there on."""
        (q, q2), (k, k2), (v, v2) = (u.chunk(2, 2) for u in (q, k, v))
        rule = self.rule(q, seen, None)
        past, future = (
            rule._replace(after=None, ahead=None),
            rule._replace(before=torch.zeros_like(rule.before), back=0),
        )
        if rule.slopes is not None:
            past, future = (r._replace(slopes=s) for r, s in zip((past, future), rule.slopes.chunk(2), strict=True))
        elif packed.lengths is None and packed.reset is None and (self.window or q.shape[1]) >= q.shape[1]:
            causal = self.read(q, k, v, packed, seen._replace(after=None))
            anticausal = self.read(q2.flip(1), k2.flip(1), v2.flip(1), packed, seen._replace(after=None)).flip(1)
            return torch.cat((causal, anticausal), 2)
        how: dict[str, Any] = {"scale": self.logit_scale, "dropout": self.dropout if self.training else 0.0}
        return torch.cat((attend(q, k, v, past, **how), attend(q2, k2, v2, future, **how)), 2)

    def rule(self, q: Tensor, seen: Sight, sinks: Sinks | None) -> Rule:
        """Returns what queries see by their documents and the window, and how."""
        reach = None if self.window is None else self.window - 1
        before, after = seen.before, seen.after
        if reach is not None:
            before, after = before.clamp(max=reach), None if after is None else after.clamp(max=reach)
        rule = Rule(before, after, reach, None if after is None else reach, sinks, self.slopes(q))
        if isinstance(self.positions, ReRoPE):
            rule = rule._replace(scores=self.scores, far_window=self.positions.window)
        return rule
