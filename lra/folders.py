"""The folder of a cell: what stands in it when the cell is computed, and who may compute it now."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lra.config import Cell
from lra.files import read_json
from lra.interrupt import TIME_UP, Interrupted, time_is_up

if TYPE_CHECKING:
    from lra.distributed import Team

CONFIG, RESULT = "config.yaml", "result.json"
Say = Callable[[str], None]


@contextmanager
def held(key: str, folder: Path, team: "Team", say: Say) -> Iterator[None]:
    """Holds the lock of a cell's folder in the first process; the others wait until it has it.

    Raises:
        Interrupted: the deadline has passed while another process held it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{key}: another process is computing it; waiting")
            while not lock.is_locked:
                if time_is_up():
                    raise Interrupted(f"{key}: another process is still computing it", TIME_UP) from None
                with suppress(Timeout):
                    lock.acquire(timeout=1)

    team.tell(acquire)
    try:
        yield
    finally:
        lock.release()


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a cell that is already computed, or None.

    Raises:
        ValueError: `result.json` is damaged.
    """
    path = folder / RESULT
    return read_json(path) if path.exists() else None


def computed(cell: Cell, folder: Path, cache_dir: str | Path | None) -> dict[str, Any] | None:
    """What `finished` returns, refused if it belongs to other data than those cached now; if none are, as it is.

    Raises:
        ValueError: `result.json` is damaged or belongs to other data.
    """
    from lra.data import data_folder, origin

    done, task = finished(folder), cell.build_task()
    if done is None or not data_folder(task, cache_dir).exists():
        return done
    theirs, ours = done["data"]["fingerprint"], origin(task, cache_dir)["fingerprint"]
    if theirs != ours:
        raise ValueError(
            f"{folder / RESULT} was computed from other data than those cached now (fingerprint {theirs} there, "
            f"{ours} here); move {folder} away to run it again"
        )
    return done


def config_yaml(cell: Cell) -> str:
    """The configuration of a cell, to be read back by `lra run --config`."""
    return f"# lra run --config {CONFIG}\n" + yaml.safe_dump(cell.to_dict(), sort_keys=False)
