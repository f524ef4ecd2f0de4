"""Filters against transformers' processors, draws against their probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from linrnn.decode.sampling import BadLogits, Sampling, as_integer, draw, generator, global_seed, row_seed


def expected(logits: Tensor, ids: Tensor, sampling: Sampling) -> Tensor:
    """What transformers' generate draws from: its processors, in its order."""
    from transformers.generation import logits_process as theirs

    steps: list[Any] = []
    if sampling.repetition_penalty != 1:
        steps.append(theirs.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(theirs.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k is not None:
        steps.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None:
        steps.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        steps.append(theirs.MinPLogitsWarper(sampling.min_p))
    scores = logits
    for step in steps:
        scores = step(ids, scores)
    return scores.softmax(1)


options = st.builds(
    Sampling,
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.none() | st.sampled_from([0.03, 0.31, 0.57, 0.91, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.013, 0.21, 1.0]),
    repetition_penalty=st.sampled_from([0.5, 1.0, 2.0]),
)


@settings(max_examples=60, deadline=None)
@given(options, st.integers(0, 2**31), st.booleans())
def test_filters_are_those_of_transformers(sampling: Sampling, seed: int, ties: bool) -> None:
    """Also where logits are equal: quarters, with factors of two, stay exact, so that both see the same ties."""
    g = generator(seed)
    logits = 3 * torch.randn(4, 23, generator=g)
    logits[0, :5] = -torch.inf
    if ties:
        logits = (logits * 4).round() / 4
    ids = torch.randint(23, (4, 6), generator=g)
    seen = torch.zeros(4, 23, dtype=torch.bool).scatter_(1, ids, True)
    theirs = expected(logits, ids, sampling)
    ours = sampling.probabilities(logits, seen)
    if ties and sampling.top_p is not None:  # which of equal ones stay is not defined: with us, the lowest ids
        ours, theirs = ours.sort(1)[0], theirs.sort(1)[0]
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_equal_logits() -> None:
    """k cuts none of those equal to the last; of p, the lowest ids stay."""
    logits = torch.tensor([[3.0, 1, 2, 2, 0]])
    assert (Sampling(1.0, top_k=2).probabilities(logits) > 0).tolist() == [[True, False, True, True, False]]
    assert (Sampling(1.0, top_p=0.7).probabilities(logits) > 0).tolist() == [[True, False, True, False, False]]
    assert (Sampling(1.0, top_p=1e-6).probabilities(torch.zeros(1, 40)) > 0).nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_greedy(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 7).to(dtype)
    p = Sampling(0.0, top_k=3, top_p=0.2).probabilities(logits)
    assert p.dtype == torch.float32
    assert torch.equal(p, torch.nn.functional.one_hot(logits.argmax(1), 7).float())
    seen = torch.zeros(3, 7, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    again = Sampling(repetition_penalty=1e4).probabilities(logits.abs(), seen)
    assert not (again.bool() & seen).any()


def test_any_temperature() -> None:
    """Neither the smallest nor the largest overflow."""
    logits = torch.tensor([[1000.0, 999.0, -1000.0]])
    for temperature in (1e-40, 1e-50, 5e-324):
        assert Sampling(temperature).probabilities(logits).tolist() == [[1, 0, 0]]
    assert Sampling(1.0, top_p=1e-12).probabilities(logits).tolist() == [[1, 0, 0]]
    torch.testing.assert_close(Sampling(1e30).probabilities(logits), torch.full((1, 3), 1 / 3))


def test_rows_do_not_depend_on_one_another() -> None:
    sampling = Sampling(0.7, top_k=40, top_p=0.9, min_p=0.01)
    logits = torch.randn(5, 1000)
    p = sampling.probabilities(logits)
    others = torch.randn(5, 1000).round()  # with more than 40 that are equal to the largest 40
    others[2] = logits[2]
    assert torch.equal(sampling.probabilities(others)[2], p[2])
    together = draw(p, [generator(i) for i in range(5)])
    assert together[2] == draw(sampling.probabilities(others), [generator(7 * (i - 2) + 2) for i in range(5)])[2]
    assert together[2] == draw(p[2:3], [generator(2)])[0]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.8, top_k=5), Sampling(1.3, top_p=0.7, min_p=0.1)])
def test_draws_have_the_probabilities(sampling: Sampling) -> None:
    """Chi square with 20000 draws: above its mean by less than 5 standard deviations; nothing of probability zero."""
    n, p = 20_000, sampling.probabilities(2 * torch.randn(1, 12))
    g = generator(1)
    tokens = torch.cat([draw(p.expand(500, -1), [g] * 500) for _ in range(n // 500)])
    counts = tokens.bincount(minlength=12)
    kept = p[0] > 0
    assert not counts[~kept].any()
    chi_square = ((counts - n * p[0]) ** 2 / (n * p[0]))[kept].sum().item()
    free = int(kept.sum()) - 1
    assert chi_square < free + 5 * (2 * free) ** 0.5


def test_the_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of probability zero, whatever the uniform number; rows need not add up to one."""
    p = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1e-3, 0.0, 0.0]])
    for u, tokens in ((0.0, [1, 2]), (1 - 2**-53, [3, 2]), (1.0, [3, 2])):
        monkeypatch.setattr(torch, "rand", lambda *_, u=u, **__: torch.tensor(u, dtype=torch.float64))
        assert draw(p, [generator(0), generator(1)]).tolist() == tokens


def test_seeds_of_rows() -> None:
    seeds = [row_seed(3, i) for i in range(2000)]
    assert len({seed % 2**32 for seed in seeds}) == 2000  # all that torch's generator looks at
    assert row_seed(4, 0) != seeds[0] and row_seed(3, 0) == seeds[0]
    first = torch.stack([torch.rand(2, generator=generator(seed)) for seed in seeds])
    assert abs(first.T.corrcoef()[0, 1]) < 5 * 2000**-0.5 and abs(first.mean() - 0.5) < 5 * (12 * 4000) ** -0.5
    torch.manual_seed(5)
    seed = global_seed()
    torch.manual_seed(5)
    assert seed == global_seed() != global_seed()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, r"temperature: expected a finite number >= 0 \(0 is greedy\), got -0.1"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"top_k": 0}, "top_k: expected an integer >= 1 or None, got 0"),
        ({"top_k": 1.5}, "top_k: .* got 1.5"),
        ({"top_p": 0.0}, r"top_p: expected a number in \(0, 1\] or None, got 0.0"),
        ({"top_p": 1.1}, "top_p: .* got 1.1"),
        ({"min_p": -0.1}, r"min_p: expected a number in \[0, 1\] or None, got -0.1"),
        ({"repetition_penalty": 0}, r"repetition_penalty: expected a finite number > 0 \(1 is none\), got 0"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)])
def test_integers_of_any_library(three: Any) -> None:
    assert type(as_integer(three)) is int and as_integer(three) == 3 == Sampling(1.0, top_k=three).top_k
    assert row_seed(three, 1) == row_seed(3, 1)
    for other in (True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), torch.tensor([3]), "3"):
        assert as_integer(other) is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits(bad: float, temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1] = bad
    with pytest.raises(BadLogits, match=r"logits: expected finite numbers .* row 1 has NaN, inf or only -inf") as error:
        Sampling(temperature).probabilities(logits)
    assert error.value.rows == [1]


def test_bad_tensors() -> None:
    with pytest.raises(ValueError, match=r"logits: expected a floating point tensor .*, got torch.float32 \(4,\)"):
        Sampling().probabilities(torch.zeros(4))
    with pytest.raises(ValueError, match=r"seen: expected a bool tensor of shape \(2, 4\), got NoneType None"):
        Sampling(repetition_penalty=2).probabilities(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="generators: expected one for each of 2 rows, got 1"):
        draw(torch.ones(2, 4), [generator(0)])
    for seed in (2**64, 0.5, True):
        with pytest.raises(ValueError, match=r"seed: expected an integer from -2\^63 to 2\^64 - 1, got"):
            generator(seed)  # type: ignore[arg-type]
