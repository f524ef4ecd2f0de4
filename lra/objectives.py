"""What a run minimises: classification, masked denoising, causal denoising (Amos et al. 2024, arXiv:2310.02980).

Every objective maps a network and a batch to a `Score`. Random draws come from the generator that is passed in, which
the trainer seeds by (seed, step), so the noise of step t is the same in a resumed run. They are made for all rows of a
step, of which a process takes its share, so that several processes hide what one would.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.models import SequenceClassifier
from linrnn.models.classifier import pool
from lra.config import Compute
from lra.examples import Batch, Side, send
from lra.tasks.base import IGNORED, Ids, Levels

GRAYS = 256
# Under torch.compile sequences are padded to a multiple of this: few lengths, few compilations.
COMPILED_MULTIPLE = 128


class Score(NamedTuple):
    """Sums over what is scored (rows or positions), all 0-dim.

    loss; scored: how many; correct: right predictions; ink_scored, ink_correct: the same on levels above 0; residual,
    target, target2: squared errors, values and squared values of a regression.
    """

    loss: Tensor
    scored: Tensor
    correct: Tensor
    ink_scored: Tensor
    ink_correct: Tensor
    residual: Tensor
    target: Tensor
    target2: Tensor

    @classmethod
    def of(cls, loss: Tensor, scored: Tensor, **sums: Tensor) -> "Score":
        """A score of these sums; the others are 0."""
        zero = torch.zeros((), device=loss.device)
        return cls(loss, scored, *(sums.get(name, zero) for name in cls._fields[2:]))

    @property
    def mean(self) -> Tensor:
        """Mean loss; 0 when nothing was scored (short sequences may happen to have no masked position)."""
        return self.loss / self.scored.clamp(min=1)

    def plus(self, other: "Score") -> "Score":
        return Score(*(a + b for a, b in zip(self, other, strict=True)))

    def sums(self) -> Tensor:
        """All of them, without gradients: (8,) float64."""
        return torch.stack([part.detach().double() for part in self])


Metric = Literal["accuracy", "r2"]


def measures(sums: Sequence[float], metric: Metric) -> dict[str, float]:
    """Mean loss, the metric, and accuracy on ink where it was counted, of the sums of a `Score`.

    r2 is the share of the targets' variance that is explained: 1 is exact, 0 no better than their mean.
    """
    s = dict(zip(Score._fields, sums, strict=True))
    n = max(s["scored"], 1)
    if metric == "r2":
        value = 1 - s["residual"] / max(s["target2"] - s["target"] ** 2 / n, 1e-12)
    else:
        value = s["correct"] / n
    ink = {"ink_accuracy": s["ink_correct"] / s["ink_scored"]} if s["ink_scored"] else {}
    return {"loss": s["loss"] / n, metric: value, **ink}


class Net(nn.Module):
    """A `SequenceClassifier`, what its inputs are, and in pretraining a fresh linear head that predicts each position.

    Args:
        body: the classifier.
        inputs: ids, or levels; with a mask channel beside the levels `body` takes one channel more.
        d_model: width of the body's features.
        denoise: add the head.
        ink: denoising also scores levels above 0 alone, by cross-entropy.
    """

    denoise: nn.Linear | None

    def __init__(
        self, body: SequenceClassifier, inputs: Ids | Levels, d_model: int, *, denoise: bool = False, ink: bool = False
    ):
        super().__init__()
        self.body, self.inputs, self.ink = body, inputs, ink
        if isinstance(inputs, Ids):
            outputs, self.mask_channel = inputs.vocab_size, False
        else:
            outputs = inputs.channels * (1 if inputs.loss == "l1" else GRAYS)
            self.mask_channel = body.d_input == inputs.channels + 1
        self.denoise = nn.Linear(d_model, outputs) if denoise else None
        self.precision, self.multiple = "32", 1

    def computed(self, how: Compute) -> "Net":
        """Sets how the body is computed, in training and evaluation alike; the names of its tensors stay."""
        self.precision = how.precision
        if how.compile:
            self.multiple = COMPILED_MULTIPLE
            # some layers are compiled for every length; beyond the limit, 8, they would run uncompiled
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            # what stands around the blocks looks at its inputs, which a compiler cannot
            self.body.backbone.compile(dynamic=True)
        return self

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def read(self, inputs: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Inputs of the body: ids (B, T), or real values (B, T, C), and a channel that marks hidden positions."""
        if isinstance(self.inputs, Ids):
            return inputs if hidden is None else torch.where(hidden, self.inputs.mask_id, inputs)
        x = self.normalised(inputs)
        if hidden is not None:
            x = x.masked_fill(hidden[..., None], 0.0)
        if not self.mask_channel:
            return x
        channel = torch.zeros_like(x[..., :1]) if hidden is None else hidden[..., None].to(x.dtype)
        return torch.cat((x, channel), -1)

    def normalised(self, levels: Tensor) -> Tensor:
        assert isinstance(self.inputs, Levels)
        return (levels.float() - self.inputs.mean) / self.inputs.std

    def classify(self, batch: Batch, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Logits and labels: (B, n_classes) and (B,), or (B, asked, n_classes) and (B, asked) of a dense task.

        Rows of a dense task with fewer labels are filled up with positions whose label is -100.

        Args:
            window: inputs are cut into windows of so many positions, none of which sees another before the pooling.
        """
        first, second, labels = batch.first, batch.second, batch.labels
        with self.autocast(first.inputs.device):
            a = self.pooled(first, window)
            b = None if second is None else self.pooled(second, window)
        if labels.ndim == 2:
            # the head may have thousands of outputs: only where there is a label, and without a count to wait for
            at = (labels == IGNORED).long().argsort(dim=1, stable=True)[:, : batch.asked]  # (B, asked)
            a, labels = a.gather(1, at[..., None].expand(-1, -1, a.shape[-1])), labels.gather(1, at)
        return self.body.read_out(self.exact(a), None if b is None else self.exact(b)), labels

    def pooled(self, side: Side, window: int | None) -> Tensor:
        """Features of one input, pooled: (B, d_model), or (B, T, d_model) of a dense task."""
        x = self.read(side.inputs)
        if window is None:
            return self.body.pool(x, side.mask)
        (B, T), n = x.shape[:2], -(-side.inputs.shape[1] // window)
        short = n * window - T
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, short)).unflatten(1, (n, window)).flatten(0, 1)
        mask = F.pad(side.real, (0, short)).view(B * n, window)
        h = self.body.features(x, mask).view(B, n * window, -1)[:, :T]
        return h if self.body.pooling == "none" else pool(h, side.mask, self.body.pooling)

    def exact(self, features: Tensor) -> Tensor:
        """Features in the type of the weights: the heads, outside of autocast, compute in float32."""
        return features.to(next(self.body.head.parameters()).dtype)

    def recover(self, inputs: Tensor, mask: Tensor | None, hidden: Tensor | None, at: Tensor) -> Tensor:
        """Predictions at the positions `at` (n,), counted through the rows one after another: (n, outputs)."""
        if self.denoise is None:
            raise RuntimeError("this network was built without a denoising head")
        with self.autocast(inputs.device):
            features = self.body.features(self.read(inputs, hidden), mask)
        return self.denoise(self.exact(features.flatten(0, 1)[at]))


def classification(net: Net, batch: Batch) -> Score:
    """Cross-entropy of the labels; positions of a dense task without a label count for nothing."""
    logits, labels = net.classify(batch)
    if labels.ndim == 2:
        logits, labels = logits.flatten(0, 1), labels.flatten()
    asked = labels != IGNORED
    return cross_entropy(logits, labels.where(asked, 0), asked)


def masked_denoising(net: Net, batch: Batch, generator: torch.Generator, *, rate: float) -> Score:
    """Recovers masked positions from both sides.

    Each real position is hidden with probability `rate`, always by the mask symbol (a level by the mean and a mark in a
    channel of its own); only hidden positions are scored; padding is neither hidden nor scored. Of two inputs each is
    masked on its own.
    """
    score = None
    for side in batch.sides:
        drawn = draw_mask(side, batch.share, rate, generator)
        hidden = send(drawn, side.inputs.device) & side.real
        at, counts = positions(drawn, hidden)
        predicted = net.recover(side.inputs, side.mask, hidden, at)
        part = recovered(net, predicted, side.inputs.flatten(0, 1)[at], counts)
        score = part if score is None else score.plus(part)
    assert score is not None
    return score


def causal_denoising(net: Net, batch: Batch) -> Score:
    """Predicts each next position from the past: position t is scored on t + 1, the last one on nothing."""
    score = None
    for side in batch.sides:
        real = side.real
        follows = real & real.roll(-1, 1)
        picked = torch.ones(real.shape, dtype=torch.bool)
        picked[:, -1] = False
        at, counts = positions(picked, follows)
        target = side.inputs.roll(-1, 1).flatten(0, 1)[at]
        part = recovered(net, net.recover(side.inputs, side.mask, None, at), target, counts)
        score = part if score is None else score.plus(part)
    assert score is not None
    return score


def recovered(net: Net, predicted: Tensor, target: Tensor, counts: Tensor) -> Score:
    """Scores predictions (n, outputs) of targets: ids (n,), or levels (n, C), by the loss the inputs ask for.

    Ink is a level above 0; where levels are read as ids, the id is the level.

    Args:
        counts: which of the n positions count, (n,) bool.
    """
    if isinstance(net.inputs, Ids):
        return with_ink(net, predicted, target, counts)
    counts = counts[:, None].expand(target.shape)  # (n, C)
    if net.inputs.loss == "l1":
        wanted = net.normalised(target).where(counts, 0)
        error = predicted.float().where(counts, 0) - wanted
        sums = {"residual": (error.detach() ** 2).sum(), "target": wanted.sum(), "target2": (wanted**2).sum()}
        return Score.of(error.abs().sum(), counts.sum(), **sums)
    logits, levels = predicted.unflatten(-1, (net.inputs.channels, GRAYS)).flatten(0, 1), target.flatten().long()
    return with_ink(net, logits, levels, counts.flatten())


def with_ink(net: Net, logits: Tensor, targets: Tensor, counts: Tensor) -> Score:
    """`cross_entropy`, and the predictions on ink by themselves if the task has any."""
    score = cross_entropy(logits, targets, counts)
    if not net.ink:
        return score
    ink = (targets > 0) & counts
    hits = (logits.argmax(-1) == targets) & ink
    return score._replace(ink_scored=ink.sum(), ink_correct=hits.sum())


def draw_mask(side: Side, share: tuple[int, int], rate: float, generator: torch.Generator) -> Tensor:
    """Picks positions with probability `rate`, of which the real ones are to be hidden: (B, T) bool on the CPU.

    Drawn there and for the rows of all processes, so that every device and any number of them hides the same.
    """
    (B, T), (rank, world) = side.inputs.shape[:2], share
    return torch.rand((B * world, T), generator=generator)[rank::world] < rate


def positions(picked: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The positions picked, counted through the rows: (n,), and which of them are wanted, (n,) bool.

    `picked` (B, T) is on the CPU, so how many there are is known without asking a GPU, which would have to finish all
    its work to answer. In place of one that is not `wanted` (B, T) stands position 0, which is real.
    """
    at = send(picked.flatten().nonzero()[:, 0], wanted.device)
    counts = wanted.flatten()[at]
    return at.where(counts, 0), counts


def denoising(
    kind: Literal["masked", "causal"], net: Net, batch: Batch, generator: torch.Generator, *, rate: float
) -> Score:
    """The pretraining objective by name."""
    if kind == "masked":
        return masked_denoising(net, batch, generator, rate=rate)
    return causal_denoising(net, batch)


def cross_entropy(logits: Tensor, targets: Tensor, counts: Tensor) -> Score:
    """Scores logits (n, classes) of targets (n,) where `counts` (n,) bool."""
    loss = F.cross_entropy(logits.float(), targets, reduction="none").where(counts, 0).sum()
    return Score.of(loss, counts.sum(), correct=((logits.argmax(-1) == targets) & counts).sum())
