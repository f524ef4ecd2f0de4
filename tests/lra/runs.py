"""What two runs of one cell are compared by."""

import json
from pathlib import Path
from typing import Any

import torch

from lra.checkpoints import BEST, LAST, METRICS

CLOCK = ("seconds", "loader_seconds")


def assert_same_bits(ours: Path, theirs: Path) -> None:
    """The folders of two runs of a cell hold the same curve, weights, states of training and result."""
    assert (ours / METRICS).read_bytes() == (theirs / METRICS).read_bytes()
    assert (ours / BEST).read_bytes() == (theirs / BEST).read_bytes()
    states = [torch.load(folder / LAST, weights_only=True) for folder in (ours, theirs)]
    for name in ("state_dict", "optimizer_states", "lr_schedulers"):
        first, second = (dict(leaves(state[name])) for state in states)
        assert first.keys() == second.keys() and first
        assert all(equal(first[key], second[key]) for key in first), name
    assert timeless(ours) == timeless(theirs)


def timeless(folder: Path) -> dict[str, Any]:
    """The result of a run without what the clock says."""
    result = json.loads((folder / "result.json").read_text())
    for part in (result, result.get("pretrain", {})):
        for name in CLOCK:
            part.pop(name, None)
    del result["commit"]  # one may be made while the test runs
    return result


def leaves(tree: Any, name: str = "") -> Any:
    if isinstance(tree, dict | list | tuple):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in items:
            yield from leaves(value, f"{name}/{key}")
    else:
        yield name, tree


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
