"""The tasks: frozen dataclasses that describe a data set and can make it."""

from dataclasses import fields

from lra.tasks.base import Ids, Levels, Task
from lra.tasks.delayed_xor import DelayedXor
from lra.tasks.digits import Digits
from lra.tasks.images import Image, PSMnist, SCifar, SMnist
from lra.tasks.induction_heads import InductionHeads
from lra.tasks.listops import ListOps
from lra.tasks.mqar import MQAR
from lra.tasks.pathfinder import Pathfinder, PathX, PathX256
from lra.tasks.retrieval import Retrieval
from lra.tasks.retrieval_imdb import RetrievalIMDB
from lra.tasks.selective_copying import SelectiveCopying
from lra.tasks.state_tracking import Parity, Permutations
from lra.tasks.text import Text

__all__ = ["TASKS", "Ids", "Levels", "ListOps", "Task", "build_task"]

TASKS: dict[str, type[Task]] = {
    "listops": ListOps,
    "image": Image,
    "scifar": SCifar,
    "smnist": SMnist,
    "psmnist": PSMnist,
    "digits": Digits,
    "text": Text,
    "retrieval": Retrieval,
    "retrieval_imdb": RetrievalIMDB,
    "pathfinder": Pathfinder,
    "pathx": PathX,
    "pathx256": PathX256,
    "mqar": MQAR,
    "selective_copying": SelectiveCopying,
    "induction_heads": InductionHeads,
    "permutations": Permutations,
    "parity": Parity,
    "delayed_xor": DelayedXor,
}


def build_task(name: str, **options: object) -> Task:
    """Returns the task called `name` with these options.

    Raises:
        ValueError: unknown name or option, or an option out of range.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are: {', '.join(TASKS)}")
    allowed = [field.name for field in fields(TASKS[name])]
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"unknown option {unknown[0]!r} of task {name!r}; the options are: {', '.join(allowed)}")
    return TASKS[name](**options)  # type: ignore[arg-type]
