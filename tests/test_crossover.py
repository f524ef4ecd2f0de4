"""linrnn.crossover: the thresholds of kexue.fm 8610, for H heads of width d, D = H d; the first length of all."""

import pytest
from torch import nn

import linrnn
from linrnn import layers
from linrnn.models import SequenceBackbone


def feed_forward(d_model: int) -> nn.Module:
    return nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))


@pytest.mark.parametrize(("d", "H"), [(64, 12), (64, 4), (16, 4)])
def test_the_three_thresholds(d, H):
    D = H * d
    attention, ffn = layers.build("attention", D, n_heads=H, positions=None), feed_forward(D)
    assert linrnn.flops(attention, 1000) == 4 * 1000 * D**2 + 2 * 1000**2 * D
    assert linrnn.flops(ffn, 1000) == 8 * 1000 * D**2
    # attention costs more than the feed-forward network iff T > 2 D
    assert linrnn.crossover(attention, ffn) == 2 * D + 1
    assert linrnn.flops(attention, 2 * D) == linrnn.flops(ffn, 2 * D)
    # the quadratic term is more than all that is linear, 12 T D², iff T > 6 D
    linear = nn.Sequential(*(nn.Linear(D, D, bias=False) for _ in range(4)), ffn)
    block = nn.Sequential(attention, ffn)
    assert linrnn.crossover(block, nn.Sequential(linear, linear)) == 6 * D + 1
    # linear attention with heads four times as wide does less than T² D of products iff T > 16 d
    wide = layers.build("linear_attention", 4 * D, n_heads=H, feature_map="identity")
    assert linrnn.crossover(attention, wide, part="recurrence") == 16 * d + 1
    # the normaliser of the default feature map is worth two tokens
    default = layers.build("linear_attention", 4 * D, n_heads=H)
    assert linrnn.crossover(attention, default, part="recurrence") == 16 * d + 3
    # with wide keys alone iff T > 4 d, and as it is iff T > d
    for K in (4 * d, d):
        linear_attention = layers.build("linear_attention", D, n_heads=H, d_key=K, feature_map="identity")
        assert linrnn.crossover(attention, linear_attention, part="recurrence") == K + 1


def test_the_gated_network_has_the_threshold_too():
    """SwiGLU of 8/3 D has the 8 D² of a network of two matrices and 4 D."""
    backbone = SequenceBackbone("attention", 768, 1, ffn_expand=8 / 3)
    assert linrnn.crossover(backbone.mixers[0], backbone.blocks[0].ffn) == 2 * 768 + 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (("attention", {}), ("lru", {})),
        (("attention", {"window": 9}), ("linear_attention", {})),
        (("linear_attention", {}), ("attention", {})),
        (("attention", {}), ("attention", {"window": 40})),
        (("attention", {"window": 40, "sink": 2}), ("attention", {})),
        (("mega", {"chunk_size": 50}), ("attention", {})),
        (("attention", {}), ("mega", {"chunk_size": 50})),
        (("attention", {}), ("mega", {"chunk_size": None, "d_key": 64, "d_value": 128})),
        (("attention", {"window": 30}), ("mega", {"chunk_size": 60, "d_key": 16, "d_value": 16})),
        (("s4d", {}), ("attention", {})),
        (("attention", {}), ("nystrom", {"n_landmarks": 20})),
        (("nystrom", {"n_landmarks": 300}), ("attention", {})),
        (("lru", {}), ("nystrom", {"n_landmarks": 300})),
    ],
)
def test_crossover_is_the_first_of_all_lengths(a, b):
    """Also where the difference of the costs rises and falls."""
    a, b = layers.build(a[0], 64, **a[1]), layers.build(b[0], 64, **b[1])
    for part in (None, "recurrence"):
        more = (T for T in range(1, 701) if linrnn.flops(a, T, part=part) > linrnn.flops(b, T, part=part))
        assert linrnn.crossover(a, b, part=part, limit=700) == next(more, None)


class Polynomial(nn.Module):
    """A module of one's own, which says what it costs."""

    def __init__(self, *coefficients: int):
        super().__init__()
        self.coefficients = coefficients

    def multiplications(self, T: int) -> tuple[int, int]:
        return sum(c * T**i for i, c in enumerate(self.coefficients)), 0


@pytest.mark.parametrize(
    "coefficients",
    [
        *((0,), (1,), (-5, 2), (-6, 2), (5, -1), (-1, 1), (0, -1)),
        *((-91, 20, -1), (-92, 20, -1), (-99, 20, -1), (-100, 20, -1), (-101, 20, -1)),
        *((-60, 47, -12, 1), (-61, 47, -12, 1), (-63, 47, -12, 1), (-9000, 3000, -100, 1), (100, -300, 60, -1)),
        *((-10000, 0, 1), (-10000, 1, 1), (-9999, -200, 3), (0, -50, 1), (-(10**12), 0, 1)),
    ],
)
def test_crossover_of_polynomials(coefficients):
    a, nothing = Polynomial(*coefficients), Polynomial(0)
    for limit in (1, 2, 3, 4, 5, 6, 7, 10, 100, 1000):
        first = next((T for T in range(1, limit + 1) if linrnn.flops(a, T) > 0), None)
        assert linrnn.crossover(a, nothing, limit=limit) == first
    if coefficients == (-(10**12), 0, 1):
        assert linrnn.crossover(a, nothing) == 10**6 + 1
        assert linrnn.crossover(a, nothing, limit=10**6) is None


def test_errors():
    layer = layers.build("lru", 16)
    for call, message in {
        lambda: linrnn.crossover(layer, layer, part="scan"): "part: expected",
        lambda: linrnn.crossover(layer, layer, limit=0): "limit: expected an integer >= 1, got 0",
        lambda: linrnn.crossover(Polynomial(-100, 0, 0, 0, 1), layer): "polynomial of degree 3 or less from T = 1 to",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
