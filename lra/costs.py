"""Floating-point operations of a run: the multiplications that `linrnn.flops` counts, forward and backward.

6 operations for each multiplication of a forward pass: an addition goes with it, and a backward pass makes two products
(for the gradient of either factor) where the forward pass made one. So attention is counted by its pairs of positions,
causal or not, a recurrence as it is written, a matrix once per position. Not counted are what `linrnn.flops` leaves out
(norms, activations, embeddings of ids), evaluation on the validation split, the optimiser, and padding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch

import linrnn
from linrnn.models import SequenceClassifier
from lra.config import Model
from lra.networks import build_net
from lra.tasks.base import Task

PER_MULTIPLICATION = 6
Denoising = Literal["masked", "causal"]


def sequence_flops(
    model: Model, task: Task, length: int, *, denoise: Denoising | None = None, asked: int | None = None
) -> float:
    """Operations of training on one row with `length` positions; of two inputs each has that many.

    Args:
        model, task: what is trained.
        length: positions of the row.
        denoise: count pretraining, whose head is read at hidden positions or at all but one, instead of the classifier.
        asked: of a dense task, the most labels of a row (`Examples.asked`), at as many positions of each row the head
            is read; None for every position.

    Raises:
        ValueError: a model that cannot be built.
    """
    return run_flops(model, task, {length: 2 if task.two_inputs else 1}, denoise=denoise, asked=asked)


def run_flops(
    model: Model,
    task: Task,
    histogram: Mapping[int, int],
    *,
    denoise: Denoising | None = None,
    asked: int | None = None,
) -> float:
    """Operations of training on `histogram[length]` sequences of each length; two inputs of a row are two sequences.

    Exact, without allocating weights, and a fraction of a second for hundreds of lengths. Arguments as in
    `sequence_flops`; a sequence of length 0 is read as one position of padding.
    """
    with torch.device("meta"):
        net = build_net(replace(model, n_layers=1), task, denoise=denoise, seed=0)  # all blocks cost the same
    total = 0.0
    for length, n in histogram.items():
        total += n * _multiplications(net.body, max(length, 1), model.n_layers)
        if net.denoise is not None:
            total += n * _scored(length, task.mask_rate, denoise) * net.denoise.weight.numel()
    if net.denoise is None:
        total += _heads(net.body, histogram, asked)
    return PER_MULTIPLICATION * total


def _multiplications(body: SequenceClassifier, length: int, n_layers: int) -> int:
    """Of one sequence, without heads."""
    with_cls = length + (0 if body.cls is None else 1)
    return linrnn.flops(body.embed, length) + n_layers * linrnn.flops(body.backbone.blocks[0], with_cls)


def _scored(length: int, mask_rate: float, denoise: Denoising | None) -> float:
    """Positions that pretraining predicts, in the mean."""
    return mask_rate * length if denoise == "masked" else max(length - 1, 0)


def _heads(body: SequenceClassifier, histogram: Mapping[int, int], asked: int | None) -> float:
    """Of the classifier: once a row, or at the positions that are asked."""
    read = sum(n * (min(length, asked or length) if body.pooling == "none" else 1) for length, n in histogram.items())
    return linrnn.flops(body.head, 1) * read / (2 if body.two_inputs else 1)
