"""The pieces that layers with heads share: head counts, norms, short convolutions."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads
from linrnn.layers.short_conv import QKVConv, ShortConv


def test_default_heads() -> None:
    for d_model in range(16, 1025, 16):
        n_heads = count_heads(d_model, None)
        assert n_heads >= 4
        assert d_model % n_heads == 0
        assert d_model // n_heads <= 64
    assert [count_heads(d, None) for d in (16, 64, 256, 512, 1024)] == [4, 4, 4, 8, 16]
    assert count_heads(48, 3) == 3
    assert count_heads(48, 3, 6) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 5), "n_heads: expected a divisor of 48, got 5"),
        ((48, 4, 6), "n_heads: expected a divisor of 6, got 4"),
        ((48, 0), "n_heads: expected an integer >= 1, got 0"),
        ((14, None), "n_heads: a width of 14 is no 4 or more heads"),
    ],
)
def test_bad_heads(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_heads(*arguments)


def test_split_and_merge() -> None:
    x = torch.randn(2, 3, 12)
    assert torch.equal(split_heads(x, 4)[:, :, 1], x[..., 3:6])
    assert torch.equal(merge_heads(split_heads(x, 4)), x)


@pytest.mark.parametrize("shape", [(6,), (4, 6)])
def test_norms_equal_those_of_torch(shape: tuple[int, ...]) -> None:
    o = 3 + torch.randn(2, 5, 4, 6)
    for center in (False, True):
        norm = HeadNorm(*shape, center=center, eps=1e-3)
        nn.init.normal_(norm.weight)
        if center:
            nn.init.normal_(norm.bias)
            expected = F.group_norm(o.view(-1, 24), 4, eps=1e-3).view_as(o) * norm.weight + norm.bias
        else:
            expected = F.rms_norm(o, (6,), eps=1e-3) * norm.weight
        torch.testing.assert_close(norm(o), expected)
        norm.reset_parameters()
        torch.testing.assert_close(norm(o), HeadNorm(*shape, center=center, affine=False, eps=1e-3)(o))


def test_norm_of_half_precision_rounds_once() -> None:
    o = (300 * torch.randn(2, 5, 4, 6)).half()  # squares that float16 does not hold
    norm = HeadNorm(6)
    nn.init.normal_(norm.weight)
    assert norm(o).dtype == torch.float16
    assert torch.equal(norm(o), norm(o.float()).half())


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_short_conv_equals_torch(width: int, bias: bool) -> None:
    conv, oracle = ShortConv(6, width=width, bias=bias), nn.Conv1d(6, 6, width, groups=6, bias=bias)
    with torch.no_grad():
        oracle.weight.copy_(conv.weight[:, None])
        if bias:
            oracle.bias.copy_(conv.bias)
    x = torch.randn(2, 9, 6)
    expected = F.silu(oracle(F.pad(x.mT, (width - 1, 0)))).mT
    y, state = conv(x, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, x[:, 10 - width :])
    assert conv.state_spec()["conv"] == ((width - 1, 6), torch.float32)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_which_streams_are_convolved(activation: str | None) -> None:
    x, sizes = torch.randn(2, 9, 10), (2, 3, 5)
    act = F.silu if activation else nn.Identity()
    for streams in ("none", "k", "qkv"):
        conv = QKVConv(streams, sizes, activation=activation)
        outs, state = conv(x, None)
        assert [out.shape[-1] for out in outs] == list(sizes)
        for name, out, plain in zip("qkv", outs, x.split(sizes, -1), strict=True):
            assert torch.allclose(out, act(plain)) == (name not in streams.replace("none", ""))
        if streams == "none":
            assert state is None
            assert not conv.state_spec()
            assert not list(conv.parameters())
        else:
            assert state.shape[1:] == conv.state_spec()["conv"][0]
        before = [p.clone() for p in conv.parameters()]
        conv.reset_parameters()
        assert all(not torch.equal(p, old) for p, old in zip(conv.parameters(), before, strict=True))
