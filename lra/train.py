"""One run under Lightning's Trainer: batches, optimiser, evaluations, checkpoints, exact resume.

Everything random is a function of (seed, step), and everything that happens at a step (update, evaluation, row of
metrics, checkpoint) happens at the end of that step's batch, so the checkpoint of step s holds all of steps 1 to s and
nothing of step s + 1: a run resumed from it equals an uninterrupted one bit for bit (same machine, same threads, same
number of processes).
"""

import logging
import math
import signal
import threading
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from lra.batches import BatchStream, stream_seed
from lra.checkpoints import LAST, METRICS, WholeFile, check_resumable, keep_weights, notes, write_weights
from lra.config import Cell
from lra.distributed import SOLO, Team, check_shares, device_kind
from lra.evaluate import Scorer, evaluate
from lra.examples import Batch, Examples, resident
from lra.files import write_csv
from lra.interrupt import Flag, Interrupted, listening
from lra.objectives import Metric, Net, Score, measures
from lra.progress import Progress
from lra.trainee import Trainee


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
        team: Team,
        file: WholeFile,
    ):
        self.folder, self.cell, self.val, self.metric, self.stream = folder, cell, val, metric, stream
        self.flag, self.progress, self.team, self.file = flag, progress, team, file
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        # Of this process, since the last row; they stay on the device until then. In a checkpoint: those of each one.
        self.sums = torch.zeros(len(Score._fields), dtype=torch.float64)
        self.shares: list[list[float]] = []
        self.seconds = 0.0
        self.due = False  # an evaluation of the newest step that a signal has put off
        self.since = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "best": self.best,
            "sums": self.shares,
            "seconds": self.seconds,
            "loader_seconds": self.stream.seconds,
            "due": self.due,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stream.seconds = state_dict["loader_seconds"]
        self.rows, self.best, self.seconds, self.due = (state_dict[k] for k in ("rows", "best", "seconds", "due"))
        if self.team.leads:
            keep_weights(self.folder, self.best)
        shares = torch.tensor(state_dict["sums"], dtype=torch.float64)
        if len(shares) == self.team.world:
            self.sums = shares[self.team.rank]
        elif self.team.leads:  # written by another number of processes
            self.sums = shares.sum(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has put a handler of its own before that of `listening`: it calls the other processes from inside
        # the signal, and all of them before every batch, each time waiting for the GPU. This one comes back.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.sums = self.sums.to(pl_module.device)
        self.since = time.monotonic()
        if self.rows:
            self.progress.note(self.rows[-1]["train_loss"], self.rows[-1][f"val_{self.metric}"])
        self.catch_up(pl_module, trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        stream = "dropout" if self.team.leads else f"dropout {self.team.rank}"  # no two processes drop the same units
        torch.manual_seed(stream_seed(self.cell.seed, stream, trainer.global_step))

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
        stop = self.team.largest(self.flag.signum or 0)
        if last or stop or step % cell.budget.checkpoint_every == 0:
            self.save(trainer)
        if stop and (self.due or not last):
            raise Interrupted(f"stopped at step {step} of {cell.steps}", stop)

    def save(self, trainer: Trainer) -> None:
        """Writes the checkpoint in the first process, and only then has the weights that it names as the best kept.

        What goes wrong there is raised in all processes.
        """

        def check_and_keep() -> None:
            self.file.check()
            keep_weights(self.folder, self.best)

        self.shares = self.team.all(self.sums)
        trainer.save_checkpoint(self.folder / LAST, weights_only=False)
        self.team.tell(check_and_keep)

    def catch_up(self, pl_module: LightningModule, step: int) -> None:
        """Does the evaluation of `step` if it is due.

        Raises:
            Interrupted: a signal came first; the evaluation stays due.
        """
        if not self.due:
            return
        assert isinstance(pl_module, Trainee)
        trained = measures(self.team.total(self.sums).tolist(), self.metric)
        if not math.isfinite(trained["loss"]):
            raise FloatingPointError(
                f"the training loss is {trained['loss']} at step {step}: lower the learning rate (now {self.cell.lr})"
            )
        scored = evaluate(pl_module.net, pl_module.score, self.val, self.cell.seed, self.metric, self.flag, self.team)
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
        better = not self.best or self.value(row) > self.value(self.best)
        self.best = row if better else self.best
        self.team.tell(lambda: self.write(pl_module.net if better else None))

    def value(self, row: dict[str, float]) -> float:
        """The validation score of a row; nan is worse than any."""
        value = row[f"val_{self.metric}"]
        return -math.inf if math.isnan(value) else value

    def write(self, net: Net | None) -> None:
        """Writes the curve, and the weights of `net`."""
        if net is not None:
            write_weights(self.folder, self.best, net)
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
    fingerprint: str | None = None,
    accelerator: str = "auto",
    team: Team = SOLO,
) -> dict[str, Any]:
    """Trains `net` for the steps of `cell`, resuming from `last.ckpt` in `folder` if it is there.

    The processes of `team` share every batch; all of them call this, the first one writes.

    Leaves `metrics.csv`, `best.safetensors` (the weights of the best validation metric, the earliest of equals) and
    `last.ckpt` in `folder`; returns the curve, the best row, the device, and by the clock of the first process the
    seconds in all and those of waiting for batches (device seconds are these times the number of processes).

    Args:
        fingerprint: of the data, which a checkpoint to resume from must share.

    Raises:
        Interrupted: a signal to one of the processes, or a deadline; the state is saved first.
        ValueError: `last.ckpt` is damaged or belongs to another configuration or other data, there is no such device,
            or the processes cannot share a batch evenly.
        OSError: a file cannot be written; the one before it stays.
        FloatingPointError: the loss is no longer finite.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # advertisements and device listings
    ours = notes(cell.plan(), fingerprint, team.world, device_kind(accelerator))
    trainee = Trainee(net, score, cell, ours, team)
    stream = BatchStream(train, cell.optim.batch_size, cell.seed, team.rank, team.world, net.multiple)
    check_shares(stream.plan.batch_size, team.world)  # of few training rows they may be less than the cell's
    last = folder / LAST
    if resumes := team.tell(last.exists):
        check_resumable(last, ours)
    with listening() as flag, warnings.catch_warnings():
        # The stream is in memory: workers would only copy it. And the last two come from inside the libraries.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
        warnings.filterwarnings("ignore", message=".*srun. command is available.*")  # on a login node
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        file, progress = WholeFile(), Progress(cell.key, cell.steps, metric, quiet=not team.leads)
        recorder = Recorder(folder, cell, val, metric, stream, flag, progress, team, file)
        trainer = Trainer(
            accelerator=device_kind(accelerator),
            devices=team.devices,
            num_nodes=team.nodes,
            # Pretraining leaves the classifier's head idle.
            strategy=DDPStrategy(find_unused_parameters=cell.regime == "pretrain") if team.world > 1 else "auto",
            # named, or Lightning would take a SLURM job for its own and requeue it
            plugins=[file, team.environment or LightningEnvironment()],
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
        # In memory there it costs a step nothing to make its batch.
        stream.examples, recorder.val = (resident(split, trainer.strategy.root_device) for split in (train, val))
        trainer.fit(trainee, datamodule=Stream(stream), ckpt_path=str(last) if resumes else None, weights_only=True)
        net.to(trainer.strategy.root_device)  # Lightning has taken it off
        if recorder.due:  # a run that was stopped at its very end has no step left to do it
            recorder.catch_up(trainee, cell.steps)
            recorder.save(trainer)
    return {
        "curve": recorder.rows,
        "best": recorder.best,
        "seconds": recorder.seconds,
        "loader_seconds": stream.seconds,
        "device": _device_name(trainer.strategy.root_device),
        "processes": team.world,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
