"""Griffin's block against transformers' and against its equations; the common properties are in test_contract.py."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import Griffin

D, T = 16, 37


def naive(layer: Griffin, x: Tensor, start: int) -> Tensor:
    """The block of the paper, token by token, for documents that begin at 0 and `start`. RG-LRU has its own tests."""
    ys = []
    for document in (x[:, :start], x[:, start:]):
        u = F.pad(document @ layer.linear_x.weight.T + layer.linear_x.bias, (0, 0, layer.conv_1d.width - 1, 0))
        state = None
        for t in range(document.shape[1]):
            window = u[:, t : t + layer.conv_1d.width]
            h, state = layer.rg_lru.step((window * layer.conv_1d.weight.T).sum(1) + layer.conv_1d.bias, state)
            z = document[:, t] @ layer.linear_y.weight.T + layer.linear_y.bias
            gelu = z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
            ys.append((h * gelu) @ layer.linear_out.weight.T + layer.linear_out.bias)
    return torch.stack(ys, 1)


def randomized(layer: Griffin) -> Griffin:
    """The layer with filters of order one and biases that are not zero."""
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias") or name.startswith("conv_1d"):
                parameter.normal_()
    return layer


@pytest.mark.parametrize("kwargs", [{}, {"lru_width": 24, "n_heads": 3, "conv_width": 2}, {"conv_width": 1}])
def test_equals_the_recurrence(kwargs: dict[str, Any]) -> None:
    layer = randomized(Griffin(D, **kwargs).double())
    x = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True)
    y = layer(x, reset=(torch.arange(T) == 20).expand(2, T))[0]
    expected = naive(layer, x, 20)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    sources = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out.square().sum(), sources) for out in (y, expected))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-8, atol=1e-8)


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_equals_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

    # float64 but for its states, which are float32
    config = transformers.RecurrentGemmaConfig(hidden_size=D, num_attention_heads=4)
    oracle = RecurrentGemmaRecurrentBlock(config, layer_idx=0).double()
    layer = randomized(Griffin(D, lru_width=D, n_heads=4).double())
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5, check_dtype=False)
    names = layer.state_dict()
    names["conv_1d.weight"] = names["conv_1d.weight"][:, None]
    oracle.load_state_dict(names)
    layer = Griffin(D, lru_width=D, n_heads=4).double()
    layer.load_state_dict(oracle.state_dict())

    x, position = torch.randn(2, T, D, dtype=torch.float64, requires_grad=True), torch.arange(T).expand(2, T)
    expected = oracle(x, position, None, use_cache=False)[0]
    y = layer(x)[0]
    close(y, expected)
    mine, its = dict(layer.named_parameters()), dict(oracle.named_parameters())
    ours = torch.autograd.grad(y.square().sum(), [x, *mine.values()])
    theirs = torch.autograd.grad(expected.square().sum(), [x, *(its[name] for name in mine)])
    for our, their in zip(ours, theirs, strict=True):
        close(our, their.view(our.shape), atol=1e-5 * their.abs().max().item())

    for prefix in (1, 2, 20):
        oracle.conv1d_state = None
        with torch.no_grad():
            y, state = layer(x[:, :prefix])
            before = oracle(x[:, :prefix], position[:, :prefix], None)[0]
            close(y, before)
            for t in range(prefix, prefix + 8):
                y_t, state = layer.step(x[:, t], state)
                after = oracle(x[:, t : t + 1], position[:, t : t + 1], None)[0]
                close(y_t, after[:, 0])
        close(state.h, oracle.rg_lru.recurrent_states)
        close(state.conv.mT, oracle.conv1d_state)


@pytest.mark.parametrize(("d_model", "width"), [(16, 16), (48, 64), (112, 144), (256, 320), (512, 640), (2048, 2688)])
def test_default_width_spends_the_parameters_of_attention(d_model: int, width: int) -> None:
    with torch.device("meta"):
        layer = Griffin(d_model)
    assert layer.lru_width == width
    if d_model >= 256:
        assert 0.9 < sum(p.numel() for p in layer.parameters()) / (4 * d_model**2) < 1.2


def test_initialisation() -> None:
    layer = Griffin(256)
    stds = {"linear_x": 256**-0.5, "linear_y": 256**-0.5, "linear_out": 320**-0.5, "conv_1d": 0.05}
    for name, std in stds.items():
        module: Any = getattr(layer, name)
        torch.testing.assert_close(module.weight.std().item(), std, rtol=0.05, atol=0)
        assert not module.bias.any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lru_width": 0}, "lru_width: expected an integer >= 1, got 0"),
        ({"lru_width": 16.0}, "lru_width: expected an integer >= 1, got 16.0"),
        ({"lru_width": 20, "n_heads": 3}, "n_heads: expected a divisor of 20, got 3"),
        ({"conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
        ({"r_max": 1.5}, "r_min, r_max: expected 0 < r_min <= r_max < 1, got 0.9, 1.5"),
    ],
)
def test_bad_values(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Griffin(D, **kwargs)
