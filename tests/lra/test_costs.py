"""The operations of a run against counts by hand, and against `linrnn.flops` of the whole network."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

import linrnn
from linrnn import layers
from lra.config import Model
from lra.costs import run_flops, sequence_flops
from lra.networks import build_body
from lra.tasks import Ids, Levels, Task

D, HIDDEN, LAYERS, CLASSES, VOCAB = 32, 64, 3, 5, 11
FFN = 3 * D * HIDDEN  # of a token
MODEL = Model(d_model=D, n_layers=LAYERS)


@dataclass(frozen=True, kw_only=True)
class Words(Task):
    mask_rate: float = 0.25
    name: ClassVar[str] = "words"
    n_classes: ClassVar[int] = CLASSES
    max_length: ClassVar[int] = 4000
    inputs: ClassVar[Ids | Levels] = Ids(VOCAB, pad_id=0, mask_id=1)


@dataclass(frozen=True, kw_only=True)
class Tags(Words):
    pooling: str = "none"
    dense: ClassVar[bool] = True


class Pairs(Words):
    two_inputs: ClassVar[bool] = True


class Colours(Words):
    inputs: ClassVar[Ids | Levels] = Levels(3, 100.0, 50.0, "l1")


class Grays(Words):
    inputs: ClassVar[Ids | Levels] = Levels(1, 100.0, 50.0, "ce")


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("T", [1, 63, 1000])
def test_by_hand(T: int, bidirectional: bool) -> None:
    """Per block: LRU, B (2 D²), λ h (4 D), C (2 D²), its D is a skip; attention, 4 D² and T² twice. Then the head."""
    lru = replace(MODEL, bidirectional=bidirectional)
    mixers = {"lru": T * (4 * D * D + 4 * D), "attention": T * 4 * D * D + 2 * T * T * D}
    for mixer, one in mixers.items():
        blocks = LAYERS * (one + T * FFN)
        model = replace(lru, mixer=mixer)
        assert sequence_flops(model, Words(), T) == 6 * (blocks + D * CLASSES)
        assert sequence_flops(model, Tags(), T) == 6 * (blocks + T * D * CLASSES)
        pairs = 2 * blocks + 4 * D * D + D * CLASSES
        assert sequence_flops(model, Pairs(), T) == 6 * pairs
        assert sequence_flops(model, Colours(), T) == 6 * (blocks + T * 3 * D + D * CLASSES)
        assert sequence_flops(model, Words(), T, denoise="masked") == 6 * (blocks + 0.25 * T * D * VOCAB)
        assert sequence_flops(model, Words(), T, denoise="causal") == 6 * (blocks + (T - 1) * D * VOCAB)
        assert sequence_flops(model, Pairs(), T, denoise="causal") == 12 * (blocks + (T - 1) * D * VOCAB)
        # with a channel for the mask, and a value per channel or 256 levels to choose from
        colours, grays = blocks + T * 4 * D + 0.25 * T * D * 3, blocks + T * 2 * D + 0.25 * T * D * 256
        assert sequence_flops(model, Colours(), T, denoise="masked") == 6 * colours
        assert sequence_flops(model, Grays(), T, denoise="masked") == 6 * grays


def test_positions_that_are_asked() -> None:
    """The head of a dense task is read at no more positions of a row than the most labels that a row has."""
    head = 6 * D * CLASSES
    body = sequence_flops(MODEL, Tags(), 63) - 63 * head
    assert sequence_flops(MODEL, Tags(), 63, asked=8) == body + 8 * head
    assert sequence_flops(MODEL, Tags(), 63, asked=99) == body + 63 * head
    assert run_flops(MODEL, Tags(), {63: 2, 5: 1}, asked=8) == pytest.approx(
        2 * (body + 8 * head) + sequence_flops(MODEL, Tags(), 5)
    )
    assert sequence_flops(MODEL, Words(), 63, asked=1) == sequence_flops(MODEL, Words(), 63)


WAYS = [(name, both) for name in layers.available() for both in (True, False) if name != "nystrom" or both]


@pytest.mark.parametrize(("mixer", "bidirectional"), WAYS)
def test_is_the_count_of_the_whole_network(mixer: str, bidirectional: bool) -> None:
    for task, pooling in ((Words(), "cls"), (Pairs(), "mean"), (Colours(), "max")):
        model = replace(MODEL, mixer=mixer, bidirectional=bidirectional, pooling=pooling)
        with torch.device("meta"):
            body = build_body(model, task)
        assert sequence_flops(model, task, 63) == 6 * linrnn.flops(body, 63)


@pytest.mark.parametrize("task", [Words(), Tags(), Colours()], ids=lambda task: type(task).__name__)
def test_a_run_is_the_sum_of_its_rows(task: Task) -> None:
    model = replace(MODEL, mixer="attention")
    histogram = {1: 4, 7: 2, 1000: 3}
    for denoise in (None, "masked", "causal"):
        rows = sum(n * sequence_flops(model, task, length, denoise=denoise) for length, n in histogram.items())
        assert run_flops(model, task, histogram, denoise=denoise) == pytest.approx(rows, rel=1e-12)
    assert run_flops(model, task, {}) == 0


def test_two_inputs_of_a_row_are_two_sequences() -> None:
    """Of different lengths: the mean of the pairs of either."""
    a, b = (sequence_flops(MODEL, Pairs(), length) for length in (10, 50))
    assert run_flops(MODEL, Pairs(), {10: 1, 50: 1}) == (a + b) / 2


def test_an_empty_sequence_is_read_as_one_position() -> None:
    assert run_flops(MODEL, Words(), {0: 1}) == run_flops(MODEL, Words(), {1: 1})
    assert run_flops(MODEL, Words(), {0: 1}, denoise="causal") == run_flops(MODEL, Words(), {1: 1}, denoise="causal")


def test_a_model_that_cannot_be_built_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown model\.mixer 'lstm'"):
        run_flops(replace(MODEL, mixer="lstm"), Words(), {5: 1})
