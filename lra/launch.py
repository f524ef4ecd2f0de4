"""One cell of a sweep in a process of its own: on this machine, or as an element of a SLURM job array.

A job of an array that is preempted or about to time out saves, asks for its place in the queue again and goes on from
there; one that was killed outright goes on when the sweep is submitted again. Cells that are done or still queued are
not submitted twice.
"""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lra.config import Cell

FOLDER, SUBMITTED = "slurm", "submitted.json"


class LaunchError(RuntimeError):
    """Jobs cannot be submitted; the message says what to do."""


@dataclass(frozen=True)
class Place:
    """Where a cell is computed, and where its data and results are: no part of its key.

    Accelerator, processes and threads change last digits, and processes the units that dropout drops.
    """

    cache_dir: str | None = None
    data_dir: str | None = None
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "nodes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")

    def absolute(self) -> "Place":
        """The same for a process that starts in another folder."""

        def whole(path: str | None) -> str | None:
            return None if path is None else str(Path(path).expanduser().resolve())

        return replace(self, cache_dir=whole(self.cache_dir), data_dir=whole(self.data_dir))


@dataclass(frozen=True)
class Slurm:
    """What each element of a SLURM job array asks for."""

    partition: str | None = None
    """Partition; null: the cluster's default."""
    account: str | None = None
    """Account that is charged; null: yours."""
    time: int = 1440
    """Minutes after which a job saves and queues again."""
    gpus: int = 1
    """GPUs per process; 0 on a partition without."""
    cpus: int = 4
    """CPU cores per process, which is also its number of threads if `threads` is null."""
    memory: int | None = None
    """GB per node; null: the partition's default."""
    parallel: int = 32
    """Jobs of an array that run at the same time."""
    grace: int = 90
    """Seconds before the time limit at which a job is told to save."""

    def __post_init__(self) -> None:
        for name in ("time", "cpus", "parallel", "grace"):
            if getattr(self, name) < 1:
                raise ValueError(f"slurm.{name} must be at least 1; got {getattr(self, name)}")
        if self.gpus < 0:
            raise ValueError(f"slurm.gpus must be at least 0; got {self.gpus}")
        if self.memory is not None and self.memory < 1:
            raise ValueError(f"slurm.memory must be at least 1, or null; got {self.memory}")


def has_result(cell: Cell, runs_dir: str | Path) -> bool:
    """Whether the cell has a result."""
    from lra.cell import RESULT

    return (Path(runs_dir) / cell.key / RESULT).exists()


def cores() -> int:
    """How many cores this process may use, which a batch system or a container may have restricted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_threads(place: Place) -> None:
    """Has torch use the threads of a place, if it names a number."""
    if place.threads is not None:
        import torch

        torch.set_num_threads(place.threads)


def compute(cell: Cell, runs_dir: str | Path, place: Place) -> dict[str, Any]:
    """Runs one cell at a place and returns its result, as `lra.cell.run_cell` does."""
    from lra.cell import run_cell

    use_threads(place)
    return run_cell(
        cell,
        runs_dir,
        cache_dir=place.cache_dir,
        data_dir=place.data_dir,
        accelerator=place.accelerator,
        devices=place.devices,
        nodes=place.nodes,
    )


def attempt(cell: Cell, runs_dir: str, place: Place, deadline: float | None = None) -> str | None:
    """Runs one cell and returns its error, or None; an interruption is not an error of the cell and goes on up.

    Raises:
        Interrupted: a signal, or `deadline`, a value of `time.monotonic()`, came first.
    """
    from lra.failures import explain
    from lra.interrupt import TIME_UP, Interrupted, until

    if deadline is not None and time.monotonic() >= deadline:
        raise Interrupted(f"{cell.key}: not begun", TIME_UP)
    try:
        with until(deadline):
            compute(cell, runs_dir, place)
    except Interrupted:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {explain(error)}"
    return None


def diverged(error: str) -> bool:
    """Whether an error that `attempt` returned is that of a training whose loss left the numbers."""
    return error.startswith(f"{FloatingPointError.__name__}:")


@dataclass(frozen=True)
class Job:
    """What an element of a job array runs; submitit pickles it."""

    cell: dict[str, Any]
    runs_dir: str
    place: Place

    def __call__(self) -> str:
        """Computes the cell and returns its key; what goes wrong is raised, so that SLURM calls the job failed."""
        from lra.config import cell_from_dict
        from lra.interrupt import Interrupted

        cell = cell_from_dict(self.cell)
        try:
            compute(cell, self.runs_dir, self.place)
        except Interrupted as stop:
            if stop.signum == signal.SIGTERM and os.environ.get("SLURM_JOB_ID"):
                # SLURM kills soon. Whether it requeues or cancels then is its to say: a job that left now has failed.
                while True:
                    signal.pause()
            raise
        return cell.key

    def checkpoint(self) -> Any:
        """What submitit puts in the queue after a preemption or a timeout: the same, which resumes by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(todo: Sequence[Cell], runs_dir: str | Path, place: Place, slurm: Slurm, cluster: str = "slurm") -> list[Any]:
    """Submits the cells that are not queued yet, one job each, fine-tuning after pretraining; returns submitit's jobs.

    Args:
        todo: cells without a result.
        runs_dir: folder of the results, which every node must see; scripts and logs go to its subfolder `slurm`.
        place: where the rest is.
        slurm: what a job asks for.
        cluster: slurm, or local for processes of submitit's on this machine, without a queue or a limit.

    Raises:
        LaunchError: submitit or SLURM is missing, or SLURM refuses.
    """
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise LaunchError(
            "launcher slurm: submitit is not installed: pip install 'linrnn[slurm]', or use --launcher local"
        ) from error

    from filelock import FileLock

    folder = Path(runs_dir).expanduser().resolve() / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    # Of two submissions at a time the second must see what the first has put in the queue.
    with FileLock(folder / ".lock"):
        return _submit_new(submitit, todo, folder, place, slurm, cluster)


def _submit_new(
    submitit: Any, todo: Sequence[Cell], folder: Path, place: Place, slurm: Slurm, cluster: str
) -> list[Any]:
    before = _submitted(folder)
    busy = _queued(before.values()) if cluster == "slurm" else set()
    new = [cell for cell in todo if before.get(cell.key) not in busy]
    jobs: list[Any] = []
    after: str | None = None
    for wave in ([c for c in new if c.regime == "pretrain"], [c for c in new if c.regime != "pretrain"]):
        if not wave:
            continue
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **_requeues(cluster))
            executor.update_parameters(**_parameters(slurm, place, after))
            made = executor.submit_array([_job(cell, folder.parent, place, slurm) for cell in wave])
        except (RuntimeError, OSError) as error:  # no srun; sbatch's own words, such as an invalid partition
            raise LaunchError(f"launcher {cluster}: {' '.join(str(error).split())}") from error
        jobs += made
        after = made[0].job_id.split("_")[0] if cluster == "slurm" else None
        before |= {cell.key: job.job_id for cell, job in zip(wave, made, strict=True)}
        _remember(folder, before)
    print(_status(len(todo) - len(new), jobs, folder, cluster), flush=True)
    return jobs


def _job(cell: Cell, runs_dir: Path, place: Place, slurm: Slurm) -> Job:
    return Job(cell.to_dict(), str(runs_dir), replace(place.absolute(), threads=place.threads or slurm.cpus))


def _requeues(cluster: str) -> dict[str, int]:
    """How often a job may time out: as often as it takes, each time it has come further."""
    return {"slurm_max_num_timeout": 1000} if cluster == "slurm" else {}


def _parameters(slurm: Slurm, place: Place, after: str | None) -> dict[str, Any]:
    """submitit's parameters, those of SLURM alone with its prefix, so that other clusters ignore them."""
    options = {"partition": slurm.partition, "account": slurm.account, "dependency": after and f"afterany:{after}"}
    memory = {} if slurm.memory is None else {"mem_gb": slurm.memory}
    gpus = {"gpus_per_node": slurm.gpus * place.devices} if slurm.gpus else {}
    return {
        "name": "lra",
        "timeout_min": slurm.time,
        "nodes": place.nodes,
        "tasks_per_node": place.devices,
        "cpus_per_task": slurm.cpus,
        **memory,
        **gpus,
        **{f"slurm_{key}": value for key, value in options.items() if value is not None},
        "slurm_array_parallelism": slurm.parallel,
        "slurm_signal_delay_s": slurm.grace,
        "slurm_additional_parameters": {"requeue": True},
    }


def _submitted(folder: Path) -> dict[str, str]:
    """Key to the job it was last submitted as."""
    from lra.files import read_json

    return read_json(folder / SUBMITTED) if (folder / SUBMITTED).exists() else {}


def _remember(folder: Path, jobs: dict[str, str]) -> None:
    from lra.files import write_json

    write_json(folder / SUBMITTED, jobs)


def _queued(ids: Any) -> set[str]:
    """Which of the jobs are waiting or running."""
    if not ids:
        return set()
    try:
        listed = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise LaunchError("launcher slurm: there is no squeue here; run it where SLURM's commands are") from error
    except subprocess.CalledProcessError as error:
        raise LaunchError(f"launcher slurm: squeue failed: {' '.join(error.stderr.split())}") from error
    return set(ids) & set(listed.stdout.split())


def _status(queued: int, jobs: Sequence[Any], folder: Path, cluster: str) -> str:
    numbers = sorted({job.job_id.split("_")[0] for job in jobs}, key=int)
    waiting = f"{queued} still queued, " if queued else ""
    text = f"{waiting}{len(jobs)} submitted{' as ' + ', '.join(numbers) if numbers else ''}"
    follow = f"squeue --me; cancel: scancel {' '.join(numbers)}; " if cluster == "slurm" and numbers else ""
    return (
        f"{text}\nFollow: {follow}logs in {folder}; results: lra report {folder.parent}; go on: the same command again"
    )
