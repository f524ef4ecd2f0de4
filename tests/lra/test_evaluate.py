"""The probes of range: what is shuffled or cut, and what it is compared with."""

from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

from lra.evaluate import probe
from lra.examples import Batch, Examples
from lra.tasks import ListOps


class FirstToken(torch.nn.Module):
    """Answers what stands in the first position: right in order, and by chance once positions are shuffled."""

    multiple = 1

    def __init__(self, cls: bool = False):
        super().__init__()
        self.body = SimpleNamespace(cls=cls or None)
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def classify(self, batch: Batch, window: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.one_hot(batch.first.inputs[:, 0], 10).float(), batch.labels


def examples(n: int, T: int, wrong: int) -> Examples:
    """Rows whose label is the first token, which all others differ from; of the first `wrong` rows it is another."""
    label = np.arange(n) % 5
    ids = np.repeat((label + 5)[:, None], T, axis=1)
    ids[wrong:, 0] = label[wrong:]
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "label": label.tolist()})
    return Examples.from_dataset(rows, ListOps())


def test_in_order_and_shuffled_are_of_the_same_rows():
    both = probe(FirstToken(), examples(200, 40, wrong=50), seed=0)
    found = both["shuffled"]
    assert list(found) == ["in order", "1", "8"]
    assert found["in order"] == 0.75
    for block, places in (("1", 40), ("8", 5)):  # the first token stays first in a share 1 / places of the rows
        expected = 0.75 / places
        assert abs(found[block] - expected) < 5 * (expected / 200) ** 0.5
    assert both == probe(FirstToken(), examples(200, 40, wrong=50), seed=0)
    assert both["windows"] == {"whole": 0.75, "8": 0.75}
    assert probe(FirstToken(cls=True), examples(200, 40, wrong=50), seed=0)["windows"] == {}, "a token that sees itself"


@pytest.mark.parametrize("T", [1])
def test_rows_without_two_blocks_are_not_probed(T):
    assert probe(FirstToken(), examples(5, T, wrong=0), seed=0) == {"shuffled": {}, "windows": {}}
