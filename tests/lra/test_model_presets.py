"""Every file of configs/model: its network trains on tokens and on reals, looking both ways or back only."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from linrnn import layers
from lra.config import Model
from lra.examples import Batch, Side
from lra.networks import build_net
from lra.objectives import classification, denoising
from lra.presets import find, load, presets
from lra.tasks import Ids, Levels, Task

PRESETS = sorted(presets("model"))
WAYS = [(name, both) for name in PRESETS for both in (True, False) if name != "nystrom" or both]  # no causal form
T = 70  # beyond the windows and chunks of some


@dataclass(frozen=True, kw_only=True)
class Words(Task):
    mask_rate: float = 0.3
    name: ClassVar[str] = "words"
    n_classes: ClassVar[int] = 3
    max_length: ClassVar[int] = T
    inputs: ClassVar[Ids | Levels] = Ids(11, pad_id=0, mask_id=1)


class Colours(Words):
    inputs: ClassVar[Ids | Levels] = Levels(3, 100.0, 50.0, "l1")


def batch(task: Task) -> Batch:
    """A long row and a short one."""
    shape = (2, T) if isinstance(task.inputs, Ids) else (2, T, task.inputs.channels)
    mask = torch.arange(T) < torch.tensor([[T], [T // 2]])
    return Batch(Side(torch.randint(2, 11, shape), mask), None, torch.tensor([0, 2]))


def test_there_is_one_for_every_layer() -> None:
    mixers = {load(name)["model"]["mixer"] for name in PRESETS}
    assert mixers == set(layers.available())


@pytest.mark.parametrize("name", PRESETS)
def test_says_what_is_mixed_and_nothing_else(name: str) -> None:
    """Sizes belong to tasks. The first line is the command that uses the file."""
    assert set(load(name)) == {"model"} and set(load(name)["model"]) <= {"mixer", "mixer_kwargs"}
    assert find(name).read_text(encoding="utf-8").startswith(f"# lra run listops {name} scratch\n# ")


@pytest.mark.parametrize("task", [Words(), Colours()], ids=["tokens", "reals"])
@pytest.mark.parametrize(("name", "bidirectional"), WAYS)
def test_trains_a_step(name: str, bidirectional: bool, task: Task) -> None:
    """Pretraining, then classification: the loss falls along its own gradient, which reaches every parameter."""
    model = Model(**load(name)["model"], d_model=32, n_layers=1, bidirectional=bidirectional)
    rows, kind = batch(task), "masked" if bidirectional else "causal"
    for objective in (kind, None):
        net = build_net(model, task, denoise=objective, seed=0)

        def loss(net=net, objective=objective) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            if objective is None:
                return classification(net, rows).mean
            return denoising(objective, net, rows, generator, rate=task.mask_rate).mean

        before = loss()
        before.backward()
        unread = "denoise" if objective is None else "head"
        read = {key: p for key, p in net.named_parameters() if unread not in key}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in read.values())
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in read.values()]).norm()
            for p in read.values():
                p -= 1e-3 * p.grad / norm
            assert loss() < before
