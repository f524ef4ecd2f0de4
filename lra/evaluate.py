"""Scores of a network on a whole split: a pure function of weights, split and seed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lra.batches import Batch, Tokens, evaluation_batches, stream_seed
from lra.interrupt import Flag, Interrupted
from lra.objectives import Net, Score

Scorer = Callable[[Net, Batch, torch.Generator], Score]


@torch.no_grad()
def evaluate(net: Net, score: Scorer, tokens: Tokens, seed: int, flag: Flag | None = None) -> dict[str, float]:
    """Mean loss and accuracy over a split, in eval mode; the mode of `net` is restored.

    The noise of a denoising objective is drawn from `seed`, so every evaluation of a run hides the same positions.

    Raises:
        Interrupted: a signal arrived in `flag`.
    """
    device = next(net.parameters()).device
    training = net.training
    net.eval()
    loss = correct = count = 0.0
    try:
        for i, (_, batch) in enumerate(evaluation_batches(tokens)):
            if flag is not None and flag.signum is not None:
                raise Interrupted("stopped during an evaluation", flag.signum)
            generator = torch.Generator().manual_seed(stream_seed(seed, "evaluate", i))
            part = score(net, Batch(*(t.to(device) for t in batch)), generator)
            loss, correct, count = loss + part.loss.item(), correct + part.correct.item(), count + part.scored.item()
    finally:
        net.train(training)
    return {"loss": loss / max(count, 1), "accuracy": correct / max(count, 1)}


@torch.no_grad()
def predictions(net: Net, tokens: Tokens) -> np.ndarray:
    """Predicted class of every sequence of a split, in its order: (n,) int64."""
    device = next(net.parameters()).device
    net.eval()
    predicted = np.empty(len(tokens), dtype=np.int64)
    for rows, batch in evaluation_batches(tokens):
        predicted[rows] = net.body(batch.ids.to(device), batch.mask.to(device)).argmax(-1).cpu().numpy()
    return predicted


def by_length(correct: np.ndarray, lengths: np.ndarray, buckets: int = 4) -> list[dict[str, Any]]:
    """Accuracy in groups of about equal size, shortest sequences first: length range, number, accuracy.

    Sequences of one length are never split between groups, so there may be fewer groups than asked for.
    """
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, buckets + 1)[1:-1], method="lower"))
    group = np.searchsorted(edges, lengths, side="left")
    rows = []
    for g in np.unique(group):
        inside = group == g
        rows.append(
            {
                "min": int(lengths[inside].min()),
                "max": int(lengths[inside].max()),
                "n": int(inside.sum()),
                "accuracy": float(correct[inside].mean()),
            }
        )
    return rows
