"""FLASH, mixed chunk attention (Hua et al. 2022, arXiv:2202.10447, section 3): quadratic in chunks, linear across them.

    O = (U ⊙ (o_quad + o_lin)) W_o                       U, V, Z and the rotary maps of Z as in `gau`, but four maps
    o_quad = relu²(Q K^T / √s) V / n                     within a chunk of c tokens; n of them are in sight
    o_lin,t = q'_t^T sum_{j in chunks before} k'_j v_j^T / ((g - 1) c)        causal, in the g-th chunk; 0 in the first
    o_lin,t = q'_t^T sum_j k'_j v_j^T / n                bidirectional: over all n tokens of the document

Each sum is divided by how many tokens are in it, so that neither what comes later nor padding changes an output. Up to
c tokens the causal layer is `gau`. Chunks begin with the document.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers.base import State, StateSpec, accumulation_dtype, positive_int
from linrnn.layers.feature_maps import FEATURE_MAPS
from linrnn.layers.gau import GatedUnit, scaled
from linrnn.layers.kernel_attention import Features, noncausal
from linrnn.layers.local_attention import Packed, Sight, in_sight, latest, pack, sight, unpack, windows
from linrnn.ops._chunks import carry
from linrnn.ops._inputs import full_precision


class FLASHState(NamedTuple):
    """Of the open document, float32; float64 for a float64 layer.

    S (B, 2, s, e): the sums k' v^T over its whole chunks, and over the open one. k (B, c - 1, s), turned keys, and v
    (B, c - 1, e), values: the last `length` are those of the open chunk, oldest first, the others are zero. length (B,)
    and chunks (B,): how many tokens are in the open chunk, and how many chunks are before it.
    """

    S: Tensor
    k: Tensor
    v: Tensor
    length: Tensor
    chunks: Tensor


class FLASH(GatedUnit):
    """Gated attention in time linear in T, with a state of constant size.

    Of the two sums in the state the one over the open chunk joins the other when the chunk is full: a token adds one
    product k' v^T, whatever c.

    Args:
        d_model: width D of input and output.
        d_value: width e of U and V; 2 D if None.
        d_key: width s of Z, queries and keys; if None 128, at small D the even number at D / 4, at least 16.
        chunk_size: number c of tokens in a chunk.
        rope_base: base of the rotary angles; None for no positions at all.
        bidirectional: every token sees its whole document; such a layer cannot step.
    """

    state_type = FLASHState

    def __init__(
        self,
        d_model: int,
        *,
        d_value: int | None = None,
        d_key: int | None = None,
        chunk_size: int = 256,
        rope_base: float | None = 10000.0,
        bidirectional: bool = False,
    ):
        super().__init__(
            d_model, n_maps=4, d_value=d_value, d_key=d_key, rope_base=rope_base, bidirectional=bidirectional
        )
        self.chunk_size = positive_int("chunk_size", chunk_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in `gau`; κ = s^(-1/4) for q' and k', so that their products begin as those of q and k do, q · k / √s."""
        super().reset_parameters()
        with torch.no_grad():
            self.kappa[2:] = self.d_key**-0.25

    def state_spec(self) -> StateSpec:
        wide = accumulation_dtype(self.kappa.dtype)
        s, e, chunk = self.d_key, self.d_value, self.chunk_size - 1
        shapes = {"S": (2, s, e), "k": (chunk, s), "v": (chunk, e), "length": (), "chunks": ()}
        return {field: (shape, wide) for field, shape in shapes.items()}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        if x.shape[1] == 0:
            return x, self.unchanged(state, x.shape[0]) if self.causal else None
        C, wide, packed = self.chunk_size, accumulation_dtype(self.kappa.dtype), pack(x, reset, mask)
        start = None if state is None else (state.chunks.round() * C + state.length.round()).long()
        seen = sight(packed, start, None, self.causal)  # of the document
        own = seen.before % C
        chunk = Sight(own, None if seen.after is None else seen.after.minimum(C - 1 - own), seen.next % C)
        u, v, maps = self.project(packed.x, seen.before)
        q, k, q_lin, k_lin = maps.unbind(-2)  # (B, T, s) each
        q = scaled(q, (in_sight(chunk) * self.d_key).to(wide).rsqrt())  # relu² squares it
        n = (seen.before - own).clamp(min=1) if self.causal else in_sight(seen)
        q_lin = scaled(q_lin.to(wide), n.to(wide).reciprocal())  # float16 has no 1 / n

        past = self.columns_before(state, packed)
        if not self.causal:
            o = self.near(q, k, v, None, seen, chunk, past)
            features = Features(q_lin[:, :, None], k_lin[:, :, None])  # of one head
            o_lin = noncausal(FEATURE_MAPS["identity"], features, v[:, :, None], reset=packed.reset, mask=packed.real)
            return unpack(self.out(u * (o + o_lin[:, :, 0].to(o.dtype))), packed.place), None
        with full_precision(x.device.type):
            far, S = self.far(q_lin, k_lin.to(wide), v.to(wide), seen, packed, int(past == C))
            if state is not None:
                read, stays = self.past(q_lin, state, seen, packed)
                far, S = far + read, S + stays
        if state is not None:  # the dtype of the activations is autocast's
            k, v = torch.cat((state.k.to(k.dtype), k), 1), torch.cat((state.v.to(v.dtype), v), 1)  # (B, c - 1 + T, ·)
        o = self.near(q, k, v, (q_lin.to(q.dtype), k_lin), seen, chunk, past) + far.to(v.dtype)
        behind = None if packed.lengths is None else x.shape[1] - packed.lengths
        k, v = (latest(t, behind, C - 1, chunk.next).to(wide) for t in (k, v))
        y = unpack(self.out(u * o), packed.place)
        return y, FLASHState(S, k, v, chunk.next.to(wide), (seen.next // C).to(wide))

    def columns_before(self, state: State, packed: Packed) -> int:
        """Returns how many columns before a block of min(T, c) queries may hold tokens of its chunks.

        None if the chunks are the blocks: where none begins in the state or at a reset.
        """
        C = self.chunk_size
        if (state is None or C == 1) and packed.reset is None:
            return 0
        if packed.x.shape[1] > C:
            return C
        return 0 if state is None else C - 1

    def near(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        linear: tuple[Tensor, Tensor] | None,
        seen: Sight,
        chunk: Sight,
        past: int,
    ) -> Tensor:
        """Maps scaled queries q (B, T, s) and the columns k, v (B, S + T, ·) to o_quad (B, T, e).

        And what o_lin takes from the `past` columns before a block, where linear = (q', k') of the T tokens is given.
        """
        T, L = q.shape[1], min(q.shape[1], self.chunk_size)
        future = 0 if chunk.after is None else past
        distance = past + torch.arange(L, device=q.device)[:, None] - torch.arange(past + L + future, device=q.device)
        own = blocks(chunk.before, L)[..., None]  # (1 or B, G, L, 1)

        def around(t: Tensor) -> Tensor:
            """The columns (B, S + T, ·) that the G blocks see, (B, G, W, ·)."""
            before, behind = past + T - t.shape[1], -T % L + future
            t = F.pad(t, (0, 0, before, behind)) if before or behind else t
            return windows(t, past, L, future)

        after = torch.zeros_like(own) if chunk.after is None else blocks(chunk.after, L)[..., None]
        visible = (distance <= own) & (distance >= -after)  # (1 or B, G, L, W)
        weights = F.relu(torch.where(visible, blocks(q, L) @ around(k).mT, 0)).square()
        if linear is not None and past and T > 1:
            earlier = (distance > own) & (distance <= blocks(seen.before, L)[..., None])
            weights = weights + torch.where(earlier, blocks(linear[0], L) @ around(linear[1]).mT, 0)
        return (weights @ around(v)).flatten(1, 2)[:, :T]

    def far(self, q: Tensor, k: Tensor, v: Tensor, seen: Sight, packed: Packed, shift: int) -> tuple[Tensor, Tensor]:
        """Maps q', k' (B, T, s) and v (B, T, e) to o_lin (B, T, e) and S (B, 2, s, e), of tokens of this call alone.

        A query reads what is before its block, or with shift = 1 before the one before that: `near` has the rest.
        """
        T, C, L = q.shape[1], self.chunk_size, min(q.shape[1], self.chunk_size)
        end = T if packed.lengths is None else packed.lengths[:, None]
        column, length = torch.arange(T, device=v.device), seen.next % C
        writes = blocks(column < end - length[:, None], L)  # (B, G, L): tokens of whole chunks
        document = last = total = None
        if packed.reset is not None:
            document = blocks(packed.reset, L).flatten(1).cumsum(1).view(writes.shape)
            last = document[..., -1:]  # of each block, (B, G, 1)
            writes = writes & (document == last)
        if T == L:
            opened = column >= end - length[:, None]  # and padded ones, whose v is zero
            k = k[:, :, None] * torch.stack((writes[:, 0], opened), -1)[..., None]  # (B, T, 2, s)
            return torch.zeros_like(v), (k.flatten(2).mT @ v).unflatten(1, (2, -1))
        q, k_blocks, values = (blocks(t, L) for t in (q, k, v))  # (B, G, L, ·)
        if document is not None and last is not None:
            before = F.pad(last, (0, 0, 1 + shift, 0))[:, : -1 - shift]  # where the sums that a block reads end
            q = q * (document == before)[..., None]
            total = (last == F.pad(last, (0, 0, 1, 0))[:, :-1]).to(v.dtype).movedim(1, 0)[..., None]  # (G, B, 1, 1)
        update = (k_blocks * writes[..., None]).mT @ values  # (B, G, s, e)
        sums, closed = carry(total, update.movedim(1, 0)[:, :, None], None)
        assert sums is not None
        read = q[:, 1 + shift :] @ sums[1 : len(sums) - shift, :, 0].movedim(0, 1)  # (B, G - 1 - shift, L, e)
        o = F.pad(read.flatten(1, 2), (0, 0, (1 + shift) * L, 0))[:, :T]
        behind = None if packed.lengths is None else T - packed.lengths
        length = length.clamp(max=T) if packed.lengths is None else length.minimum(packed.lengths)
        k, v = (latest(t, behind, C - 1, length) for t in (k, v))
        return o, torch.cat((closed, (k.mT @ v)[:, None]), 1)

    def past(self, q: Tensor, state: FLASHState, seen: Sight, packed: Packed) -> tuple[Tensor, Tensor]:
        """Maps q' (B, T, s) to what o_lin (B, T, e) reads of the state, and what stays of it, S (B, 2, s, e)."""
        C, chunks = self.chunk_size, state.chunks.round()[:, None]
        q = q[:, :, None] * torch.stack((torch.ones_like(q[..., 0]), seen.before // C > chunks), -1)[..., None]
        full = (seen.next[:, None] // C > chunks).to(q.dtype)  # (B, 1): then the second sum joins the first
        keeps = torch.cat((torch.ones_like(full), full, torch.zeros_like(full), 1 - full), 1).view(-1, 2, 2)
        if packed.reset is not None:
            first = packed.reset.cumsum(1) == 0  # (B, T): tokens of the carried document
            q, keeps = q * first[..., None, None], keeps * first[:, -1, None, None]
        return q.flatten(2) @ state.S.flatten(1, 2), (keeps @ state.S.flatten(2)).view_as(state.S)

    def unchanged(self, state: State, batch_size: int) -> FLASHState:
        """Returns the state after no tokens: `state`, without a gradient for what it does not hold."""
        state = self.init_state(batch_size) if state is None else state
        k, v = (latest(t, None, t.shape[1], state.length) for t in (state.k, state.v))
        return state._replace(k=k, v=v, length=state.length.detach(), chunks=state.chunks.detach())


def blocks(x: Tensor, length: int) -> Tensor:
    """Cuts x (B, T, ...) into G blocks of `length`, (B, G, length, ...), filled up with zeros."""
    missing = -x.shape[1] % length
    if missing:
        x = F.pad(x, (*(0 for _ in range(2 * (x.ndim - 2))), 0, missing))
    return x.unflatten(1, (-1, length))
