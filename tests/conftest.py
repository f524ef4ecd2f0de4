"""What every test runs under: a fixed seed, one thread, and uninitialised memory that shows."""

import os
import random
import sys
from collections.abc import Iterator

import pytest

# before the first import of torch; the test processes of pytest-xdist share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "exhaustive" not in config.getoption("-m"):
        config.hook.pytest_deselected(items=[item for item in items if "exhaustive" in item.keywords])
        items[:] = [item for item in items if "exhaustive" not in item.keywords]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers for a test, alone or among others."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


@pytest.fixture(autouse=True)
def poison_uninitialized_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fills torch.empty and its kin, also inside torch's own kernels, with NaN (integers: the largest one)."""
    if "gpu" in request.node.keywords:  # the deterministic mode refuses CUDA operations that the tests need
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
