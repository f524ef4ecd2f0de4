"""Mamba against transformers', mambapy's and its equations; the common properties are in test_contract.py."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers import Mamba
from linrnn.models.optim import param_groups

D, N, T = 16, 5, 37


def naive(layer: Mamba, u: Tensor) -> Tensor:
    """The equations of the paper, token by token."""
    x, z = layer.in_proj(u).split(layer.d_inner, -1)
    filters = layer.conv1d.weight[:, None]
    padded = F.pad(x.mT, (filters.shape[-1] - 1, 0))
    x = F.silu(F.conv1d(padded, filters, layer.conv1d.bias, groups=len(filters)).mT)
    parts = layer.x_proj(x).split([layer.dt_rank, layer.d_state, layer.d_state], -1)
    if layer.bcdt_norm:
        parts = tuple(F.rms_norm(s, s.shape[-1:], eps=1e-6) for s in parts)
    Δ, B, C = torch.log1p(torch.exp(layer.dt_proj(parts[0]))), *parts[1:]
    h, ys = u.new_zeros(len(u), *layer.A_log.shape), []
    for t in range(u.shape[1]):
        decay = torch.exp(Δ[:, t, :, None] * -layer.A_log.exp())
        h = decay * h + (Δ[:, t] * x[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + layer.D * x[:, t])
    return layer.out_proj(torch.stack(ys, 1) * z * torch.sigmoid(z))


def shaken(module: nn.Module) -> nn.Module:
    """Moves every parameter off its start, where D and the rows of A_log are all alike."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


def assert_same_with_gradients(layer: Mamba, run: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> None:
    """`parameters` of `run`, in the order of the layer's."""
    x = torch.randn(2, T, D, dtype=layer.D.dtype, requires_grad=True)
    y, expected = layer(x)[0], run(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    ours = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *parameters])
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their.view_as(our), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bcdt_norm": True, "dt_rank": 3},
        {"d_state": 3, "d_conv": 2, "expand": 3, "dt_rank": 4, "bias": True, "conv_bias": False},
    ],
)
def test_equals_the_recurrence(kwargs: dict[str, Any]) -> None:
    layer = shaken(Mamba(D, **kwargs).double())
    assert_same_with_gradients(layer, lambda x: naive(layer, x), list(layer.parameters()))


def transformers_mixer(falcon: bool, **options: Any) -> tuple[nn.Module, Any]:
    """The mixer of transformers and its configuration."""
    import transformers
    from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config_type = transformers.FalconMambaConfig if falcon else transformers.MambaConfig
    config = config_type(
        hidden_size=D, state_size=N, conv_kernel=4, expand=2, time_step_rank=3, num_hidden_layers=1, vocab_size=10,
        **options,
    )  # fmt: skip
    oracle = (FalconMambaMixer if falcon else MambaMixer)(config, layer_idx=0, initialize_mixer_weights=False)
    nn.init.uniform_(oracle.A_log, 0, 2)
    nn.init.ones_(oracle.D)
    return shaken(oracle), config


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("falcon", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_bias": True, "use_conv_bias": False}])
def test_equals_transformers(falcon: bool, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    oracle, _ = transformers_mixer(falcon, **options)
    bias, conv_bias = options.get("use_bias", False), options.get("use_conv_bias", True)
    layer = Mamba(D, d_state=N, dt_rank=3, bias=bias, conv_bias=conv_bias, bcdt_norm=falcon)
    layer.load_state_dict(oracle.state_dict())
    x = torch.randn(2, T, D)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], oracle(x), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # it computes A, B and D in float32 otherwise
    named = dict(oracle.double().named_parameters())
    assert_same_with_gradients(layer.double(), oracle, [named[name] for name, _ in layer.named_parameters()])


@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("falcon", [False, True])
def test_decodes_as_transformers(falcon: bool) -> None:
    transformers = pytest.importorskip("transformers")
    oracle, config = transformers_mixer(falcon)
    layer = Mamba(D, d_state=N, dt_rank=3, bcdt_norm=falcon)
    layer.load_state_dict(oracle.state_dict())
    x = torch.randn(2, T, D)
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        y, state = layer(x[:, :30])
        torch.testing.assert_close(y, oracle(x[:, :30], cache_params=cache), rtol=1e-5, atol=1e-5)
        for x_t in x[:, 30:].unbind(1):
            y_t, state = layer.step(x_t, state)
            torch.testing.assert_close(y_t, oracle(x_t[:, None], cache_params=cache)[:, 0], rtol=1e-5, atol=1e-5)
    ssm = cache.get_recurrent_state(0, state_idx=0)
    torch.testing.assert_close(state.ssm, ssm, rtol=1e-5, atol=1e-5)
    conv = cache.get_conv_state(0, state_idx=0)  # of the last W - 1 inputs or W of them
    torch.testing.assert_close(state.conv, conv.mT[:, -3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pscan", [True, False])
def test_equals_mambapy(pscan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mambapy = pytest.importorskip("mambapy.mamba")
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    config = mambapy.MambaConfig(d_model=D, n_layers=1, d_state=N, pscan=pscan)
    oracle = shaken(mambapy.MambaBlock(config).double())
    layer = Mamba(D, d_state=N).double()
    layer.load_state_dict(oracle.state_dict())
    named = dict(oracle.named_parameters())
    assert_same_with_gradients(layer, oracle, [named[name] for name, _ in layer.named_parameters()])

    x = torch.randn(2, 9, D, dtype=torch.float64)
    cache, state = (None, x.new_zeros(2, layer.d_inner, 3)), layer.init_state(2)
    with torch.no_grad():
        for x_t in x.unbind(1):
            expected, cache = oracle.step(x_t, cache)
            y_t, state = layer.step(x_t, state)
            torch.testing.assert_close(y_t, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state.ssm, cache[0], rtol=1e-9, atol=1e-9)


def test_state_dict_of_a_model() -> None:
    """Filters with a dimension of one are taken at any depth, and wrong ones are refused as ever."""
    model, other = nn.Sequential(Mamba(D)), nn.Sequential(Mamba(D))
    given = dict(model.state_dict())
    given["0.conv1d.weight"] = given["0.conv1d.weight"][:, None]
    other.load_state_dict(given)
    assert torch.equal(other[0].conv1d.weight, model[0].conv1d.weight)
    assert given["0.conv1d.weight"].ndim == 3
    given["0.conv1d.weight"] = torch.zeros(2 * D, 2, 4)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.conv1d\.weight"):
        other.load_state_dict(given)


def test_initialisation() -> None:
    layer = Mamba(512, d_state=N, dt_scale=0.5).double()
    dt = F.softplus(layer.dt_proj.bias)
    assert 1e-3 * (1 - 1e-4) <= dt.min() and dt.max() <= 0.1 * (1 + 1e-4)
    assert (dt.log().mean() - math.log(0.01)).abs() < 0.3
    assert layer.dt_rank == 32
    assert 0.99 < layer.dt_proj.weight.abs().max() / (0.5 * 32**-0.5) <= 1
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, N + 1).double().expand(1024, N))
    assert (layer.D == 1).all()
    floored = Mamba(512, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-4).double()
    dt = F.softplus(floored.dt_proj.bias)
    assert 1e-4 * (1 - 1e-3) <= dt.min() < 1e-4 * (1 + 1e-3) and (dt < 1.01e-4).double().mean() > 0.4


def test_what_does_not_decay() -> None:
    layer = Mamba(D)
    still = {id(p) for group in param_groups(layer, 1e-3, 0.1) if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in layer.named_parameters() if id(p) in still}
    assert names == {"A_log", "D", "dt_proj.bias", "conv1d.bias"}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": 0}, "d_state: expected an integer >= 1, got 0"),
        ({"d_conv": 0}, "d_conv: expected an integer >= 1, got 0"),
        ({"expand": 1.5}, "expand: expected an integer >= 1, got 1.5"),
        ({"dt_rank": 0}, "dt_rank: expected an integer >= 1, got 0"),
        ({"dt_rank": "auto"}, "dt_rank: expected an integer >= 1, got 'auto'"),
        ({"dt_min": 0.2}, "dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got 0.2, 0.1"),
        ({"dt_max": float("inf")}, "dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got 0.001, inf"),
        ({"dt_max": "0.1"}, "dt_min, dt_max: expected 0 < dt_min <= dt_max < inf, got 0.001, '0.1'"),
        ({"dt_init_floor": float("inf")}, "dt_init_floor: expected a finite number > 0, got inf"),
        ({"dt_scale": 0.0}, "dt_scale: expected a finite number > 0, got 0.0"),
        ({"bcdt_norm_eps": 0.0}, "bcdt_norm_eps: expected a finite number > 0, got 0.0"),
        ({"dt_init_floor": -1e-4}, "dt_init_floor: expected a finite number > 0, got -0.0001"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba(D, **kwargs)
