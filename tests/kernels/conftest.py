"""The CUDA kernels on the CPU, for tests of this folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .host import HostCuda, skip_without_compiler


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session's libraries of the host shim are."""
    return tmp_path_factory.mktemp("host_shim")


@pytest.fixture
def host_cuda(host_folder: Path) -> Iterator[HostCuda]:
    """linrnn.kernels.cuda replaced by the host shim, in the mode that LINRNN_HOST_MODE names (or "fibers")."""
    skip_without_compiler()
    with HostCuda(os.environ.get("LINRNN_HOST_MODE", "fibers"), host_folder).installed() as host:
        yield host
