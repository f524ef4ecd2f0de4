"""Cells of a second: a few short trees, two narrow blocks, some twenty steps."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from lra.config import Cell, cell_from_dict

# Without the extra `lra`, as on a machine with torch and a GPU and little else, there is nothing to test here.
MISSING = [name for name in ("datasets", "jsonargparse", "lightning", "matplotlib", "rich") if find_spec(name) is None]
collect_ignore_glob = ["*"] if MISSING else []

TINY: dict[str, Any] = {
    "task": {
        "name": "listops",
        "n_train": 60,
        "n_val": 30,
        "n_test": 40,
        "max_depth": 3,
        "max_args": 4,
        "min_length": 4,
        "max_tree_length": 24,
        "p_operator": 0.5,
    },
    "model": {"d_model": 16, "n_layers": 1, "dropout": 0.1},
    "optim": {"batch_size": 8},
    "budget": {"steps": 20, "evaluations": 4, "checkpoint_every": 5},
}


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny() -> Callable[..., Cell]:
    """Builds a tiny cell; keyword arguments replace top-level keys or are merged into sections."""

    def build(**changes: Any) -> Cell:
        config = {**TINY}
        for key, value in changes.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        return cell_from_dict(config)

    return build


@pytest.fixture
def tiny_yaml(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)
