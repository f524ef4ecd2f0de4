"""What Lightning trains: a network with its objective, its optimiser and the course of its learning rate."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from linrnn.models import param_groups
from lra.batches import stream_seed
from lra.config import Cell
from lra.distributed import SOLO, Team
from lra.evaluate import Scorer
from lra.examples import Batch
from lra.objectives import Net


class Trainee(LightningModule):
    """The network, its objective and its optimiser, for the steps of one cell.

    Args:
        notes: what a checkpoint holds beside the state, for `check_resumable`.
    """

    def __init__(self, net: Net, score: Scorer, cell: Cell, notes: dict[str, Any], team: Team = SOLO):
        super().__init__()
        self.net, self.score, self.cell, self.notes, self.team = net, score, cell, notes, team

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(stream_seed(self.cell.seed, "noise", self.global_step))
        score = self.score(self.net, batch, generator)
        if self.team.world == 1:
            return {"loss": score.mean, "sums": score.sums()}
        # The processes' gradients are averaged, and what they score differs in number: the mean of means is not it.
        everything = self.team.total(score.scored).clamp(min=1)
        return {"loss": self.team.world * score.loss / everything, "sums": score.sums()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optim, lr = self.cell.optim, self.cell.lr
        optimizer = torch.optim.AdamW(param_groups(self.net, lr, optim.weight_decay), lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(self.cell, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.notes)


def lr_factor(cell: Cell, step: int) -> float:
    """Learning rate at `step` (from 0) over its peak: a linear rise, then constant or half a cosine down to 0."""
    warmup = round(cell.optim.warmup * cell.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if cell.optim.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(cell.steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
