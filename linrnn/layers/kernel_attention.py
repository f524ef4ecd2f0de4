"""Attention by feature maps, from q, k and v: causal with a state, and over whole documents.

`features` are q and k (B, T, H, F) under a `FeatureMap`, for S; `below` those for the denominator's z, if they differ.
`scale` is of q, where there is no denominator.
"""

from typing import NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype
from linrnn.layers.feature_maps import FeatureMap
from linrnn.ops import NormalizedState, diagonal_scan, linear_attention
from linrnn.ops._inputs import full_precision
from linrnn.ops._running_max import mark_flags, nothing, running_max

# S (B, H, F, V), z (B, H, F) and m (B, H, F), of which z and m may be missing
Sums: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]


class Features(NamedTuple):
    """Features of queries and keys, (B, T, H, F) each; their logarithms if the map says so."""

    q: Tensor
    k: Tensor


class Flags(TypedDict):
    reset: Tensor | None
    mask: Tensor | None


def causal(
    kind: FeatureMap,
    features: Features,
    v: Tensor,
    state: Sums | None = None,
    *,
    below: Features | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Sums]:
    """Maps features, v (B, T, H, V) and a state (S, z, m) to o (B, T, H, V) and the next state."""
    S, z, m = (None, None, None) if state is None else state
    (q, k), flags = features, Flags(reset=reset, mask=mask)
    if not kind.normalize:
        o, S = linear_attention(q, k, v, S, scale=scale, **flags)
        return o, (S, None, None)
    if below is not None:
        wide = accumulation_dtype(v.dtype)  # of sums over time, that half precision does not hold
        (q, k, below_q, below_k), v = (x.to(wide) for x in (*features, *below)), v.to(wide)
        o, S = linear_attention(q, k, v, S, scale=1.0, **flags)
        ones, column = torch.ones_like(v[..., :1]), None if z is None else z[..., None]
        divisor, column = linear_attention(below_q, below_k, ones, column, scale=1.0, **flags)
        return divide(o, divisor + kind.eps), (S, column[..., 0], None)
    if kind.each:
        q = q.log_softmax(-1) - running_logsumexp(k, z, m, reset, mask)
    given = None if S is None or z is None else NormalizedState(S, z, m)
    o, final = linear_attention(q, k, v, given, normalize=True, log_features=kind.logs, eps=kind.eps, **flags)
    return o, (final.S, final.z, final.m)


def running_logsumexp(
    k: Tensor, z: Tensor | None, m: Tensor | None, reset: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Returns log sum_{j <= t} exp(k_j) for k (B, T, H, F), from a sum z exp(m) before, z and m (B, H, F)."""
    k = k.to(accumulation_dtype(k.dtype))
    if z is None or m is None:
        z = k.new_zeros(k.shape[:1] + k.shape[2:])
        m = torch.full_like(z, nothing(z.dtype))
    z = z * (m - m.detach()).exp()  # the units are constants to autograd
    exponent, forget = mark_flags(k, None, reset, mask)
    unit, change = running_max(exponent, forget, m)
    sums, _ = diagonal_scan(change.exp().flatten(2), (exponent - unit).exp().flatten(2), z.flatten(1))
    sums = sums.view(k.shape)
    return unit + torch.where(sums == 0, 1, sums).log()


def noncausal(
    kind: FeatureMap,
    features: Features,
    v: Tensor,
    *,
    below: Features | None = None,
    scale: float = 1.0,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Maps features and v (B, T, H, V) to o (B, T, H, V): every token reads the sums over its whole document."""
    if v.shape[1] == 0:
        return v
    if reset is not None:
        return read_after_writing(kind, features, v, below, scale, reset, mask)
    wide = accumulation_dtype(v.dtype)
    (q, k), (below_q, below_k) = ([x.to(wide) for x in pair] for pair in (features, below or features))
    values = v.to(wide)
    real = torch.ones_like(values[..., :1]) if mask is None else mask[..., None, None].to(wide)  # (B, T, H or 1, 1)
    with full_precision(v.device.type):
        if kind.logs:
            k = torch.where(real == 0, nothing(wide), k)
            if kind.each:
                q = q.log_softmax(-1) - k.logsumexp(1, keepdim=True)
            unit = k.detach().amax(1, keepdim=True)
            level = q + unit
            q, k = (level - level.detach().amax(-1, keepdim=True)).exp(), (k - unit).exp()
            below_q, below_k = q, k
        S = torch.einsum("bthf,bthv->bhfv", k, values * real)
        o = torch.einsum("bthf,bhfv->bthv", q if kind.normalize else q * scale, S)
        if kind.normalize:
            z = (below_k * real).sum(1)  # (B, H, F)
            o = divide(o, torch.einsum("bthf,bhf->bth", below_q, z)[..., None] + kind.eps)
    return o.to(v.dtype)


def read_after_writing(
    kind: FeatureMap,
    features: Features,
    v: Tensor,
    below: Features | None,
    scale: float,
    reset: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Whole documents packed in rows, by the causal form of twice the length: all keys of a document, then its queries.

    A token at t of a document from `start` to `end` writes at start + t and reads at end + t.
    """
    B, T = reset.shape
    t = torch.arange(T, device=v.device)
    start = torch.where(reset, t, 0).cummax(1).values
    following = torch.cat((torch.where(reset, t, T)[:, 1:], reset.new_full((B, 1), T, dtype=torch.int64)), 1)
    end = following.flip(1).cummin(1).values.flip(1)
    writes, reads = t + start, t + end  # (B, T): together a permutation of 2 T places
    token = torch.zeros(B, 2 * T, dtype=torch.int64, device=v.device)
    token = token.scatter(1, writes, t.expand(B, T)).scatter(1, reads, t.expand(B, T))
    writing = torch.zeros(B, 2 * T, dtype=torch.bool, device=v.device).scatter(1, writes, torch.ones_like(reset))

    def spread(x: Tensor) -> Tensor:
        return x.gather(1, token[..., None, None].expand(B, 2 * T, *x.shape[2:]))

    def pair(features: Features) -> Features:
        k = torch.where(writing[..., None, None], spread(features.k), -torch.inf if kind.logs else 0)
        return Features(spread(features.q), k)

    o, _ = causal(
        kind,
        pair(features),
        spread(v),
        below=None if below is None else pair(below),
        scale=scale,
        reset=reset.gather(1, token) & writing,
        mask=None if mask is None else mask.gather(1, token),
    )
    return o.gather(1, reads[..., None, None].expand(v.shape))


def divide(o: Tensor, divisor: Tensor) -> Tensor:
    """o / divisor, and o where that is zero: before the first real token both are."""
    return o / torch.where(divisor == 0, 1, divisor)
