"""The bare token mix and its complex relative: formulas written out, bounds, and what they become as special cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import RWKV4, ComplexRWKV, TokenMix
from linrnn.ops import diagonal_scan

D = 16


def inputs(T: int = 63, B: int = 2) -> Tensor:
    return torch.randn(B, T, D, dtype=torch.float64)


def randomized(layer: Any) -> Any:
    """Every parameter away from its initial value, the recurrent ones too."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


def reading_values(layer: Any) -> Any:
    """The layer with σ(r) = 1/2 and W_o = 2, so that its output is the weighted mean itself."""
    with torch.no_grad():
        layer.receptance.weight.zero_()
        layer.output.weight.copy_(2 * torch.eye(D))
    return layer


def weighted_mean(log_decay: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """o by its definition: a softmax over the past and the current token, the values turned by the decay's phase."""
    T = k.shape[1]
    steps = torch.arange(T)[:, None] - 1 - torch.arange(T)  # t - 1 - i
    logits = torch.where(steps[..., None] >= 0, steps[..., None] * log_decay.real, -torch.inf)  # (T, T, N)
    logits = torch.where(steps[..., None] == -1, u, logits)
    weights = (logits + k[:, None]).softmax(2)  # (B, T, T, N)
    if log_decay.is_complex():
        v = torch.exp(1j * steps.clamp(min=0)[..., None] * log_decay.imag) * v[:, None]
        return (weights * v).sum(2).real
    return (weights * v[:, None]).sum(2)


def test_is_the_ratio_of_two_slrus() -> None:
    layer, x = randomized(TokenMix(D).double()), inputs()
    k, v, λ, γ = layer.key(x).exp(), layer.value(x), layer.log_decay().exp(), layer.gamma_log.exp()
    y, z = diagonal_scan(λ, k * v)[0], diagonal_scan(λ, k)[0]
    o = (y + (γ * λ - 1) * k * v) / (z + (γ * λ - 1) * k)
    torch.testing.assert_close(layer(x)[0], layer.output(layer.receptance(x).sigmoid() * o), rtol=1e-11, atol=1e-11)


def test_is_rwkv4_without_its_token_shift() -> None:
    layer, x = randomized(TokenMix(D).double()), inputs()
    rwkv = RWKV4(D).double()
    with torch.no_grad():
        for name in ("key", "value", "receptance", "output"):
            getattr(rwkv, name).weight.copy_(getattr(layer, name).weight)
            getattr(rwkv, "time_mix_" + name, torch.empty(0)).fill_(1)
        rwkv.time_decay.copy_(layer.nu_log)
        rwkv.time_first.copy_(layer.gamma_log)
    y, state = layer(x)
    expected, rwkv_state = rwkv(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(tuple(state), tuple(rwkv_state)[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer_type", [TokenMix, ComplexRWKV])
def test_keys_of_any_size(layer_type: Any) -> None:
    layer, x = reading_values(randomized(layer_type(D).double())), inputs()
    with torch.no_grad():
        layer.key.weight.mul_(60)
    k, v = layer.key(x), layer.to_values(layer.value(x))
    assert k.std() > 50
    expected = weighted_mean(layer.log_decay(), layer.gamma_log, k, v)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-10, atol=1e-10)
    # and in float32, where e^k itself would overflow
    error = (layer.float()(x.float())[0] - expected).abs().max()
    assert error < 1e-3 * expected.abs().max()


def test_is_a_mean_of_the_values_so_far() -> None:
    layer, x = reading_values(randomized(TokenMix(D).double())), inputs(200)
    y, v = layer(x)[0], layer.value(x)
    assert (y <= v.cummax(1).values + 1e-12).all()
    assert (y >= v.cummin(1).values - 1e-12).all()
    assert y.std(1).mean() < v.std(1).mean()  # not just the last value


@pytest.mark.parametrize("layer_type", [TokenMix, ComplexRWKV])
def test_a_constant_added_to_all_keys_changes_nothing(layer_type: Any) -> None:
    layer, x = randomized(layer_type(D).double()), inputs()
    x[..., 0] = 1
    before = layer(x)[0]
    with torch.no_grad():
        layer.key.weight[:, 0] += 5 * torch.randn(D)
    torch.testing.assert_close(layer(x)[0], before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer_type", [TokenMix, ComplexRWKV])
def test_initialisation(layer_type: Any) -> None:
    layer = layer_type(D, d_state=4096, r_min=0.5, r_max=0.8)
    decay = layer.log_decay().real.exp()
    assert (decay >= 0.5 - 1e-6).all() and (decay <= 0.8 + 1e-6).all()
    assert abs(decay.square().mean() - (0.25 + 0.64) / 2) < 0.01  # λ² uniform
    assert (layer.gamma_log == 0).all()
    # so the current token weighs as much as the one before: of constant keys and two tokens, half
    layer = reading_values(layer_type(D))
    with torch.no_grad():
        layer.key.weight.zero_()
    x = inputs(2).float()
    torch.testing.assert_close(layer(x)[0][:, 1], layer.to_values(layer.value(x)).real.mean(1))


@pytest.mark.parametrize("layer_type", [TokenMix, ComplexRWKV])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"r_min": 0.9, "r_max": 0.8}, "r_min, r_max: expected 0 <= r_min <= r_max < 1.* got 0.9, 0.8"),
        ({"r_max": 1.0}, "r_min, r_max"),
        ({"lr_scale": 0.0}, r"lr_scale: expected a number in \(0, 1\], got 0.0"),
    ],
)
def test_bad_arguments(layer_type: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_type(D, **kwargs)


# The complex one


def test_complex_without_phases_is_the_token_mix_of_the_real_parts() -> None:
    layer, real, x = randomized(ComplexRWKV(D).double()), TokenMix(D).double(), inputs()
    with torch.no_grad():
        layer.theta_log.fill_(-torch.inf)
        real.value.weight.copy_(layer.value.weight[::2])
        for name in ("nu_log", "gamma_log", "receptance.weight", "key.weight", "output.weight"):
            real.get_parameter(name).copy_(layer.get_parameter(name))
    y, state = layer(x)
    expected, real_state = real(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.a.real, real_state.a, rtol=1e-12, atol=1e-12)


def test_complex_is_its_formula() -> None:
    layer, x = reading_values(randomized(ComplexRWKV(D).double())), inputs()
    log_decay = layer.log_decay()
    assert (log_decay.imag > 0).all() and log_decay.imag.max() > 0.5
    k, v = layer.key(x), layer.to_values(layer.value(x))
    expected = weighted_mean(log_decay, layer.gamma_log, k, v)
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(v.imag, layer.value(x)[..., 1::2])


def test_complex_output_is_bounded_by_the_values() -> None:
    layer, x = reading_values(randomized(ComplexRWKV(D).double())), inputs(200)
    size = layer.to_values(layer.value(x)).abs().cummax(1).values
    assert (layer(x)[0].abs() <= size + 1e-12).all()


def test_complex_phases_start_as_rotary_ones() -> None:
    layer = ComplexRWKV(D, rope_base=100.0)
    torch.testing.assert_close(layer.log_decay().imag, 100 ** (-torch.arange(D) / D))
    with pytest.raises(ValueError, match=r"rope_base: expected a number >= 1, got 0\.5"):
        ComplexRWKV(D, rope_base=0.5)
