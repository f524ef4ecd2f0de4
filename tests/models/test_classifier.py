"""The classifier: real tokens count, padding does not, and wrong inputs are named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.models import SequenceClassifier
from linrnn.models.classifier import POOLINGS, pool

POOLED = [pooling for pooling in POOLINGS if pooling != "none"]

V = 11


def make(**kwargs: Any) -> SequenceClassifier:
    return SequenceClassifier(3, **({"vocab_size": V, "d_model": 16} | kwargs)).double()


def test_shapes() -> None:
    tokens, reals = torch.randint(V, (2, 7)), torch.randn(2, 7, 5, dtype=torch.float64)
    assert make()(tokens).shape == (2, 3)
    assert make()(tokens.to(torch.uint8)).shape == (2, 3)
    assert make().features(tokens).shape == (2, 7, 16)
    assert make(vocab_size=None, d_input=5)(reals).shape == (2, 3)
    assert make(two_inputs=True)(tokens, None, torch.randint(V, (2, 9))).shape == (2, 3)


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("mixer", ["lru", "attention"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("reals", [False, True])
def test_padding_changes_nothing(pooling: str, mixer: str, bidirectional: bool, reals: bool) -> None:
    inputs: dict[str, Any] = {"vocab_size": None, "d_input": 5} if reals else {}
    model = make(pooling=pooling, mixer=mixer, bidirectional=bidirectional, **inputs)
    lengths = torch.tensor([[9], [4], [1]])
    time = torch.arange(9)
    for mask in (time < lengths, time >= 9 - lengths, torch.rand(3, 9) < 0.5):
        mask[:, 4] |= ~mask.any(1)
        x = torch.randn(3, 9, 5, dtype=torch.float64) if reals else torch.randint(V, (3, 9))
        expected = torch.cat([model(x[row, mask[row]][None]) for row in range(3)])
        x[~mask] = torch.nan if reals else -100  # what stands at padded places is not even looked at
        torch.testing.assert_close(model(x, mask), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_without_pooling_every_token_is_classified(bidirectional: bool) -> None:
    model = make(pooling="none", bidirectional=bidirectional)
    x, mask = torch.randint(V, (3, 9)), torch.rand(3, 9) < 0.5
    logits = model(x, mask)
    assert logits.shape[:2] == (3, 9)
    for row in range(3):
        torch.testing.assert_close(logits[row, mask[row]], model(x[row, mask[row]][None])[0])
    with pytest.raises(ValueError, match="one vector per sequence for two inputs"):
        make(pooling="none", two_inputs=True)


@pytest.mark.parametrize("pooling", ["mean", "last", "max"])
def test_pooling_over_real_tokens(pooling: str) -> None:
    h, mask = torch.randn(4, 9, 5), torch.rand(4, 9) < 0.5
    mask[3] = False
    for row in range(3):
        real = h[row, mask[row]]
        expected = {"mean": real.mean(0), "last": real[-1], "max": real.max(0).values}[pooling]
        torch.testing.assert_close(pool(h, mask, pooling)[row], expected)
    assert torch.equal(pool(h, mask, pooling)[3], torch.zeros(5))
    torch.testing.assert_close(pool(h, None, pooling), pool(h, torch.ones_like(mask), pooling))
    assert torch.equal(pool(h[:, :0], mask[:, :0], pooling), torch.zeros(4, 5))


def test_mean_of_many_half_precision_features() -> None:
    h = torch.full((1, 4000, 2), 100.0, dtype=torch.float16)
    mask = torch.ones(1, 4000, dtype=torch.bool)
    for m in (mask, None):
        torch.testing.assert_close(pool(h, m, "mean"), h[:, 0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("mixer", ["lru", "attention"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows_without_real_tokens(pooling: str, mixer: str, bidirectional: bool) -> None:
    model = make(pooling=pooling, mixer=mixer, bidirectional=bidirectional)
    x, mask = torch.randint(V, (2, 7)), torch.tensor([[True], [False]]).expand(2, 7)
    logits = model(x, mask)
    nothing = torch.zeros(1, 0, dtype=torch.int64)
    torch.testing.assert_close(logits[1:], model(nothing))
    if pooling != "cls":
        torch.testing.assert_close(logits[1], model.head.bias)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_parameter_and_every_token_matters(pooling: str) -> None:
    model = make(pooling=pooling, mixer="lru", vocab_size=None, d_input=5)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    assert x.grad is not None and (x.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_two_inputs_are_compared() -> None:
    model = make(two_inputs=True)
    x, x2 = torch.randint(V, (2, 7)), torch.randint(V, (2, 9))
    mask2 = torch.arange(9) < torch.tensor([[9], [5]])
    a = model.pool(x)
    b = torch.cat([model.pool(x2[:1]), model.pool(x2[1:, :5])])
    expected = model.head(torch.cat((a, b, a - b, a * b), 1))
    torch.testing.assert_close(model(x, None, x2, mask2), expected, rtol=1e-9, atol=1e-9)


def test_features_are_those_of_the_body() -> None:
    model = make()
    x = torch.randint(V, (2, 7))
    torch.testing.assert_close(model(x), model.head(model.features(x).mean(1)))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    torch.testing.assert_close(model.features(x, mask)[1, :4], model.features(x[1:, :4])[0])


def test_compiles_without_breaks() -> None:
    model, x = make(mixer="attention"), torch.randint(V, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), model(x, mask))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": None}, "vocab_size, d_input: expected exactly one .* got None, None"),
        ({"d_input": 5}, "vocab_size, d_input: expected exactly one .* got 11, 5"),
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"vocab_size": None, "d_input": 0}, "d_input: expected an integer >= 1, got 0"),
        ({"pooling": "sum"}, "pooling: expected one of mean, last, max, cls, none, got 'sum'"),
        ({"max_length": 0}, "max_length: expected an integer >= 1, got 0"),
        ({"mixer": "gru"}, "no layer is called 'gru'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)
    with pytest.raises(ValueError, match="n_classes: expected an integer >= 1, got 0"):
        SequenceClassifier(0, vocab_size=V)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([[1, 2]], TypeError, "x: expected a tensor, got list"),
        (torch.zeros(2, 7), ValueError, "x: expected integer token ids, got torch.float32"),
        (torch.zeros(7, dtype=torch.int64), ValueError, r"x: expected token ids of shape \(batch, time\), got \(7,\)"),
        (torch.full((2, 7), V), ValueError, "x: expected ids from 0 to 10, got 11; mark padding with mask"),
        (torch.full((2, 7), -1), ValueError, "x: expected ids from 0 to 10, got -1"),
        (torch.zeros(2, 10, dtype=torch.int64), ValueError, "x: expected at most max_length = 9 tokens, got 10"),
    ],
)
def test_bad_tokens(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(max_length=9)(inputs)


def test_bad_reals() -> None:
    model = make(vocab_size=None, d_input=5)
    with pytest.raises(ValueError, match=r"x: expected floating point inputs, got torch\.int64"):
        model(torch.zeros(2, 7, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected shape \(batch, time, 5\), got \(2, 7\)"):
        model(torch.zeros(2, 7))


def test_bad_masks_and_second_inputs() -> None:
    x = torch.zeros(2, 7, dtype=torch.int64)

    def call(*args: Tensor | None, two: bool = False) -> None:
        make(two_inputs=two)(*args)

    with pytest.raises(ValueError, match=r"mask: expected a bool tensor, True on real tokens, got torch\.int64"):
        call(x, x)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2, 7\), got \(2, 6\)"):
        call(x, torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="x2: expected None, got"):
        call(x, None, x)
    with pytest.raises(ValueError, match="x2: expected a second input, got NoneType"):
        call(x, two=True)
    with pytest.raises(ValueError, match="x2: expected the batch size of x, 2, got 1"):
        call(x, None, x[:1], two=True)
    with pytest.raises(ValueError, match="mask2: expected None without x2"):
        call(x, None, None, torch.ones(2, 7, dtype=torch.bool))
