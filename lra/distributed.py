"""Processes that train one cell together: who they are, what they agree on, what their batch system says of them.

Each has its share of the rows of every batch; the first one, which leads, alone writes files. What only one of them
can know (a signal, an error of the disk, a result that is already there) is told to all before anyone acts on it, since
a process that leaves alone would have the others wait for it. That goes through the CPU, so that no step has to wait
for a GPU to catch up.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

T = TypeVar("T")
CPU = torch.device("cpu")
# The others wait while the first one generates data or scores the test split.
PATIENCE = timedelta(days=1)


@dataclass(frozen=True)
class Team:
    """The processes of a cell, seen from one of them: its `rank` of `world`, on `nodes` machines of `devices` each."""

    rank: int = 0
    world: int = 1
    devices: int = 1
    nodes: int = 1
    environment: "ClusterEnvironment | None" = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, decide: Callable[[], T]) -> T:
        """Returns in every process what `decide` returns in the first one, or raises what it raises there."""
        if self.world == 1:
            return decide()
        said: list[Any] = [None, None]
        if self.leads:
            try:
                said[0] = decide()
            except Exception as error:
                said[1] = portable(error)
        dist.broadcast_object_list(said, device=CPU)
        if said[1] is not None:
            raise said[1]
        return said[0]

    def total(self, values: Tensor) -> Tensor:
        """The sum over the processes of a tensor on any device."""
        if self.world == 1:
            return values
        values = values.clone()
        dist.all_reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world == 1:
            return value
        values = torch.tensor([value])
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def all(self, values: Tensor) -> list[list[float]]:
        """The float64 values (n,) of each process, in the order of their ranks."""
        if self.world == 1:
            return [values.tolist()]
        ours = values.to(CPU)
        theirs = [torch.empty_like(ours) for _ in range(self.world)]
        dist.all_gather(theirs, ours)
        return [part.tolist() for part in theirs]


SOLO = Team()


def portable(error: BaseException) -> BaseException:
    """The error if it can be sent to another process, else one that says the same."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def device_kind(accelerator: str) -> str:
    """`gpu` or `cpu`; auto is the GPU if torch sees one.

    Raises:
        ValueError: gpu is asked for and there is none.
    """
    here = torch.cuda.is_available()
    if accelerator == "gpu" and not here:
        raise ValueError("accelerator gpu: torch sees no GPU here; use auto or cpu")
    return "gpu" if here and accelerator != "cpu" else "cpu"


def started_outside() -> "ClusterEnvironment | None":
    """What SLURM or torchrun says of this process, if it is one of several tasks that they started; else None."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # not SLURM_NTASKS, which a batch script has too, and it runs once
    if int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        try:
            return SLURMEnvironment(auto_requeue=False)  # whoever submitted the job requeues it
        except RuntimeError as error:  # such as --ntasks without --ntasks-per-node
            raise ValueError(str(error)) from error
    return None


def check_processes(devices: int, nodes: int, accelerator: str) -> None:
    """Refuses numbers of processes that do not exist here.

    Raises:
        ValueError: a number below 1, more GPUs than there are, several nodes without SLURM or torchrun, or another
            number of processes than those have started.
    """
    from lra.checks import check

    check(devices >= 1, "devices", devices, "at least 1")
    check(nodes >= 1, "nodes", nodes, "at least 1")
    if (environment := started_outside()) is not None:
        if environment.world_size() != devices * nodes:
            raise ValueError(
                f"devices {devices} x nodes {nodes} is {devices * nodes}, but {environment.world_size()} processes "
                f"were started by SLURM or torchrun; pass the --devices (of each node) and --nodes that they are"
            )
    elif nodes > 1:
        raise ValueError(
            f"nodes {nodes}: the processes of several machines are started by SLURM or torchrun, such as "
            f"`srun --nodes {nodes} --ntasks-per-node {devices} lra run ... --nodes {nodes} --devices {devices}`"
        )
    if device_kind(accelerator) == "gpu" and devices > torch.cuda.device_count():
        raise ValueError(f"devices {devices}: torch sees {torch.cuda.device_count()} GPUs here")


def check_shares(batch_size: int, world: int) -> None:
    """Refuses a batch that the processes cannot share evenly.

    Raises:
        ValueError: with both numbers.
    """
    if batch_size % world:
        raise ValueError(
            f"optim.batch_size {batch_size} does not divide by the {world} processes that share a batch "
            f"(devices x nodes); change one of them"
        )


@contextmanager
def gathered(accelerator: str, devices: int, nodes: int) -> Iterator[Team]:
    """The team that SLURM or torchrun has started, in each of its processes; without them one process alone."""
    environment = started_outside()
    if environment is None or environment.world_size() == 1:
        yield SOLO
        return
    team = Team(environment.global_rank(), environment.world_size(), devices, nodes, environment)
    address = f"tcp://{environment.main_address}:{environment.main_port}"
    with connected(team, accelerator, environment.local_rank(), address):
        yield team


@contextmanager
def gathered_here(accelerator: str, rank: int, world: int, meeting: Path) -> Iterator[Team]:
    """The team of `world` processes of this machine that meet by the file `meeting`, in each of them."""
    from lightning.fabric.plugins.environments import LightningEnvironment

    os.environ["LOCAL_RANK"] = str(rank)  # tells Lightning to start no processes of its own
    with connected(team := Team(rank, world, world, 1, LightningEnvironment()), accelerator, rank, meeting.as_uri()):
        yield team


@contextmanager
def connected(team: Team, accelerator: str, local_rank: int, address: str) -> Iterator[None]:
    """Connects the processes of a team; Lightning's strategy finds the group and uses it."""
    gpu = device_kind(accelerator) == "gpu"
    if gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        init_method=address,
        rank=team.rank,
        world_size=team.world,
        timeout=PATIENCE,
        device_id=torch.device("cuda", local_rank) if gpu else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
