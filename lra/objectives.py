"""What a run minimises: classification, masked denoising, causal denoising (Amos et al. 2024, arXiv:2310.02980).

Every objective maps a network and a batch to a `Score`. Random draws come from the generator that is passed in, which
the trainer seeds by (seed, step), so the noise of step t is the same in a resumed run.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.models import SequenceClassifier
from lra.batches import Batch


class Score(NamedTuple):
    """Summed over what is scored (sequences or positions): `loss` and `correct`; `scored` is how many, all 0-dim."""

    loss: Tensor
    correct: Tensor
    scored: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean loss; 0 when nothing was scored (short sequences may happen to have no masked position)."""
        return self.loss / self.scored.clamp(min=1)


class Net(nn.Module):
    """A `SequenceClassifier` with, in pretraining, a fresh linear head that predicts a token at every position."""

    denoise: nn.Linear | None

    def __init__(self, body: SequenceClassifier, d_model: int, vocab_size: int | None = None):
        super().__init__()
        self.body = body
        self.denoise = None if vocab_size is None else nn.Linear(d_model, vocab_size)

    def tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token logits at every position: ids (B, T), mask (B, T) -> (B, T, vocab)."""
        if self.denoise is None:
            raise RuntimeError("this network was built without a denoising head")
        return self.denoise(self.body.features(ids, mask))


def classification(net: Net, batch: Batch) -> Score:
    """Cross-entropy of the labels."""
    return _score(net.body(batch.ids, batch.mask), batch.labels)


def masked_denoising(net: Net, batch: Batch, generator: torch.Generator, *, mask_id: int, rate: float) -> Score:
    """Recovers masked tokens from both sides.

    Each real position is hidden with probability `rate`, always by the mask symbol; only hidden positions are scored;
    padding is neither hidden nor scored.
    """
    hidden = draw_mask(batch.mask, rate, generator)
    logits = net.tokens(torch.where(hidden, mask_id, batch.ids), batch.mask)
    return _score(logits[hidden], batch.ids[hidden])


def causal_denoising(net: Net, batch: Batch) -> Score:
    """Predicts each next token from the past: position t is scored on token t + 1, the last one on nothing."""
    logits = net.tokens(batch.ids, batch.mask)[:, :-1]
    real = batch.mask[:, 1:]
    return _score(logits[real], batch.ids[:, 1:][real])


def draw_mask(mask: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Hides real positions with probability `rate`; drawn on the CPU, so that every device hides the same ones."""
    drawn = torch.rand(mask.shape, generator=generator) < rate
    return drawn.to(mask.device) & mask


def denoising(
    kind: Literal["masked", "causal"], net: Net, batch: Batch, generator: torch.Generator, *, mask_id: int, rate: float
) -> Score:
    """The pretraining objective by name."""
    if kind == "masked":
        return masked_denoising(net, batch, generator, mask_id=mask_id, rate=rate)
    return causal_denoising(net, batch)


def _score(logits: Tensor, targets: Tensor) -> Score:
    loss = F.cross_entropy(logits.float(), targets, reduction="sum")
    correct = (logits.argmax(-1) == targets).sum()
    return Score(loss, correct, torch.tensor(targets.numel(), device=logits.device))
