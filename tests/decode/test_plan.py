"""Plans are true: what is predicted is what a decoder then evaluates and holds, and what does not fit is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from linrnn.decode import AttentionDecoder, Calibration, Choice, LiveBytes, NoPlan, Plan, plan
from linrnn.decode._counts import count, recursion
from linrnn.decode._job import Job
from linrnn.decode._stack import AttentionStack
from linrnn.decode.calibration import Units
from linrnn.decode.plan import show_bytes, show_count, show_seconds
from linrnn.layers.positions import ALiBi
from linrnn.models import LanguageModel

V = 13


def make(n_layers: int = 2, **mixer_kwargs: Any) -> LanguageModel:
    return LanguageModel(V, mixer="attention", d_model=16, n_layers=n_layers, mixer_kwargs=mixer_kwargs).eval()


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    torch.manual_seed(0)
    return Calibration(make())


def decoder_of(model: LanguageModel, choice: Choice) -> AttentionDecoder:
    return AttentionDecoder(model, memory=choice.memory, block_size=choice.block_size)


@pytest.mark.parametrize(
    ("options", "batch_size"), [({}, 1), ({"n_heads": 2, "n_kv_heads": 1, "window": 6, "sink": 2}, 2)]
)
def test_predictions_are_true(options: dict[str, Any], batch_size: int) -> None:
    model = make(**options)
    calibration = Calibration(model, batch_size=batch_size)
    for length, new_tokens, block_size in ((13, 1, 4), (8, 8, 4), (9, 2, None)):
        ids = torch.randint(V, (batch_size, length))
        found = plan(
            model,
            length,
            new_tokens=new_tokens,
            batch_size=batch_size,
            block_size=block_size,
            calibration=calibration,
        )
        assert [choice.memory for choice in found.choices] == ["kv", "inputs", "layerwise", "block", "constant"]
        for choice in (*found.choices, *found.blocks):
            decoder = decoder_of(model, choice)
            with LiveBytes() as live:
                decoder.extend(ids[:, : length - new_tokens + 1])
                for t in range(length - new_tokens + 1, length):
                    decoder.step(ids[:, t])
            assert (decoder.evaluations, decoder.pairs) == (choice.evaluations, choice.pairs)
            assert decoder.state_bytes == choice.state_bytes
            assert decoder.id_bytes == choice.id_bytes
            assert live.peak <= choice.bytes and choice.seconds > 0


@pytest.mark.parametrize(
    ("d_model", "n_layers", "batch_size", "options", "jobs"),
    [
        (128, 2, 1, {}, [(1024, 1, 256), (256, 1, 256), (300, 1, 512)]),
        (64, 2, 1, {}, [(100, 1, 16), (100, 3, 16), (41, 41, 16)]),
        (32, 3, 2, {"positions": ALiBi()}, [(100, 5, 16), (17, 1, 16)]),
        (32, 3, 2, {"n_kv_heads": 1, "window": 24, "sink": 2}, [(100, 3, 16), (60, 2, 64)]),
    ],
)
def test_no_memory_takes_more_than_predicted(
    d_model: int, n_layers: int, batch_size: int, options: dict[str, Any], jobs: list[tuple[int, int, int]]
) -> None:
    """Bytes are an upper bound, and a close one: everything that is alive at the worst moment is counted."""
    model = LanguageModel(256, mixer="attention", d_model=d_model, n_layers=n_layers, mixer_kwargs=options).eval()
    calibration = Calibration(model, batch_size=batch_size)
    calibration.seconds = lambda function: 1e-6  # type: ignore[method-assign]  # bytes alone
    for length, new_tokens, block_size in jobs:
        ids = torch.randint(256, (batch_size, length))
        job = Job(calibration, length - new_tokens + 1, length)
        for memory in ("kv", "inputs", "layerwise", "block"):
            choice = job.choice(memory, block_size)
            decoder = decoder_of(model, choice)
            with LiveBytes() as live:
                decoder.extend(ids[:, : length - new_tokens + 1])
                for t in range(length - new_tokens + 1, length):
                    decoder.step(ids[:, t])
            assert 0.8 * choice.bytes <= live.peak <= choice.bytes, (memory, length, new_tokens, block_size)


def test_counts_of_long_texts_are_formulas() -> None:
    model = make(3)
    stack = AttentionStack(model)
    # the numbers of all L tokens for one token a block, and of the last one for N = 6 with L = 4096
    assert recursion(stack, 1, 1, 128)[0] == 11_716_640
    deep = AttentionStack(make(6))
    assert [recursion(deep, B, 4096, 4096)[0] for B in (4096, 2048, 1024)] == [1, 7, 84]
    # a window that sees everything takes the way of sums, to the same numbers
    wide = AttentionStack(make(3, window=500))
    for B, first, last in ((1, 1, 60), (7, 20, 60), (7, 60, 60), (100, 3, 60)):
        assert recursion(wide, B, first, last) == recursion(stack, B, first, last)
        for memory in ("inputs", "layerwise"):
            assert count(wide, memory, B, first, last) == count(stack, memory, B, first, last)
    # and a narrow one bounds the work of a token: 2 blocks a layer
    narrow = AttentionStack(make(3, window=8))
    assert recursion(narrow, 8, 800, 800) == (8, 4, 2, 1)


def test_chooses_the_fastest_within_the_budget(calibration: Calibration) -> None:
    model = calibration.stack.model
    free = plan(model, 64, calibration=calibration)
    assert free.chosen.seconds == min(choice.seconds for choice in free.choices)
    small = next(choice for choice in free.choices if choice.memory == "constant")
    tight = plan(model, 64, small.bytes, calibration=calibration)
    assert tight.chosen == small
    assert plan(model, 64, small.bytes + 1, calibration=calibration).decoder().memory == "constant"
    for budget in (10_000, 30_000, 10**6):
        found = plan(model, 64, budget, calibration=calibration)
        fits = [choice for choice in (*found.choices, *found.blocks) if choice.bytes <= budget]
        assert found.chosen.seconds == min(choice.seconds for choice in fits)
        ids = torch.randint(V, (1, 64))
        expected = model(ids)[0][:, -1].detach()
        torch.testing.assert_close(found.decoder().extend(ids), expected, rtol=1e-4, atol=1e-4)


def test_refuses_with_the_numbers(calibration: Calibration) -> None:
    model = calibration.stack.model
    with pytest.raises(NoPlan, match=r"memory_budget, time_limit: .*(?s:.*)constant +1 .* over budget"):
        plan(model, 64, 100, calibration=calibration)
    with pytest.raises(NoPlan, match=r"(?s)kv .* over budget.*constant +1 .* too slow"):
        plan(model, 2000, 30_000, block_size=4, time_limit=1e-3, calibration=calibration)
    with pytest.raises(ValueError, match="too slow"):
        plan(model, 64, time_limit=1e-9, calibration=calibration)


def test_table(calibration: Calibration) -> None:
    text = str(plan(calibration.stack.model, 64, 10**9, calibration=calibration))
    lines = text.splitlines()
    assert lines[0] == "logits of the last token of 64; memory budget: 953.7 MiB, time limit: 1 h"
    assert len(lines) == 7 and sum("chosen" in line for line in lines) == 1
    assert "2,145" in lines[-1]  # 64 * 65 / 2 embeddings, 64 and 1 frames


def test_estimates_of_the_unreachable_are_finite_or_infinite(calibration: Calibration) -> None:
    units = Units(1e-5, 1e-4, 1e-5, 1e-5, 1e-5)
    stack = AttentionStack(make(1))
    assert units.seconds(count(stack, "constant", 1, 10**6, 10**6)) > 10
    deep = AttentionStack(make(60))
    job = count(deep, "constant", 1, 10**9, 10**9)
    assert units.seconds(job) == float("inf")
    assert show_count(sum(job.evaluations)).startswith("1e4")


def test_calibration_extrapolates_what_takes_long() -> None:
    units = Units(1.0, 2.0, 3.0, 4.0, 5.0)
    assert units.scaled(4, 4) == Units(4.0, 32.0, 12.0, 64.0, 20.0)
    assert units.slower(2) == Units(2.0, 4.0, 6.0, 8.0, 10.0)


def test_calibration_leaves_random_numbers_and_counts_alone(calibration: Calibration) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    calibration.units(2, 2)
    assert torch.equal(torch.rand(1), expected)
    assert calibration.stack.pairs == 0


def test_shown() -> None:
    assert [show_bytes(n) for n in (0, 999, 1000, 10**6, 10**12, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 KiB",
        "976.6 KiB",
        "931.3 GiB",
        "909.5 TiB",
    ]
    assert [show_seconds(s) for s in (0.0012, 1.5, 90, 7200, 2e5, 1e10)] == [
        "1.2 ms",
        "1.5 s",
        "1.5 min",
        "2 h",
        "2.31 days",
        "317 years",
    ]
    assert [show_count(n) for n in (1234, 10**9, 10**400)] == ["1,234", "1.0e+09", "1e400"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length": 0}, "length: expected an integer >= 1, got 0"),
        ({"new_tokens": 9}, "new_tokens: expected at most length = 8, got 9"),
        ({"memory_budget": 0}, "memory_budget: expected an integer >= 1, got 0"),
        ({"time_limit": 0.0}, r"time_limit: expected seconds > 0, got 0\.0"),
        ({"memory_budget": 1.5}, r"memory_budget: expected an integer >= 1, got 1\.5"),
        ({"memory_budget": float("inf")}, "memory_budget: expected an integer >= 1, got inf"),
        ({"time_limit": float("nan")}, "time_limit: expected seconds > 0, got nan"),
        ({"time_limit": "a"}, "time_limit: expected seconds > 0, got 'a'"),
        ({"block_size": 0}, "block_size: expected an integer >= 1, got 0"),
        ({"batch_size": 2}, "calibration: expected one of this model and batch_size = 2, got another"),
    ],
)
def test_bad_arguments(calibration: Calibration, kwargs: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"length": 8, "calibration": calibration} | kwargs
    with pytest.raises(ValueError, match=message):
        plan(calibration.stack.model, **given)


def test_a_budget_may_be_written_as_a_float(calibration: Calibration) -> None:
    found = plan(calibration.stack.model, 8, 1e9, calibration=calibration)
    assert found.memory_budget == 10**9 and isinstance(found.memory_budget, int)


def test_a_plan_is_a_value(calibration: Calibration) -> None:
    found = plan(calibration.stack.model, 8, calibration=calibration)
    assert isinstance(found, Plan) and found.fits(found.chosen)


def test_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "decode.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", docs, re.S)
    exec(compile(block, "decode.md", "exec"), {})
    assert "chosen" in capsys.readouterr().out
