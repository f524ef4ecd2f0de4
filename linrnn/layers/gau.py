"""Gated attention unit (Hua et al. 2022, arXiv:2202.10447), and GAU-α's softmax (kexue.fm 9019 and 9052).

    U = SiLU(X W_u),  V = SiLU(X W_v)                    Z = SiLU(X W_z)
    Q = R (κ_q ⊙ Z + μ_q),  K = R (κ_k ⊙ Z + μ_k)        R: rotary positions; one head, of width s
    O = (U ⊙ A V) W_o                                    A = relu²(Q K^T / √s) / n  or  softmax(log_512(n) Q K^T / √s)

n is the number of tokens that a row sees: t for token t of a causal layer, the length of the document otherwise. With
U = 1 it is attention, with A = I the gated feed-forward network: two of these layers stand for one of each.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.append import append
from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, finite, positive_int
from linrnn.layers.heads import white_
from linrnn.layers.local_attention import Packed, Sight, in_sight, latest, pack, sight, unpack
from linrnn.layers.rotary import rotate
from linrnn.layers.softmax_attention import Rule, attend
from linrnn.ops._recompute import recomputed

ATTENTIONS = ("relu2", "softmax_plus")
# queries in a block: what comes after a causal block costs nothing, and no scores of T x T are held at once
QUERIES = 256
# from here on the backward pass computes the scores again, so that they are not kept either
LONG = 4096


class GAUState(NamedTuple):
    """k (B, S, s), rotated keys, and v (B, S, e), values, of all tokens so far; length (B,) int64.

    The last `length` of the S are those of the open document, oldest first; the others are zero.
    """

    k: Tensor
    v: Tensor
    length: Tensor


class GatedUnit(RecurrentLayer):
    """What GAU and FLASH share: O = (U ⊙ o) W_o, and several queries and keys made of one Z.

    The position of a token is the number of real tokens before it in its document.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_maps: int,
        d_value: int | None,
        d_key: int | None,
        rope_base: float | None,
        bidirectional: bool,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.d_value = 2 * d_model if d_value is None else positive_int("d_value", d_value)
        self.d_key = min(128, max(16, d_model // 8 * 2)) if d_key is None else positive_int("d_key", d_key)
        if rope_base is not None and (not finite(rope_base) or not rope_base > 0):
            raise ValueError(f"rope_base: expected a number > 0 or None, got {rope_base!r}")
        if rope_base is not None and self.d_key % 2:
            raise ValueError(f"d_key: rotary positions need an even one, got {d_key}; or set rope_base=None")
        self.rope_base = rope_base
        self.sizes = (self.d_value, self.d_value, self.d_key)  # of U, V and Z
        self.uvz_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.d_value, d_model, bias=False)
        self.kappa = nn.Parameter(torch.empty(n_maps, self.d_key))
        self.mu = nn.Parameter(torch.empty(n_maps, self.d_key))

    def reset_parameters(self) -> None:
        """White x gives white products; κ = 1 and μ = 0 as in GAU-α: the paper's κ of 0.02 leaves relu² near zero."""
        white_(self.uvz_proj, self.out)
        nn.init.ones_(self.kappa)
        nn.init.zeros_(self.mu)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on gains and biases, also where they are matrices."""
        return {name: {"weight_decay": 0.0} for name in ("kappa", "mu")}

    def project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x (B, T, D) at positions (1 or B, T) to u and v (B, T, e), and κ ⊙ z + μ, turned, (B, T, n_maps, s)."""
        u, v, z = F.silu(self.uvz_proj(x)).split(self.sizes, -1)
        maps = (z[..., None, :] * self.kappa + self.mu).to(z.dtype)
        if self.rope_base is not None:
            maps = rotate(maps[..., None, :], position, self.rope_base)[..., 0, :]
        return u, v, maps


class GAU(GatedUnit):
    """Gated attention over everything: one head, work quadratic in T, a state that grows by a row with every token.

    Args:
        d_model: width D of input and output.
        d_value: width e of U and V; 2 D if None.
        d_key: width s of Z, queries and keys; if None 128, at small D the even number at D / 4, at least 16.
        attention: "relu2", the paper's, or "softmax_plus", GAU-α's, which carries over to other lengths
            (n counts as 16 where it is less).
        rope_base: base of the rotary angles; None for no positions at all.
        bidirectional: every token sees its whole document; such a layer cannot step.
    """

    state_type = GAUState

    def __init__(
        self,
        d_model: int,
        *,
        d_value: int | None = None,
        d_key: int | None = None,
        attention: str = "relu2",
        rope_base: float | None = 10000.0,
        bidirectional: bool = False,
    ):
        super().__init__(
            d_model, n_maps=2, d_value=d_value, d_key=d_key, rope_base=rope_base, bidirectional=bidirectional
        )
        if attention not in ATTENTIONS:
            raise ValueError(f"attention: expected one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}")
        self.attention = attention
        self.reset_parameters()

    def state_spec(self) -> StateSpec:
        return {
            "k": ((None, self.d_key), None),
            "v": ((None, self.d_value), None),
            "length": ((), torch.int64),
        }

    def init_state(self, batch_size: int) -> GAUState:
        state = super().init_state(batch_size)
        dtype = self.kappa.dtype
        return state._replace(k=state.k.to(dtype), v=state.v.to(dtype))

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        if x.shape[1] == 0:
            return x, (self.init_state(x.shape[0]) if state is None else state) if self.causal else None
        packed = pack(x, reset, mask)
        seen = sight(packed, None if state is None else state.length, None, self.causal)
        u, v, maps = self.project(packed.x, seen.before)
        q, k = maps.unbind(-2)  # (B, T, s) each
        if self.causal:
            k, v = append(state and state.k, k), append(state and state.v, v)  # (B, S + T, ·)
        q = scaled(q, self.scale(in_sight(seen).to(accumulation_dtype(q.dtype))))
        if self.attention == "relu2":
            o = relu2_attention(q, k, v, seen)
        else:
            o = attend(q[:, :, None], k[:, :, None], v[:, :, None], Rule(seen.before, seen.after), scale=1.0)[:, :, 0]
        y = unpack(self.out(u * o), packed.place)
        return y, self.carry(k, v, seen.next, packed) if self.causal else None

    def scale(self, n: Tensor) -> Tensor:
        """Returns the factor of a query that sees n tokens."""
        if self.attention == "relu2":
            return (n * self.d_key).rsqrt()  # relu² squares it
        return n.clamp(min=16).log() / (math.log(512) * math.sqrt(self.d_key))

    def carry(self, k: Tensor, v: Tensor, length: Tensor, packed: Packed) -> GAUState:
        """Returns the next state."""
        if packed.reset is not None or packed.lengths is not None:
            behind = None if packed.lengths is None else packed.x.shape[1] - packed.lengths
            k, v = (latest(u, behind, u.shape[1], length) for u in (k, v))
        return GAUState(k, v, length)


def scaled(q: Tensor, factor: Tensor) -> Tensor:
    """Returns q (B, T, s) times a factor (1 or B, T) for each token, in the dtype of q."""
    return (q * factor[..., None]).to(q.dtype)


def relu2_attention(q: Tensor, k: Tensor, v: Tensor, seen: Sight) -> Tensor:
    """Maps scaled queries q (B, T, s) and the columns k, v (B, S + T, ·) to relu²(Q K^T) V (B, T, e)."""
    T, past = q.shape[1], k.shape[1] - q.shape[1]
    again = torch.is_grad_enabled() and T > LONG
    blocks = []
    for a in range(0, T, QUERIES):
        b = min(a + QUERIES, T)
        end = past + (b if seen.after is None else T)
        before, after = seen.before[:, a:b, None], None if seen.after is None else seen.after[:, a:b, None]
        run = functools.partial(_relu2_block, before=before, after=after, first=past + a)
        block = q[:, a:b], k[:, :end], v[:, :end]
        blocks.append(recomputed(run, *block, preserve_rng_state=False) if again else run(*block))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)


def _relu2_block(q: Tensor, k: Tensor, v: Tensor, *, before: Tensor, after: Tensor | None, first: int) -> Tensor:
    """Of the queries q (B, C, s) that stand in columns `first` and behind, before and after (1 or B, C, 1)."""
    column = first + torch.arange(q.shape[1], device=q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device)
    visible = (key >= column - before) & (key <= (column if after is None else column + after))  # (1 or B, C, columns)
    return F.relu(torch.where(visible, q @ k.mT, 0)).square() @ v
