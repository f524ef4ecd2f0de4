"""Nyströmformer's attention (Xiong et al. 2021, arXiv:2102.03902, equations 13 to 16): softmax attention of low rank.

    o = F Z B V + conv(V)                         F = softmax(Q K̃^T / √K), A = softmax(Q̃ K̃^T / √K),
    y = W_o o                                     B = softmax(Q̃ K^T / √K), Z ≈ A^+
    Z_0 = A^T / (|A|_1 |A|_∞),  Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,  six times

Q̃ and K̃ are landmarks, the means of the queries and keys of m segments of the document; conv is a filter along time
for each head. A landmark sees its whole segment: there is no causal form.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, positive_int
from linrnn.layers.heads import count_heads, merge_heads, split_heads, white_
from linrnn.layers.local_attention import Packed, in_sight, pack, sight, unpack
from linrnn.layers.short_conv import centred_conv, odd_width
from linrnn.ops._inputs import full_precision


class Segments(NamedTuple):
    """member (1 or B, M, T) bool: which tokens are in the segment of each landmark. The others: who sees whom, or None.

    reads (B, 1, T, M): tokens and landmarks; same (B, 1, M, M): landmarks; writes (B, 1, M, T): landmarks and tokens.
    All within documents; but a landmark without a token, and a padded token, see something too: no row is empty.
    """

    member: Tensor
    reads: Tensor | None = None
    same: Tensor | None = None
    writes: Tensor | None = None


class Nystrom(RecurrentLayer):
    """Attention through m landmarks, in time linear in T: every token sees its whole document.

    Segments divide the real tokens of each document as evenly as they can, and a document of m tokens or fewer has one
    landmark for each: then it is softmax attention, as near as Z is to the inverse. Rows of packed documents cost what
    as many landmarks cost as their documents have together; under torch.compile, which cannot count, as many as tokens.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        n_landmarks: number m of landmarks of a document.
        n_iterations: of Z.
        conv_width: of the filters, odd; None for no conv(V).
        causal: False; landmarks look ahead.
        bidirectional: True, for the same reason.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_landmarks: int = 64,
        n_iterations: int = 6,
        conv_width: int | None = 33,
        causal: bool = False,
        bidirectional: bool = True,
    ):
        super().__init__(d_model, causal=False)
        if causal or not bidirectional:
            raise ValueError(
                "causal, bidirectional: expected False and True, got "
                f"{causal} and {bidirectional}: a landmark is a mean over tokens before and after a query"
            )
        self.n_heads = count_heads(d_model, n_heads)
        self.n_landmarks = positive_int("n_landmarks", n_landmarks)
        self.n_iterations = positive_int("n_iterations", n_iterations)
        if conv_width is not None:
            odd_width("conv_width", conv_width)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.conv = None if conv_width is None else nn.Parameter(torch.empty(self.n_heads, conv_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """White x gives white q, k, v; filters are uniform in ±W^-0.5, as those of torch.nn.Conv2d."""
        white_(self.qkv, self.out)
        if self.conv is not None:
            bound = self.conv.shape[1] ** -0.5
            nn.init.uniform_(self.conv, -bound, bound)

    def state_spec(self) -> StateSpec:
        return {}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Maps x (B, T, D) to y (B, T, D), and None: a layer that looks ahead has no state."""
        self.check_inputs(x, state, reset, mask)
        if x.numel() == 0:
            return x, None
        packed = pack(x, reset, mask)
        qkv = self.qkv(packed.x)
        with full_precision(x.device.type):
            wide = qkv.to(accumulation_dtype(qkv.dtype))  # what Z magnifies
            q, k, v = (split_heads(t, self.n_heads) for t in wide.chunk(3, -1))  # (B, T, H, K)
            o = merge_heads(self.attend(q, k, v, packed))
            if self.conv is not None:
                o = o + self.filtered(merge_heads(v), self.conv, packed.reset)
        return unpack(self.out(o.to(qkv.dtype)), packed.place), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: Packed) -> Tensor:
        """Maps q, k, v (B, T, H, K) to F Z B V (B, T, H, K)."""
        member, reads, same, writes = self.segments(packed)
        mean = member.to(q.dtype) / member.sum(-1, keepdim=True).clamp(min=1)  # (1 or B, M, T)
        landmarks = (mean @ torch.cat((q, k), 2).flatten(2)).unflatten(-1, (-1, q.shape[-1])).transpose(1, 2)
        q_m, k_m = landmarks.chunk(2, 1)  # (B, H, M, K)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, K)
        A = q_m @ k_m.mT * q.shape[-1] ** -0.5
        A = (A if same is None else A.masked_fill(~same, -torch.inf)).softmax(-1)
        Z = pseudo_inverse(A, same, self.n_iterations)
        written = F.scaled_dot_product_attention(q_m, k, v, attn_mask=writes)  # B V
        return F.scaled_dot_product_attention(q, k_m, Z @ written, attn_mask=reads).transpose(1, 2)

    def segments(self, packed: Packed) -> Segments:
        """Divides each document into segments."""
        T, m = packed.x.shape[1], self.n_landmarks
        seen = sight(packed, None, None, causal=False)
        n = in_sight(seen)
        m_n = n.clamp(max=m)
        slot, M = seen.before * m_n // n, min(m, T)  # the segment of each token, in its document, (1 or B, T)
        if packed.reset is not None:
            first = (seen.before == 0) | (slot != (seen.before - 1) * m_n // n)
            first = first if packed.real is None else first & packed.real
            slot, M = first.cumsum(1) - 1, T  # in its row
            if not torch.compiler.is_compiling():
                M = max(1, int(first.sum(1).max()))
        member = slot[:, None] == torch.arange(M, device=slot.device)[:, None]  # (1 or B, M, T)
        if packed.reset is None and packed.real is None:
            return Segments(member)
        document = torch.zeros_like(slot) if packed.reset is None else packed.reset.cumsum(1)
        if packed.real is not None:
            member = member & packed.real[:, None]
            document = document.masked_fill(~packed.real, -1)
        owner = torch.where(member, document[:, None], -1).amax(-1)  # (B, M)
        shared = document[:, None, :, None] == owner[:, None, None]  # (B, 1, T, M)
        same = (owner[:, None, :, None] == owner[:, None, None]) & (owner >= 0)[:, None, None]
        return Segments(
            member,
            reads=shared | (document < 0)[:, None, :, None],
            same=same | torch.eye(M, dtype=torch.bool, device=slot.device),
            writes=shared.mT | (owner < 0)[:, None, :, None],
        )

    def filtered(self, v: Tensor, conv: Tensor, reset: Tensor | None) -> Tensor:
        """Maps v (B, T, D) to its convolution with the filters conv (H, W) of the heads, within documents."""
        conv = conv.to(v.dtype).repeat_interleave(self.d_model // self.n_heads, 0)  # (D, W)
        return centred_conv(v, conv, reset=reset)


def pseudo_inverse(A: Tensor, same: Tensor | None, n_iterations: int) -> Tensor:
    """Returns Z ≈ A^+ for A (B, H, M, M), rows of which sum to one, by third-order iterations (equations 11 and 16).

    A is made of a block for each document where `same` (B, 1, M, M) is True, and |A|_1 is that of the block.
    """
    columns = A.sum(-2, keepdim=True)  # (B, H, 1, M)
    norm = columns if same is None else columns.masked_fill(~same, 0)
    Z = A.mT / norm.amax(-1, keepdim=True)
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for _ in range(n_iterations):
        AZ = A @ Z
        Z = 0.25 * Z @ (13 * identity - AZ @ (15 * identity - AZ @ (7 * identity - AZ)))
    return Z
