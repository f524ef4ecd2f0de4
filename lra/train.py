"""One run under Lightning's Trainer: batches, optimiser, evaluations, checkpoints, exact resume.

Everything random is a function of (seed, step), and everything that happens at a step (update, evaluation, row of
metrics, checkpoint) happens at the end of that step's batch, so the checkpoint of step s holds all of steps 1 to s and
nothing of step s + 1: a run resumed from it equals an uninterrupted one bit for bit (same machine, same threads).
"""

import logging
import math
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from linrnn.models import param_groups
from lra.batches import Batch, BatchStream, Examples, stream_seed
from lra.config import Cell
from lra.differences import plan_differences
from lra.evaluate import Scorer, evaluate
from lra.files import write_csv, write_whole
from lra.interrupt import Flag, Interrupted, listening
from lra.objectives import Metric, Net, Score, measures
from lra.progress import Progress

# In a cell's folder: the weights that are kept, the state a run resumes from, the curve.
BEST, LAST, METRICS = "best.safetensors", "last.ckpt", "metrics.csv"


class Trainee(LightningModule):
    """The network, its objective and its optimiser, for the steps of one cell."""

    def __init__(self, net: Net, score: Scorer, cell: Cell):
        super().__init__()
        self.net, self.score, self.cell = net, score, cell
        self.plan = cell.plan()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(stream_seed(self.cell.seed, "noise", self.global_step))
        score = self.score(self.net, batch, generator)
        return {"loss": score.mean, "sums": score.sums()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optim, lr = self.cell.optim, self.cell.lr
        optimizer = torch.optim.AdamW(param_groups(self.net, lr, optim.weight_decay), lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(self.cell, step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["plan"] = self.plan
        checkpoint["threads"] = torch.get_num_threads()


def lr_factor(cell: Cell, step: int) -> float:
    """Learning rate at `step` (from 0) over its peak: a linear rise, then constant or half a cosine down to 0."""
    warmup = round(cell.optim.warmup * cell.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if cell.optim.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(cell.steps - warmup, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Stream(LightningDataModule):
    """The batch stream; its whole state is the step it has reached."""

    def __init__(self, stream: BatchStream):
        super().__init__()
        self.stream = stream

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.stream, batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)

    def state_dict(self) -> dict[str, int]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.stream.start = state_dict["step"]


class Recorder(Callback):
    """Keys the dropout to the step, keeps the metrics, scores the validation split, writes weights and checkpoints."""

    def __init__(
        self,
        folder: Path,
        cell: Cell,
        val: Examples,
        metric: Metric,
        stream: BatchStream,
        flag: Flag,
        progress: Progress,
    ):
        self.folder, self.cell, self.val, self.metric, self.stream = folder, cell, val, metric, stream
        self.flag, self.progress = flag, progress
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.sums = torch.zeros(len(Score._fields), dtype=torch.float64)  # since the last row
        self.seconds = 0.0
        self.due = False  # an evaluation of the newest step that a signal has put off
        self.since = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best": self.best,
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
            "loader_seconds": self.stream.seconds,
            "due": self.due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stream.seconds = state_dict["loader_seconds"]
        self.rows, self.best, self.seconds, self.due = (state_dict[k] for k in ("rows", "best", "seconds", "due"))
        self.sums = torch.tensor(state_dict["sums"], dtype=torch.float64)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.sums = self.sums.to(pl_module.device)
        self.since = time.monotonic()
        if self.rows:
            self.progress.note(self.rows[-1]["train_loss"], self.rows[-1][f"val_{self.metric}"])
        self.catch_up(pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        torch.manual_seed(stream_seed(self.cell.seed, "dropout", trainer.global_step))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step, cell = trainer.global_step, self.cell
        self.sums += outputs["sums"]

        last = step == cell.steps
        self.due = last or step % cell.eval_every == 0
        with suppress(Interrupted):  # raised below, once the state is saved
            self.catch_up(pl_module, step)
        now = time.monotonic()
        self.seconds, self.since = self.seconds + now - self.since, now
        stop = self.flag.signum
        if last or stop is not None or step % cell.budget.checkpoint_every == 0:
            write_whole(self.folder / LAST, trainer.save_checkpoint)
        if stop is not None and (self.due or not last):
            raise Interrupted(f"stopped at step {step} of {cell.steps}", stop)

    def catch_up(self, pl_module: LightningModule, step: int) -> None:
        """Does the evaluation of `step` if it is due.

        Raises:
            Interrupted: a signal came first; the evaluation stays due.
        """
        if not self.due:
            return
        assert isinstance(pl_module, Trainee)
        trained = measures(self.sums.tolist(), self.metric)
        if not math.isfinite(trained["loss"]):
            raise FloatingPointError(
                f"the training loss is {trained['loss']} at step {step}: lower the learning rate (now {self.cell.lr})"
            )
        scored = evaluate(pl_module.net, pl_module.score, self.val, self.cell.seed, self.metric, self.flag)
        row = {
            "step": step,
            "train_loss": trained["loss"],
            f"train_{self.metric}": trained[self.metric],
            **{f"val_{name}": value for name, value in scored.items()},
        }
        self.rows = [*self.rows, row]
        self.sums, self.due = torch.zeros_like(self.sums), False
        self.progress.note(row["train_loss"], row[f"val_{self.metric}"])
        # Of equal scores the earlier one stays: less training for the same.
        if not self.best or row[f"val_{self.metric}"] > self.best[f"val_{self.metric}"]:
            self.best = row
            weights = {name: tensor.detach().cpu().clone() for name, tensor in pl_module.net.state_dict().items()}
            write_whole(self.folder / BEST, lambda path: save_file(weights, path))
        write_csv(self.folder / METRICS, self.rows)


def fit(
    net: Net,
    score: Scorer,
    cell: Cell,
    train: Examples,
    val: Examples,
    folder: Path,
    *,
    metric: Metric = "accuracy",
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
) -> dict[str, Any]:
    """Trains `net` for the steps of `cell`, resuming from `last.ckpt` in `folder` if it is there.

    Leaves `metrics.csv`, `best.safetensors` (the weights of the best validation metric, the earliest of equals) and
    `last.ckpt` in `folder`; returns the curve, the best row, seconds in all and waiting for batches, and the device.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved first.
        ValueError: `last.ckpt` is damaged or belongs to another configuration, or there is no such device.
        FloatingPointError: the loss is no longer finite.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # advertisements and device listings
    trainee = Trainee(net, score, cell)
    last = folder / LAST
    if last.exists():
        check_resumable(last, trainee.plan)
    with listening() as flag, warnings.catch_warnings():
        # The stream is in memory: workers would only copy it. And the last two come from inside the libraries.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        progress = Progress(cell.key, cell.steps)
        stream = BatchStream(train, cell.optim.batch_size, cell.seed)
        recorder = Recorder(folder, cell, val, metric, stream, flag, progress)
        trainer = Trainer(
            accelerator=device_kind(accelerator),
            devices=1,
            max_epochs=-1,
            max_steps=cell.steps,
            gradient_clip_val=cell.optim.clip,
            callbacks=[recorder, progress],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(
            trainee, datamodule=Stream(stream), ckpt_path=str(last) if last.exists() else None, weights_only=True
        )
        recorder.catch_up(trainee, cell.steps)  # a run that was stopped at its very end has no step left to do it
    return {
        "curve": recorder.rows,
        "best": recorder.best,
        "seconds": recorder.seconds,
        "loader_seconds": stream.seconds,
        "device": _device_name(trainer.strategy.root_device),
    }


def check_resumable(path: Path, plan: dict[str, Any]) -> None:
    """Refuses a checkpoint that is damaged or of another configuration, naming what differs."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        theirs, threads = checkpoint["plan"], checkpoint["threads"]
    except Exception as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); delete it to start this run again") from error
    if differences := plan_differences(theirs, plan):
        raise ValueError(
            f"{path} is a checkpoint of another run ({'; '.join(differences)}); move it away to start this run again"
        )
    if threads != torch.get_num_threads():
        warnings.warn(
            f"{path} was written with {threads} threads and is resumed with {torch.get_num_threads()}: "
            f"the last bits of the result may differ",
            stacklevel=2,
        )


def device_kind(accelerator: str) -> str:
    """`gpu` or `cpu`; auto is the GPU if torch sees one.

    Raises:
        ValueError: gpu is asked for and there is none.
    """
    here = torch.cuda.is_available()
    if accelerator == "gpu" and not here:
        raise ValueError("accelerator gpu: torch sees no GPU here; use auto or cpu")
    return "gpu" if here and accelerator != "cpu" else "cpu"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
