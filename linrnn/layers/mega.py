"""MEGA, moving average equipped gated attention (Ma et al. 2023, arXiv:2209.10655, sections 3.2 to 3.4).

    X' = SiLU(EMA(X))                                    the damped average of `ema.DampedEMA`
    Z = SiLU(X' W_z + b_z)                               Q = κ_q ⊙ Z + μ_q,  K = κ_k ⊙ Z + μ_k
    V = SiLU(X W_v + b_v)                                O = f(Q K^T / τ + b_rel) V, one head
    γ = SiLU(X' W_γ + b_γ)                               φ = σ(X' W_φ + b_φ)
    Y = φ ⊙ SiLU(X' W_h + (γ ⊙ O) U_h + b_h) + (1 - φ) ⊙ X

f is the softmax, with τ = sqrt(z), or a function of each score by itself, with τ the number of tokens in sight:
Laplace, f(x) = (1 + erf((x - sqrt(1/2)) / sqrt(1/(2 π)))) / 2, or f(x) = max(x, 0)². MEGA-chunk attends within chunks
of a document alone; what is farther away comes through the average.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, positive_int
from linrnn.layers.ema import DampedEMA
from linrnn.layers.local_attention import Packed, latest, pack, sight, unpack, windows
from linrnn.layers.relative_bias import RotaryBias, SimpleBias

FUNCTIONS = ("softmax", "laplace", "relu2")
BIASES = ("rotary", "simple")


class MegaState(NamedTuple):
    """ema (B, D, N), the averages h; k (B, S, z) and v (B, S, v), keys and values; length (B,).

    The last `length` of the S keys are those of the open document, or of its open chunk, oldest first; the others are
    zero. In chunks S is chunk_size - 1; otherwise it grows with every token. ema, length, and in chunks k and v are
    float32; float64 for a float64 layer.
    """

    ema: Tensor
    k: Tensor
    v: Tensor
    length: Tensor


class Mega(RecurrentLayer):
    """Single-head gated attention whose queries, keys and gates come from a moving average.

    The position of a token is the number of real tokens before it in its document: chunks begin with the document, so
    that padding, packed documents and carried states give what the document alone gives. As in the paper, layers stack
    with a norm around them; Y already has a gated residual of X inside.

    Args:
        d_model: width D of input and output.
        d_state: number N of averages for each channel (the paper's h).
        d_key: width z of Z, queries and keys; D / 4, at least 16, if None.
        d_value: width v of V and γ; D if None. The paper's models have 2 D.
        chunk_size: attention within chunks of so many tokens, with a state of constant size, in time linear in T; None
            for attention over everything, the MEGA of the paper, in quadratic time and with a state that grows.
        attention_fn: f, "softmax", "laplace" (the authors' for the images of LRA) or "relu2".
        rel_pos_bias: b_rel, "rotary", for any length, or "simple", one number for each distance.
        max_positions: the largest number of tokens that "simple" has distances for, with padding; chunk_size in chunks.
        bidirectional: averages in both directions and attends to later tokens; such a layer cannot step.
    """

    state_type = MegaState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_key: int | None = None,
        d_value: int | None = None,
        chunk_size: int | None = 128,
        attention_fn: str = "softmax",
        rel_pos_bias: str = "rotary",
        max_positions: int | None = None,
        bidirectional: bool = False,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.d_key = max(16, d_model // 8 * 2) if d_key is None else positive_int("d_key", d_key)
        self.d_value = d_model if d_value is None else positive_int("d_value", d_value)
        self.chunk_size = None if chunk_size is None else positive_int("chunk_size", chunk_size)
        for name, value, allowed in (("attention_fn", attention_fn, FUNCTIONS), ("rel_pos_bias", rel_pos_bias, BIASES)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        if (max_positions is not None) != (rel_pos_bias == "simple" and chunk_size is None):
            raise ValueError(
                'max_positions: expected an integer with rel_pos_bias="simple" and chunk_size=None, otherwise None, '
                f"got {max_positions!r} with {rel_pos_bias!r} and {chunk_size}"
            )
        if rel_pos_bias == "rotary" and self.d_key % 2:
            raise ValueError(f"d_key: a rotary bias needs an even one, got {d_key}")
        self.attention_fn = attention_fn
        self.ema = DampedEMA(d_model, d_state=positive_int("d_state", d_state), bidirectional=bidirectional)
        self.sizes = (d_model, self.d_key, self.d_value, d_model)  # of φ, Z, γ and the candidate
        self.v_proj = nn.Linear(d_model, self.d_value)
        self.mx_proj = nn.Linear(d_model, sum(self.sizes))
        self.h_proj = nn.Linear(self.d_value, d_model, bias=False)
        self.kappa = nn.Parameter(torch.empty(2, self.d_key))
        self.mu = nn.Parameter(torch.empty(2, self.d_key))
        self.bias: RotaryBias | SimpleBias
        if rel_pos_bias == "rotary":
            self.bias = RotaryBias(self.d_key)
        else:
            span = self.chunk_size if max_positions is None else positive_int("max_positions", max_positions)
            self.bias = SimpleBias(span or 1, causal=self.causal)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the authors' code: weights and κ normal of standard deviation 0.02, b and μ zero."""
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.normal_(self.kappa, std=0.02)
        nn.init.zeros_(self.mu)
        self.ema.reset_parameters()
        self.bias.reset_parameters()

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on gains and biases, also where they are matrices."""
        return {name: {"weight_decay": 0.0} for name in ("kappa", "mu")}

    def state_spec(self) -> StateSpec:
        wide = accumulation_dtype(self.kappa.dtype)
        S, dtype = (None, None) if self.chunk_size is None else (self.chunk_size - 1, wide)
        ema = (self.d_model, self.ema.d_state)
        return {
            "ema": (ema, wide),
            "k": ((S, self.d_key), dtype),
            "v": ((S, self.d_value), dtype),
            "length": ((), wide),
        }

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        if x.shape[1] == 0:
            return x, self.unchanged(state, x.shape[0]) if self.causal else None
        packed = pack(x, reset, mask)
        x = packed.x
        average, h = self.ema(x, state and state.ema, reset=packed.reset, mask=packed.real)
        φ, z, γ, candidate = self.mx_proj(F.silu(average)).split(self.sizes, -1)
        q, k = (F.silu(z)[..., None, :] * self.kappa + self.mu).to(z.dtype).unbind(-2)  # (B, T, z) each
        v = F.silu(self.v_proj(x))
        o, rest = self.attend(q, k, v, state, packed)
        candidate = F.silu(candidate + self.h_proj(F.silu(γ) * o))
        y = torch.addcmul(x, torch.sigmoid(φ), candidate - x)
        return unpack(y, packed.place), MegaState(h, *rest) if self.causal else None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, state: State, packed: Packed
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Returns o (B, T, v), and the k, v and length of the next state."""
        T, C = q.shape[1], self.chunk_size
        seen = sight(packed, None if state is None else state.length.round().long(), C, self.causal)
        if state is not None:
            k, v = torch.cat((state.k.to(k.dtype), k), 1), torch.cat((state.v.to(v.dtype), v), 1)  # (B, S + T, ·)
        carried = k.shape[1] - T
        L = T if C is None else min(C, T)
        # a chunk is a block of queries with all their keys, unless it began at a reset, anywhere in a block
        past, future = carried, 0
        if C is not None and packed.reset is not None:
            past, future = C - 1, 0 if self.causal else C - 1
        missing = -T % L
        pad = (0, 0, past - carried, missing + future)
        before = F.pad(seen.before, (0, missing)).unflatten(1, (-1, L))  # (1 or B, G, L)
        after = None if seen.after is None else F.pad(seen.after, (0, missing)).unflatten(1, (-1, L))
        if self.causal and past == 0 and packed.reset is None:  # all blocks are alike, and need one mask
            before = torch.arange(L, device=q.device)[None, None]
        o = self.read(
            F.pad(q, (0, 0, 0, missing)).unflatten(1, (-1, L)),
            windows(F.pad(k, pad), past, L, future),
            windows(F.pad(v, pad), past, L, future),
            before,
            after,
            past,
        )
        return o.flatten(1, 2)[:, :T], self.carry(k, v, seen.next, packed, T)

    def read(self, q: Tensor, k: Tensor, v: Tensor, before: Tensor, after: Tensor | None, past: int) -> Tensor:
        """Maps queries (B, G, L, z) and their windows of keys and values (B, G, W, ·) to o (B, G, L, v)."""
        L, W = q.shape[2], k.shape[2]
        offset = past + torch.arange(L, device=q.device)[:, None] - torch.arange(W, device=q.device)  # (L, W)
        first = torch.zeros_like(before) if after is None else -after
        visible = (offset <= before[..., None]) & (offset >= first[..., None])  # (1 or B, 1 or G, L, W)
        bias = self.biases(past + 1 - W, past + L - 1).unfold(0, W, 1).flip(-1)  # (L, W)
        if self.attention_fn == "softmax":
            bias = torch.where(visible, bias, -math.inf).to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        count = (before - first + 1)[..., None]
        scores = (q @ k.mT).to(bias.dtype) / count + bias
        if self.attention_fn == "laplace":
            # the normal distribution of mean sqrt(1/2) and variance 1/(4 π); erfc keeps its lower end exact
            weights = 0.5 * torch.erfc((math.sqrt(0.5) - scores) * math.sqrt(2 * math.pi))
        else:
            weights = F.relu(scores).square()
        return torch.where(visible, weights, 0).to(v.dtype) @ v

    def biases(self, low: int, high: int) -> Tensor:
        """Returns b_rel of the distances low, ..., high, zero for those that nobody sees."""
        reach = high if self.chunk_size is None else min(high, self.chunk_size - 1)
        first = 0 if self.causal else max(low, -reach)
        return F.pad(self.bias(first, reach), (first - low, high - reach))

    def carry(self, k: Tensor, v: Tensor, length: Tensor, packed: Packed, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the k, v and length of the next state."""
        wide = accumulation_dtype(self.kappa.dtype)
        if not self.causal or (self.chunk_size is None and packed.reset is None and packed.lengths is None):
            return k, v, length.to(wide)
        n = k.shape[1] if self.chunk_size is None else self.chunk_size - 1
        behind = None if packed.lengths is None else T - packed.lengths
        k, v = (latest(u, behind, n, length) for u in (k, v))
        if self.chunk_size is not None:
            k, v = k.to(wide), v.to(wide)
        return k, v, length.to(wide)

    def unchanged(self, state: State, batch_size: int) -> MegaState:
        """Returns the state after no tokens: `state`, without a gradient for what it does not hold."""
        if state is None:
            return self.init_state(batch_size)
        k, v = (latest(u, None, u.shape[1], state.length) for u in (state.k, state.v))
        return state._replace(k=k, v=v, length=state.length.detach())

    def init_state(self, batch_size: int) -> MegaState:
        state = super().init_state(batch_size)
        dtype = self.kappa.dtype
        return state if self.chunk_size is not None else state._replace(k=state.k.to(dtype), v=state.v.to(dtype))
