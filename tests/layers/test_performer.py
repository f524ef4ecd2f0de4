"""Performer's random features against what they estimate; the common properties are in test_contract.py."""

import math

import pytest
import torch
from torch import Tensor

from linrnn.layers import Performer
from linrnn.layers.feature_maps import favor, orthogonal_features

K = 4


def some_pair() -> Tensor:
    return torch.tensor([[0.5, -0.3, 0.4, 0.1], [0.2, 0.6, 0.3, -0.4]], dtype=torch.float64)


def estimates(draws: list[Tensor], q: Tensor, k: Tensor) -> Tensor:
    """φ(q) · φ(k) for every draw of ω, all of one size."""
    n = len(draws[0])
    # the features of all draws at once, of which each has its own 1 / √n
    both = favor(torch.stack((q, k)), torch.cat(draws)).exp() * len(draws) ** 0.5
    return both.prod(0).view(-1, n).sum(1)


def test_estimates_are_unbiased() -> None:
    q, k = some_pair()
    estimate = estimates([orthogonal_features(K, K) for _ in range(10_000)], q, k)
    error = (estimate.mean() - (q @ k).exp()).abs()
    assert error < 4 * estimate.std() / len(estimate) ** 0.5


def test_orthogonal_matrices_are_uniform() -> None:
    # no entry of a uniform one has a sign; those of a raw QR decomposition do
    draws = torch.stack([orthogonal_features(K, K) for _ in range(10_000)])
    assert draws.mean(0).abs().max() < 5 / 10_000**0.5
    torch.testing.assert_close(draws.square().mean(0), torch.ones(K, K, dtype=draws.dtype), rtol=0, atol=0.08)


def test_orthogonal_features_have_less_variance_than_independent_ones() -> None:
    K = 8
    q = k = torch.full((K,), 0.5 / K**0.5, dtype=torch.float64)  # of small norm: the variance itself is estimated
    orthogonal = estimates([orthogonal_features(K, K) for _ in range(10_000)], q, k)
    independent = estimates([torch.randn(K, K, dtype=torch.float64) for _ in range(10_000)], q, k)
    assert orthogonal.var() < 0.9 * independent.var()


@pytest.mark.parametrize("n_features", [1, 4, 16, 18])
def test_blocks_of_features_are_orthogonal(n_features: int) -> None:
    ω = orthogonal_features(n_features, K)
    assert ω.shape == (n_features, K)
    for block in ω.split(K):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag())
    if n_features > K:
        assert (ω[:K] @ ω[K : 2 * K].T).abs().min() > 1e-6


@pytest.mark.parametrize("bidirectional", [False, True])
def test_tends_to_softmax_attention(bidirectional: bool) -> None:
    D, T = 16, 20
    layer = Performer(D, n_heads=2, n_features=20_000, bidirectional=bidirectional).double()
    x = 0.5 * torch.randn(2, T, D, dtype=torch.float64)
    qs, ks, vs = (s.unflatten(-1, (2, 8)).transpose(1, 2) for s in layer.qkv(x).split(D, -1))
    o = torch.nn.functional.scaled_dot_product_attention(qs, ks, vs, is_causal=not bidirectional)
    expected = layer.out(o.transpose(1, 2).flatten(2))
    errors = []
    for n_features in (200, 20_000):
        layer.omega = orthogonal_features(n_features, 8)
        errors.append(((layer(x)[0] - expected).norm() / expected.norm()).item())
    assert errors[1] < 0.02
    assert 3 < errors[0] / errors[1] < 30  # falls as the root of the number of features, which is 10


def test_features_are_part_of_the_state_dict_and_stay() -> None:
    layer, x = Performer(16), torch.randn(2, 5, 16)
    assert layer.omega.shape == (16, 4)
    assert "omega" in layer.state_dict()
    assert "omega" not in dict(layer.named_parameters())
    y = layer.train()(x)[0]
    assert torch.equal(layer.eval()(x)[0], y)
    before = layer.omega.clone()
    layer.redraw()
    assert not torch.equal(layer.omega, before)
    assert not torch.allclose(layer(x)[0], y)


def test_redraw_from_a_generator() -> None:
    layer, other = Performer(16), Performer(16)
    for each in (layer, other):
        each.redraw(generator=torch.Generator().manual_seed(7))
    assert torch.equal(layer.omega, other.omega)


def test_exponents_of_any_size() -> None:
    layer = Performer(16)
    y, state = layer(200 * torch.randn(2, 50, 16))
    y.sum().backward()
    assert y.isfinite().all()
    assert state.m.abs().max() > math.log(torch.finfo(torch.float32).max)
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_bad_number_of_features() -> None:
    with pytest.raises(ValueError, match="n_features: expected an integer >= 1, got 0"):
        Performer(16, n_features=0)


def test_built_on_another_device() -> None:
    with torch.device("meta"):
        layer = Performer(16)
    assert layer.omega.is_meta
    assert Performer(16).to(torch.bfloat16).omega.dtype == torch.bfloat16
