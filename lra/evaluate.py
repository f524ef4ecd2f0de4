"""Scores of a network on a whole split: a pure function of weights, split and seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lra.batches import evaluation_batches, stream_seed
from lra.distributed import SOLO, Team
from lra.examples import Batch, Examples
from lra.interrupt import Flag, Interrupted
from lra.objectives import Metric, Net, Score, measures
from lra.tasks.base import IGNORED

Scorer = Callable[[Net, Batch, torch.Generator], Score]

# Block sizes of the shuffled test inputs, sizes of the windows they are cut into, and how many rows are probed.
BLOCKS, WINDOWS, PROBED = (1, 8, 64, 512), (8, 64, 512), 2_000


@torch.no_grad()
def evaluate(
    net: Net, score: Scorer, examples: Examples, seed: int, metric: Metric, flag: Flag | None = None, team: Team = SOLO
) -> dict[str, float]:
    """Mean loss and metric over a split, in eval mode, its batches shared by a team; the mode of `net` is restored.

    The noise of a denoising objective is drawn from `seed`, so every evaluation of a run hides the same positions.

    Raises:
        Interrupted: a signal arrived in the `flag` of one of the processes.
    """
    device = next(net.parameters()).device
    training, stopped = net.training, 0
    net.eval()
    sums = torch.zeros(len(Score._fields), dtype=torch.float64, device=device)
    try:
        shared = evaluation_batches(examples, multiple=net.multiple, rank=team.rank, world=team.world)
        for i, (_, batch) in enumerate(shared):
            if flag is not None and flag.signum is not None:
                stopped = flag.signum
                break
            generator = torch.Generator().manual_seed(stream_seed(seed, "evaluate", team.rank + i * team.world))
            sums += score(net, batch.to(device), generator).sums()
    finally:
        net.train(training)
    if stopped := team.largest(stopped):
        raise Interrupted("stopped during an evaluation", stopped)
    return measures(team.total(sums).tolist(), metric)


@torch.no_grad()
def accuracies(net: Net, examples: Examples, window: int | None = None) -> np.ndarray:
    """Share of right labels of every row of a split, in its order: (n,); nan for a row that asks for none."""
    device = next(net.parameters()).device
    net.eval()
    right = np.empty(len(examples))
    for rows, batch in evaluation_batches(examples, multiple=net.multiple):
        logits, labels = net.classify(batch.to(device), window)
        hits = (logits.argmax(-1) == labels).double()  # a label of -100 is never hit
        if hits.ndim == 2:
            hits = hits.sum(1) / (labels != IGNORED).sum(1)
        right[rows] = hits.cpu().numpy()
    return right


def probe(net: Net, examples: Examples, seed: int) -> dict[str, dict[str, float]]:
    """How much the network needs of what is far apart: accuracies on rows as they are, shuffled, and cut.

    Args:
        examples: of a task with one label a row.

    Returns:
        shuffled: {"in order": accuracy on the rows as they are, "<block>": with their blocks in random order}.
        windows: {"whole": the first of these, "<window>": with features that see nothing beyond their window}.
        {} for what the rows are too short for, and windows for a token that pools them, which would see but its own.
    """
    longest = max(int(side.lengths.max()) for side in examples.sides)
    blocks, windows = ([size for size in sizes if 2 * size <= longest] for sizes in (BLOCKS, WINDOWS))
    found: dict[str, dict[str, float]] = {"shuffled": {}, "windows": {}}
    if not blocks:
        return found
    whole = float(accuracies(net, examples).mean())
    found["shuffled"]["in order"] = whole
    for block in blocks:
        shuffled = examples.shuffled(block, np.random.default_rng(stream_seed(seed, "shuffle", block)))
        found["shuffled"][str(block)] = float(accuracies(net, shuffled).mean())
    if windows and net.body.cls is None:
        found["windows"]["whole"] = whole
        found["windows"] |= {str(window): float(accuracies(net, examples, window).mean()) for window in windows}
    return found


def overall(right: np.ndarray, counts: np.ndarray) -> float:
    """Share of all labels that are right, from the share of each row (n,) and how many labels it has (n,)."""
    return float(np.average(np.nan_to_num(right), weights=counts))


def grouped(right: np.ndarray, values: np.ndarray, counts: np.ndarray, groups: int = 4) -> list[dict[str, Any]]:
    """Accuracy in groups of about equal size, smallest values first: range of values, number of rows, accuracy.

    The accuracy is over labels, of which row i has `counts[i]`, as in `overall`; a group without one is left out.

    Rows of one value are never split between groups, so there may be fewer groups than asked for; up to twice as many
    different values have a group each.
    """
    distinct = np.unique(values)
    edges = distinct[:-1]
    if len(distinct) > 2 * groups:
        edges = np.unique(np.quantile(values, np.linspace(0, 1, groups + 1)[1:-1], method="lower"))
    group = np.searchsorted(edges, values, side="left")
    rows = []
    for g in np.unique(group):
        inside = group == g
        if not counts[inside].any():
            continue
        rows.append(
            {
                "min": int(values[inside].min()),
                "max": int(values[inside].max()),
                "n": int(inside.sum()),
                "accuracy": overall(right[inside], counts[inside]),
            }
        )
    return rows
