"""What stands in for CUDA graphs where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linrnn.decode import graph


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of tests are short: the first step at a size runs as it is, the second is captured."""
    monkeypatch.setattr(graph, "PATIENCE", 1)


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a capture, the calls themselves, writing their result to one buffer as a graph does."""

    def capture(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        result = run().clone()

        def replay() -> None:
            result.copy_(run())

        return replay, result

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "can_graph", lambda model: model.state_size is not None)
