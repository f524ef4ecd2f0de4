"""The processes of one machine that share a cell, started for it and gone with it."""

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from lra.distributed import Team, gathered_here, portable
from lra.interrupt import Flag, Interrupted, deadline, listening, until
from lra.pool import leave_with_parent

Say = Callable[[str], None]
Work = Callable[[Say, Team], Any]
# Seconds that the others have to leave by themselves once one has reported an interruption.
GRACE = 30.0


def in_workers(work: Work, world: int, accelerator: str, say: Say) -> Any:
    """Calls `work(say, team)` in `world` processes and returns what the first one returns.

    They are fresh processes, which import the program that is running: a script that gets here needs the usual
    `if __name__ == "__main__":`. The threads of torch are shared between them. Signals are handed on to them.

    Raises:
        Interrupted: the workers were told to stop, by a signal or the deadline of `until`.
        ChildProcessError: a worker died.
        Exception: what a worker raised first; the others are ended.
    """
    import torch

    # forked from a process that has imported everything and started nothing
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    if os.name == "posix":
        context.set_forkserver_preload(["lra.cell", "lra.train", "lra.workers"])
    threads = max(1, torch.get_num_threads() // world)
    processes, connections, orderly = [], [], False
    with tempfile.TemporaryDirectory() as folder, listening() as flag:
        try:
            for rank in range(world):
                ours, theirs = context.Pipe(duplex=False)
                arguments = (work, rank, world, accelerator, Path(folder) / "meeting", threads, deadline(), theirs)
                process = context.Process(target=_worker, args=arguments, name=f"lra-{rank}")
                process.start()
                theirs.close()
                processes.append(process)
                connections.append(ours)
            result = _attend(processes, connections, flag, say)
            orderly = True
            return result
        except Interrupted:
            orderly = True
            raise
        finally:
            for process in processes:
                if orderly:
                    process.join(GRACE)
                process.kill()
                process.join()


def _attend(processes: list[Any], connections: list[Any], flag: Flag, say: Say) -> Any:
    """Listens to the workers until all are done or one has failed."""
    open_, handed_on, result = dict(enumerate(connections)), False, None
    stopped: Interrupted | None = None
    patience = float("inf")
    while open_ and time.monotonic() < patience:
        if flag.received and not handed_on:  # a deadline the workers see by themselves
            handed_on = True
            for process in processes:
                process.terminate()
        ready = wait(list(open_.values()), timeout=0.2)
        for rank, connection in list(open_.items()):
            if connection not in ready:
                continue
            try:
                kind, value = connection.recv()
            except EOFError:
                processes[rank].join()
                raise _death(rank, processes[rank].exitcode, flag) from None
            if kind == "say":
                say(value)
                continue
            del open_[rank]
            if kind == "done":
                result = value if rank == 0 else result
            elif isinstance(value, Interrupted):
                stopped, patience = stopped or value, time.monotonic() + GRACE
            else:
                raise value
    if stopped is not None:
        raise Interrupted(str(stopped), flag.signum or stopped.signum)
    return result


def _death(rank: int, code: int | None, flag: Flag) -> Exception:
    if flag.signum is not None:
        return Interrupted("stopped outside of training", flag.signum)
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code is not None and code < 0 else f"with code {code}"
    return ChildProcessError(f"process {rank} of the run died {how}; the same command goes on from the last checkpoint")


def _worker(
    work: Work,
    rank: int,
    world: int,
    accelerator: str,
    meeting: Path,
    threads: int,
    deadline: float | None,
    connection: Connection,
) -> None:
    import torch

    leave_with_parent()
    torch.set_num_threads(threads)

    def say(line: str) -> None:
        if rank == 0:
            connection.send(("say", line))

    with until(deadline), gathered_here(accelerator, rank, world, meeting) as team:
        try:
            outcome = ("done", work(say, team))
        except KeyboardInterrupt:
            outcome = ("error", Interrupted("stopped outside of training"))
        except Exception as error:
            outcome = ("error", portable(error))
        connection.send(outcome)
