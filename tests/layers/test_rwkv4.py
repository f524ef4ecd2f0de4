"""RWKV-4: against transformers with its weights, its initialisation, and the token shift alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.layers import RWKV4, RWKV4State
from linrnn.layers.token_shift import token_shift

D, N, LAYERS = 16, 24, 3


def oracle(layer_index: int = 1) -> tuple[Any, RWKV4]:
    """An attention layer of transformers as it is initialised, and ours with its weights."""
    pytest.importorskip("transformers")
    from transformers import RwkvConfig, RwkvModel

    config = RwkvConfig(
        vocab_size=8, hidden_size=D, attention_hidden_size=N, num_hidden_layers=LAYERS, context_length=64
    )
    theirs = RwkvModel(config).blocks[layer_index].attention
    ours = RWKV4(D, d_state=N, layer_index=layer_index, n_layers=LAYERS)
    weights = {name: w.detach().view(ours.get_parameter(name).shape) for name, w in theirs.named_parameters()}
    ours.load_state_dict(weights)
    return theirs, ours


def their_state(batch: int = 1) -> list[Tensor]:
    """(the feed-forward's last token, the attention's, a, b, p), each (B, width, layers)."""
    state = [torch.zeros(batch, width, LAYERS) for width in (D, D, N, N, N)]
    state[4] -= 1e30
    return state


def test_transformers_whole_sequence() -> None:
    theirs, ours = oracle()
    x = torch.randn(2, 63, D)
    expected, _ = theirs(x)
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-5, atol=1e-6)


def test_transformers_prefill_and_steps() -> None:
    theirs, ours = oracle()
    x, their, our = torch.randn(1, 20, D), their_state(), None
    for piece in x.split([7, *(1 for _ in range(13))], 1):  # transformers steps with a batch of 1 only
        with torch.no_grad():
            expected, their = theirs(piece, state=their, use_cache=True)
            y, our = ours(piece, our)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    scale = our.p - their[4][:, :, 1]
    torch.testing.assert_close(our.x, their[1][:, :, 1])
    torch.testing.assert_close(our.a * scale.exp(), their[2][:, :, 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our.b * scale.exp(), their[3][:, :, 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer_index", range(LAYERS))
def test_initialisation_by_layer(layer_index: int) -> None:
    theirs, _ = oracle(layer_index)
    ours = RWKV4(D, d_state=N, layer_index=layer_index, n_layers=LAYERS)
    for name in ("time_decay", "time_mix_key", "time_mix_value", "time_mix_receptance"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name).flatten())
    # transformers fills time_first with ones, by a misplaced bracket
    bonus = torch.tensor([0.3, 0.3 * math.exp(0.5), 0.3 * math.exp(-0.5)])
    torch.testing.assert_close(ours.time_first.exp(), bonus.repeat(N // 3))
    for linear in (ours.key, ours.value, ours.receptance, ours.output):
        gram = linear.weight @ linear.weight.mT if linear.out_features == D else linear.weight.mT @ linear.weight
        torch.testing.assert_close(gram, torch.eye(D) * max(1, linear.out_features / linear.in_features))


def test_a_lone_layer_starts_as_the_first() -> None:
    alone, first = RWKV4(D), RWKV4(D, layer_index=0, n_layers=12)
    assert torch.equal(alone.time_decay, first.time_decay)
    assert torch.equal(alone.time_mix_value, first.time_mix_value)


def test_zero_init_adds_nothing_at_first() -> None:
    layer = RWKV4(D, zero_init=True)
    assert (layer(torch.randn(2, 7, D))[0] == 0).all()
    assert (layer.value.weight != 0).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"d_state": -1}, "d_state: expected an integer >= 1, got -1"),
        ({"n_layers": 0}, "n_layers: expected an integer >= 1, got 0"),
        ({"layer_index": 3, "n_layers": 3}, "layer_index: expected an integer from 0 to n_layers - 1 = 2, got 3"),
        ({"layer_index": -1}, "layer_index: .* got -1"),
        ({"layer_index": 0.5, "n_layers": 3}, "layer_index: .* got 0.5"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RWKV4(D, **kwargs)


def test_the_state_of_no_past_has_no_weight() -> None:
    layer = RWKV4(D).double()
    with torch.no_grad():
        layer.key.weight.mul_(1e4)  # beside a state of p = 0 these keys would underflow, and o be 0 / 0
    x = torch.randn(2, 9, D, dtype=torch.float64)
    torch.testing.assert_close(layer(x, layer.init_state(2))[0], layer(x)[0])
    assert layer(x, layer.init_state(2))[0].isfinite().all()
    assert isinstance(layer.init_state(2), RWKV4State)


# The token shift


def naive_shift(x: Tensor, last: Tensor, reset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, row by row."""
    rows, ends = [], []
    for row in range(len(x)):
        before, found = last[row], []
        for t in range(x.shape[1]):
            before = torch.zeros_like(before) if reset[row, t] else before
            found.append(before)
            before = x[row, t] if mask[row, t] else before
        rows.append(torch.stack(found))
        ends.append(before)
    return torch.stack(rows), torch.stack(ends)


@pytest.mark.parametrize("T", [1, 2, 9, 63])
@pytest.mark.parametrize("given", [set(), {"mask"}, {"reset"}, {"mask", "reset"}, {"mask", "reset", "last"}, {"last"}])
def test_token_shift(T: int, given: set[str]) -> None:
    for _ in range(3):
        x, last = torch.randn(5, T, 3), torch.randn(5, 3)
        mask, reset = torch.rand(5, T) < torch.tensor([[0.9], [0.5], [0.2], [0.0], [1.0]]), torch.rand(5, T) < 0.3
        last = last if "last" in given else torch.zeros_like(last)
        mask = mask if "mask" in given else torch.ones_like(mask)
        reset = reset if "reset" in given else torch.zeros_like(reset)
        ours = token_shift(
            x,
            last if "last" in given else None,
            reset if "reset" in given else None,
            mask if "mask" in given else None,
        )
        expected = naive_shift(x, last, reset, mask)
        assert torch.equal(ours[1], expected[1])
        assert torch.equal(ours[0][mask], expected[0][mask])
