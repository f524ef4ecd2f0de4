"""The backbone keeps the contract of a layer, and is the stack that its docstring describes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn import layers
from linrnn.decode.state import leaves
from linrnn.models import SequenceBackbone
from linrnn.models.ffn import GatedFFN

D = 16
MIXERS: list[Any] = [*(name for name in layers.available() if name != "nystrom"), ["lru", "attention"]]  # causal ones
# (mixer, bidirectional), for those that look both ways only where they can
WAYS = [
    (mixer, bidirectional)
    for mixer in [*layers.available(), ["lru", "attention"]]
    for bidirectional in (False, True)
    if not bidirectional or not isinstance(mixer, str) or "bidirectional" in layers.options(mixer)
]


def make(mixer: Any, **kwargs: Any) -> SequenceBackbone:
    return SequenceBackbone(mixer, D, 3, **kwargs).double()


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("prenorm", [True, False])
def test_whole_equals_pieces_and_steps(mixer: Any, prenorm: bool) -> None:
    backbone = make(mixer, prenorm=prenorm)
    x = torch.randn(2, 11, D, dtype=torch.float64, requires_grad=True)
    y, _ = backbone(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)

    first, state = backbone(x[:, :4], backbone.init_state(2))
    rest = []
    for t in range(4, 11):
        y_t, state = backbone.step(x[:, t], state)
        rest.append(y_t)
    y_pieces = torch.cat((first, torch.stack(rest, 1)), 1)
    torch.testing.assert_close(y, y_pieces, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grad, torch.autograd.grad(y_pieces.square().sum(), x)[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mixer", "bidirectional"), WAYS, ids=str)
def test_documents_and_padding(mixer: Any, bidirectional: bool) -> None:
    backbone = make(mixer, bidirectional=bidirectional)
    x = torch.randn(2, 11, D, dtype=torch.float64)
    mask, reset = torch.ones(2, 11, dtype=torch.bool), torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 3:6], reset[:, 7] = False, True
    y, _ = backbone(x, reset=reset, mask=mask)
    documents = x[:1, mask[0]].split([4, 4], 1)
    expected = torch.cat([backbone(document)[0] for document in documents], 1)
    torch.testing.assert_close(y[:1, mask[0]], expected, rtol=1e-9, atol=1e-9)
    expected = torch.cat([backbone(document)[0] for document in x[1:].split([7, 4], 1)], 1)
    torch.testing.assert_close(y[1:], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_is_the_stack_written_out(norm: str, prenorm: bool) -> None:
    backbone = make("slru", norm=norm, prenorm=prenorm)
    for p in backbone.parameters():
        nn.init.normal_(p, std=0.3)  # gains away from one, so that the order of the norms shows
    x = y = torch.randn(2, 5, D, dtype=torch.float64)

    def normed(x: Tensor, module: Any) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
        x = x / (x.square().mean(-1, keepdim=True) + (1e-5 if norm == "layer" else 1e-6)).sqrt() * module.weight
        return x + module.bias if norm == "layer" else x

    for block in backbone.blocks:
        for norm_, f in ((block.mixer_norm, lambda x, b=block: b.mixer(x)[0]), (block.ffn_norm, block.ffn)):
            y = y + f(normed(y, norm_)) if prenorm else normed(y + f(y), norm_)
    expected = normed(y, backbone.norm) if prenorm else y
    torch.testing.assert_close(backbone(x)[0], expected, rtol=1e-9, atol=1e-9)


def test_feed_forward() -> None:
    ffn = GatedFFN(D, 2.0)
    x = torch.randn(3, D)
    W_gate, W_in = ffn.gate_in.weight.chunk(2)
    torch.testing.assert_close(ffn(x), (F.silu(x @ W_gate.T) * (x @ W_in.T)) @ ffn.out.weight.T)
    assert W_gate.shape == (32, D)
    assert GatedFFN(24, 8 / 3).out.weight.shape == (24, 64)
    assert GatedFFN(4, 0.1).out.weight.shape == (4, 8)


def test_hybrids_repeat_their_pattern() -> None:
    def kinds(backbone: SequenceBackbone) -> list[str]:
        return [type(mixer).__name__ for mixer in backbone.mixers]

    assert kinds(SequenceBackbone(["lru", "attention"], D, 2)) == ["LRU", "Attention"]
    assert kinds(SequenceBackbone(("lru", "lru", "attention"), D, 5)) == ["LRU", "LRU", "Attention", "LRU", "LRU"]
    hybrid = SequenceBackbone(["lru", "attention"], D, 2, mixer_kwargs={"lru": {"d_state": 8}})
    assert hybrid.mixers[0].state_size == 16
    assert SequenceBackbone("lru", D, 2, mixer_kwargs={"d_state": 8}).mixers[1].state_size == 16


def test_state_size() -> None:
    assert SequenceBackbone("lru", D, 3).state_size == 3 * 2 * D
    assert SequenceBackbone(["lru", "attention"], D, 2).state_size is None
    assert SequenceBackbone("lru", D, 3, bidirectional=True).state_size is None
    state = SequenceBackbone("lru", D, 3).init_state(2)
    assert len(state) == 3 and all(leaf.shape[0] == 2 for leaf in leaves(state))


def test_dropout_in_training_only() -> None:
    backbone, x = SequenceBackbone("lru", D, 2, dropout=0.5), torch.randn(2, 5, D)
    assert not torch.equal(backbone(x)[0], backbone(x)[0])
    backbone.eval()
    assert torch.equal(backbone(x)[0], backbone(x)[0])


def test_bidirectional_carries_nothing() -> None:
    backbone, x = SequenceBackbone("lru", D, 2, bidirectional=True), torch.randn(2, 5, D)
    assert backbone(x)[1] is None
    assert (torch.autograd.grad(backbone(x.requires_grad_())[0][:, 0].sum(), x)[0][:, -1] != 0).any()
    with pytest.raises(RuntimeError, match=r"SequenceBackbone\.step"):
        backbone.step(x[:, 0], None)
    with pytest.raises(RuntimeError, match=r"SequenceBackbone\.init_state"):
        backbone.init_state(2)
    with pytest.raises(ValueError, match="state: a bidirectional backbone takes none"):
        backbone(x, SequenceBackbone("lru", D, 2).init_state(2))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixer": "gru"}, "mixer: no layer is called 'gru'"),
        ({"mixer": []}, "mixer: expected a name or 1 to n_layers = 2 names, got 0"),
        ({"mixer": ["lru"] * 3}, "mixer: expected a name or 1 to n_layers = 2 names, got 3"),
        ({"d_model": 0}, "d_model: expected an integer >= 1, got 0"),
        ({"n_layers": 0}, "n_layers: expected an integer >= 1, got 0"),
        ({"ffn_expand": 0.0}, r"ffn_expand: expected a number > 0, got 0\.0"),
        ({"norm": "batch"}, 'norm: expected "rms" or "layer", got \'batch\''),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1\.0"),
        ({"mixer_kwargs": {"heads": 2}}, "heads: unknown to 'lru'"),
        ({"mixer": ["lru"], "mixer_kwargs": {"d_state": 2}}, r"mixer_kwargs: expected some of \['lru'\].*'d_state'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceBackbone(**({"mixer": "lru", "d_model": D, "n_layers": 2} | kwargs))


def test_a_one_way_layer_runs_in_two_halves() -> None:
    backbone = SequenceBackbone(["lru", "mamba"], D, 2, bidirectional=True, mixer_kwargs={"mamba": {"d_state": 3}})
    lru, mamba = backbone.mixers
    assert isinstance(lru, layers.LRU) and not lru.causal
    assert isinstance(mamba, layers.Bidirectional) and mamba.backwards.d_state == 3 and not backbone.causal
    with pytest.raises(ValueError, match="d_model: expected an even number, 'mamba' has half of it each way, got 63"):
        SequenceBackbone("mamba", 63, 2, bidirectional=True)


def test_bad_inputs() -> None:
    backbone, x = SequenceBackbone("lru", D, 2), torch.randn(2, 5, D)
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, time, 16\)"):
        backbone(x[..., :8])
    with pytest.raises(TypeError, match="state: expected a tuple of 2 block states or None"):
        backbone(x, SequenceBackbone("lru", D, 3).init_state(2))
    with pytest.raises(ValueError, match=r"state\.h: expected shape \(2, 16\), got \(3, 16\)"):
        backbone(x, backbone.init_state(3))
