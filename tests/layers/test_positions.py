"""Positions as values: their special cases, how configurations write them, what they refuse."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import Attention, build
from linrnn.layers.attention_scale import LogN, query_factor
from linrnn.layers.positions import NTK, ALiBi, Interpolation, NoPE, Positions, ReRoPE, RoPE, YaRN, as_positions


def θ(positions: RoPE, n: int = 64) -> Tensor:
    return positions.frequencies(n, torch.float64, "cpu")


PLAIN = θ(RoPE())


@pytest.mark.parametrize("scaling", [Interpolation(8), NTK(8, "aware"), NTK(8, "fixed"), NTK(8), NTK(8, exponent=0.3)])
def test_lowest_frequency_is_divided_by_the_factor(scaling: Any) -> None:
    ratio = θ(RoPE(scaling=scaling)) / PLAIN
    assert ratio[-1].item() == pytest.approx(1 / 8, rel=1e-12)
    assert (ratio.diff() <= 1e-15).all()  # the lower a frequency, the more it is interpolated
    if isinstance(scaling, NTK):
        assert ratio[0] > 0.45


@pytest.mark.parametrize(
    "scaling", [Interpolation(1), NTK(1, "old"), NTK(1, "aware"), NTK(1, "fixed"), NTK(1), YaRN(1, 2048)]
)
def test_a_factor_of_one_changes_nothing(scaling: Any) -> None:
    torch.testing.assert_close(θ(RoPE(scaling=scaling)), PLAIN, rtol=1e-14, atol=0)
    assert RoPE(scaling=scaling).logit_factor == 1


def test_ntk_forms() -> None:
    torch.testing.assert_close(θ(RoPE(scaling=NTK(8, "old"))), θ(RoPE(base=80000.0)))
    torch.testing.assert_close(θ(RoPE(scaling=NTK(8, "aware"))), θ(RoPE(base=10000.0 * 8 ** (64 / 62))))
    torch.testing.assert_close(θ(RoPE(scaling=NTK(8, exponent=1.0))), θ(RoPE(scaling=NTK(8, "fixed"))))
    torch.testing.assert_close(θ(RoPE(scaling=NTK(8, exponent=0.0))), θ(RoPE(scaling=Interpolation(8))))
    λ = 8 ** (2 / 64)
    β = 10000 ** (2 / 64)
    digits = torch.tensor([1 / (λ * (β * λ) ** (m - 1)) for m in range(1, 33)], dtype=torch.float64)
    torch.testing.assert_close(θ(RoPE(scaling=NTK(8, "fixed"))), digits)


def outputs(T: int, *positions: Positions) -> list[Tensor]:
    torch.manual_seed(0)
    x, layer = torch.randn(1, T, 16, dtype=torch.float64), Attention(16, n_heads=2).double()
    results = []
    for value in positions:
        other = Attention(16, n_heads=2, positions=value).double()
        other.load_state_dict(layer.state_dict())
        results.append(other(x)[0].detach())
    return results


def test_rerope_within_its_window_is_rope() -> None:
    rope, rerope = outputs(9, RoPE(), ReRoPE(8))
    torch.testing.assert_close(rope, rerope, rtol=1e-12, atol=1e-12)
    rope, rerope = outputs(10, RoPE(), ReRoPE(8))
    assert not torch.allclose(rope, rerope)


def test_leaky_rerope_between_rope_and_rerope() -> None:
    rope, leaky, plain, almost = outputs(30, RoPE(), ReRoPE(8, leak=1.0), ReRoPE(8), ReRoPE(8, leak=1e12))
    torch.testing.assert_close(rope, leaky, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain, almost, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(rope, plain)


@pytest.mark.parametrize("positions", ["nope", "alibi", "rope"])
def test_key_bias_cancels_without_rotation(positions: str) -> None:
    layer = Attention(16, n_heads=2, positions=positions, qk_bias=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    before = layer(x)[0]
    with torch.no_grad():
        layer.qk_bias[2:] = torch.randn(2, 8, dtype=torch.float64)  # a query's logits all change by q · b
    assert torch.allclose(layer(x)[0], before, atol=1e-12) == (positions != "rope")
    assert layer.optim_hints() == {"qk_bias": {"weight_decay": 0.0}}


def test_key_norm_forgets_the_length_of_keys() -> None:
    layer = Attention(16, n_heads=2, qk_norm="key").double()
    x, position = torch.randn(2, 9, 16, dtype=torch.float64), torch.arange(9)
    before = layer(x)[0]
    q, k, _ = layer.project(x, position[None])
    bound = q.norm(dim=-1).transpose(1, 2)[..., None]  # (B, H, T, 1)
    assert (layer.scores(q, k, position, position).abs() <= bound + 1e-12).all()
    with torch.no_grad():
        layer.qkv.weight[16:32] *= 7.0
    torch.testing.assert_close(layer(x)[0], before, rtol=1e-12, atol=1e-12)


def entropy(logits: Tensor) -> float:
    """The mean entropy of softmaxes over (samples, n) logits."""
    p = logits.softmax(-1)
    return -torch.xlogy(p, p).sum(-1).mean().item()


def test_log_n_holds_the_entropy_of_peaked_logits() -> None:
    lengths = [512, 4096, 32768]
    with_log, without = [], []
    for n in lengths:
        logits = 3 * torch.randn(50, n, dtype=torch.float64)
        factor = query_factor(LogN(512), None, torch.tensor([[n]]), torch.float64)
        with_log.append(entropy(factor.item() * logits))
        without.append(entropy(logits))
    assert max(with_log) - min(with_log) < 0.5
    assert without[2] - without[0] > 2.5


@pytest.mark.parametrize("n", [64, 512, 4096, 65536])
def test_gradient_scale_maximises_the_gradient(n: int) -> None:
    """Of normal logits, Σ p² is about e^{α²} / n."""
    grid = torch.linspace(0.5, 5, 4501, dtype=torch.float64)
    best = grid[(grid * (1 - grid.square().exp() / n)).argmax()].item()
    factor = query_factor("gradient", None, torch.tensor([[n]]), torch.float64)
    assert factor.item() == pytest.approx(best, rel=0.12)


def test_alibi_slopes() -> None:
    assert ALiBi().slopes(8) == [2.0**-h for h in range(1, 9)]
    assert ALiBi().slopes(1) == [2**-8]
    assert ALiBi().slopes(12) == [2.0**-h for h in range(1, 9)] + [2 ** -(h / 2) for h in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("config", "value"),
    [
        (None, NoPE()),
        ("nope", NoPE()),
        ("alibi", ALiBi()),
        ("rope", RoPE()),
        ({"kind": "rope", "base": 500000.0, "fraction": 0.5}, RoPE(500000.0, 0.5)),
        ({"kind": "rope", "scaling": {"kind": "pi", "factor": 4}}, RoPE(scaling=Interpolation(4))),
        ({"kind": "rope", "scaling": {"kind": "ntk", "factor": 4, "form": "old"}}, RoPE(scaling=NTK(4, "old"))),
        (
            {"kind": "rope", "scaling": {"kind": "yarn", "factor": 4, "original_length": 64}},
            RoPE(scaling=YaRN(4, 64)),
        ),
        ({"kind": "rerope", "window": 64, "leak": 2.0}, ReRoPE(64, leak=2.0)),
        (RoPE(base=3.0), RoPE(base=3.0)),
    ],
)
def test_plain_configurations(config: Any, value: Positions) -> None:
    assert as_positions(config) == value
    layer = build("attention", d_model=16, positions=config)
    assert isinstance(layer, Attention) and layer.positions == value
    assert hash(value) == hash(as_positions(config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("rotary", "positions: expected a kind of rope, rerope, alibi, nope, got 'rotary'"),
        ({"base": 3.0}, "positions: expected a kind of rope, rerope, alibi, nope, got None"),
        ({"kind": "rope", "theta": 3.0}, "positions: unknown theta for 'rope', which has base, fraction, scaling"),
        ({"kind": "rerope"}, "positions: missing window for 'rerope', which has window, base, leak"),
        ({"kind": "alibi", "base": 1}, "positions: unknown base for 'alibi', which has no fields"),
        ({"kind": "rope", "scaling": "su"}, "scaling: expected a kind of pi, ntk, yarn, got 'su'"),
        ({"kind": "rope", "scaling": "pi"}, "scaling: missing factor for 'pi', which has factor"),
        ({"kind": "rope", "scaling": 4.0}, r"scaling: expected Interpolation, NTK, YaRN or None, got 4\.0"),
        (3, "positions: expected RoPE, ReRoPE, ALiBi, NoPE, .* got 3"),
    ],
)
def test_bad_configurations(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_positions(config)


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (RoPE, {"base": 0}, "base: expected a number > 0, got 0"),
        (RoPE, {"base": math.inf}, "base: expected a number > 0, got inf"),
        (RoPE, {"base": "big"}, "base: expected a number > 0, got 'big'"),
        (RoPE, {"fraction": 1.5}, r"fraction: expected a number in \(0, 1\], got 1\.5"),
        (RoPE, {"fraction": 0.0}, r"fraction: expected a number > 0, got 0\.0"),
        (Interpolation, {"factor": 0.5}, r"factor: expected a number >= 1, got 0\.5"),
        (NTK, {"factor": 0}, "factor: expected a number >= 1, got 0"),
        (NTK, {"factor": 2, "form": "new"}, "form: expected one of 'old', 'aware', 'fixed', 'mixed', got 'new'"),
        (NTK, {"factor": 2, "exponent": -1}, "exponent: expected a number >= 0, got -1"),
        (YaRN, {"factor": 0.1, "original_length": 8}, r"factor: expected a number >= 1, got 0\.1"),
        (YaRN, {"factor": 2, "original_length": 8.5}, r"original_length: expected an integer >= 1, got 8\.5"),
        (YaRN, {"factor": 2, "original_length": 8, "slow": 0}, "slow: expected a number > 0, got 0"),
        (YaRN, {"factor": 2, "original_length": 8, "fast": 1}, "fast: expected a number > 1, got 1"),
        (YaRN, {"factor": 2, "original_length": 8, "ramp": "i"}, "ramp: expected 'rotations' or 'dimensions', got 'i'"),
        (YaRN, {"factor": 2, "original_length": 8, "temperature": 0}, "temperature: expected a number > 0, got 0"),
        (RoPE, {"base": 1, "scaling": YaRN(2, 8, ramp="dimensions")}, "base: expected a number > 1 for YaRN .* got 1"),
        (ReRoPE, {"window": 0}, "window: expected an integer >= 1, got 0"),
        (ReRoPE, {"window": 4, "base": -1}, "base: expected a number > 0, got -1"),
        (ReRoPE, {"window": 4, "leak": 0}, "leak: expected a number > 0, got 0"),
        (LogN, {"length": 1}, "length: expected an integer >= 2, .* got 1"),
    ],
)
def test_bad_values(cls: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**kwargs)


def test_a_fraction_counts_whole_channels() -> None:
    """0.28 of 50 is 14.000000000000002 in floating point."""
    assert RoPE(fraction=0.28).turned(50) == 14
    assert RoPE(fraction=0.58).turned(100) == 58  # 57.99999999999999
    for fraction, d_head in ((0.3, 48), (0.28, 25), (1e-12, 48)):
        with pytest.raises(ValueError, match="an even number of channels"):
            RoPE(fraction=fraction).turned(d_head)


def test_partial_rotation_turns_an_even_number_of_channels() -> None:
    with pytest.raises(ValueError, match=r"an even number of channels, got fraction = 0\.25 of 12"):
        Attention(24, n_heads=2, positions=RoPE(fraction=0.25))
