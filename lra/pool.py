"""Cells side by side, each in a process of its own that leaves when this one does."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from lra.config import Cell
from lra.interrupt import TIME_UP, Flag, Interrupted, listening
from lra.launch import Place, attempt

DIED = "a worker process died (killed, such as for memory); the cells beside it were ended with it"


def leave_with_parent() -> None:
    """Has this process, which another one has started, end as soon as that one is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        # A worker that went on alone would write to a folder whose lock is free again.
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_cells(
    cells: Sequence[Cell], runs_dir: str, place: Place, deadline: float | None, jobs: int
) -> tuple[dict[str, str], bool]:
    """Runs the cells, pretraining first, `jobs` at a time, and returns errors by key and whether the time was over.

    A cell whose worker dies has failed, and so have those that ran beside it; the others get new workers.

    Raises:
        Interrupted: SIGINT or SIGTERM came to this process or to a worker; the running cells have saved.
    """
    failed: dict[str, str] = {}
    with listening() as flag:
        for pretraining in (True, False):
            waiting = deque(cell for cell in cells if (cell.regime == "pretrain") == pretraining)
            while waiting:
                if _until_broken(waiting, failed, flag, (runs_dir, place, deadline), jobs):
                    return failed, True
    return failed, False


def _until_broken(
    waiting: deque[Cell], failed: dict[str, str], flag: Flag, where: tuple[str, Place, float | None], jobs: int
) -> bool:
    """Takes cells from `waiting` until none is left or a worker has died; returns whether the time was over."""
    others = multiprocessing.active_children()
    # fresh processes: torch does not survive a fork once it has used its threads
    context = multiprocessing.get_context("spawn")
    running: dict[Future[str | None], Cell] = {}
    stop: Interrupted | None = None
    broken = time_over = told = False
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=leave_with_parent) as pool:
        while True:
            if flag.signum is not None and stop is None:
                stop = Interrupted("stopped; what was running is saved", flag.signum)
            if stop is not None and not told:
                told = True
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.terminate()
            # No more than there are workers: what the pool holds when it breaks was running.
            while waiting and len(running) < jobs and not (broken or time_over or stop):
                try:
                    running[pool.submit(attempt, waiting[0], *where)] = waiting[0]
                    waiting.popleft()
                except BrokenProcessPool:
                    broken = True
            if not running:
                break
            for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                try:
                    if error := future.result():
                        failed[cell.key] = error
                except BrokenProcessPool:
                    broken = True
                    if not told:
                        failed[cell.key] = DIED
                except KeyboardInterrupt:
                    stop = stop or Interrupted("stopped; what was running is saved", signal.SIGINT)
                except Interrupted as end:
                    time_over = time_over or end.signum == TIME_UP
                    stop = stop or (None if end.signum == TIME_UP else end)
    if stop is not None:
        raise stop
    return time_over
