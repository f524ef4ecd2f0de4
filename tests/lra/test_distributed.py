"""Two processes that share every batch do what one does, and stop, fail and go on together."""

import json
import os
import pickle
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from lra import distributed
from lra.cell import run_cell
from lra.distributed import SOLO, check_processes, gathered, portable
from lra.interrupt import Flag, Interrupted
from lra.workers import _death

from .runs import assert_same_bits, timeless

# A program as a user would write one. Its workers import it and find out what is to go wrong, with whom and when.
SCRIPT = '''
import errno, json, os, signal, socket, sys, time
from functools import partial
from pathlib import Path

import lra.cell
from lra.cell import run_cell
from lra.config import cell_from_dict
from lra.interrupt import Interrupted, until
from lra.train import LAST, Recorder

whole = lra.cell._compute

def troubled(what, rank, step, *arguments):
    """The work of one process of a cell, in which something happens."""
    mine = arguments[-1].rank == rank
    start, write = Recorder.on_train_batch_start, Path.write_bytes

    def on_train_batch_start(self, trainer, *rest):
        start(self, trainer, *rest)
        if mine and trainer.global_step == step - 1:
            os.kill(os.getpid(), what)

    def write_bytes(path, data):
        if mine and LAST in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    if what == "full":
        Path.write_bytes = write_bytes
    else:
        Recorder.on_train_batch_start = on_train_batch_start
    return whole(*arguments)

def main(config, cache_dir, runs_dir):
    cell = cell_from_dict(config)
    def run(cell, name, **options):
        say = said.append
        return run_cell(cell, Path(runs_dir) / name, cache_dir=cache_dir, accelerator="cpu", say=say, **options)

    said = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(2):  # as torchrun does it
        if (pid := os.fork()) == 0:
            os.environ |= {"TORCHELASTIC_RUN_ID": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            result = run(cell, "outside", devices=2)
            (Path(runs_dir) / f"outside{rank}.json").write_text(json.dumps([result, said]))
            os._exit(0)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0]

    run(cell, "one")
    run(cell, "two", devices=2)
    events, pretraining = [], cell.pretraining()
    for what in ((signal.SIGTERM, 1, 6), ("full", 0, 0), (signal.SIGKILL, 1, 7), "deadline"):
        if what != "deadline":
            lra.cell._compute = partial(troubled, *what)
        try:
            with until(time.monotonic() if what == "deadline" else None):
                run(pretraining, "cut", devices=2)
        except (Interrupted, OSError) as error:
            events.append([type(error).__name__, str(error), getattr(error, "code", None)])
        lra.cell._compute = whole
    said.clear()
    run(pretraining, "cut", devices=2)
    (Path(runs_dir) / "events.json").write_text(json.dumps([events, said]))

if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
'''


@pytest.mark.slow
def test_two_processes(tiny, cache_dir, tmp_path):
    """Masked denoising, in which the processes hide different numbers of tokens, and then classification."""
    cell = tiny(
        regime="finetune", model={"dropout": 0.0}, budget={"steps": 20, "pretrain_share": 0.5, "checkpoint_every": 4}
    )
    script = tmp_path / "program.py"
    script.write_text(SCRIPT)
    arguments = json.dumps([cell.to_dict(), cache_dir, str(tmp_path)])
    subprocess.run([sys.executable, script, arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)

    for part in (cell, cell.pretraining()):
        one, two, outside = (timeless(tmp_path / name / part.key) for name in ("one", "two", "outside"))
        assert (one["processes"], two["processes"]) == (1, 2) and outside == two
        curves = [np.array([list(row.values()) for row in result["curve"]]) for result in (one, two)]
        # float32 sums in another order; weighed by the mean of means it would be off by 1e-2
        np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
        assert {k: v for k, v in one.items() if k not in ("processes", "curve", "val", "pretrain", "test")} == {
            k: v for k, v in two.items() if k not in ("processes", "curve", "val", "pretrain", "test")
        }
        assert_same_bits(tmp_path / "outside" / part.key, tmp_path / "two" / part.key)
    told = [json.loads((tmp_path / f"outside{rank}.json").read_text()) for rank in range(2)]
    assert told[0][0] == told[1][0], "every process returns the result"
    assert told[0][1] and not told[1][1], "one process speaks"

    events, said = json.loads((tmp_path / "events.json").read_text())
    assert events[0] == ["Interrupted", "stopped at step 6 of 10", 143]
    assert events[1][0] == "OSError" and events[1][1].endswith("last.ckpt'") and "No space left" in events[1][1]
    assert events[2][0] == "ChildProcessError" and "process 1 of the run died by signal 9 (SIGKILL)" in events[2][1]
    assert events[3][0] == "Interrupted" and events[3][1] == "stopped at step 7 of 10"
    assert "resuming" in said[0] and len(events) == 4
    key = cell.pretraining().key
    assert_same_bits(tmp_path / "cut" / key, tmp_path / "two" / key)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": 0}, "devices must be at least 1; got 0"),
        ({"nodes": 0}, "nodes must be at least 1; got 0"),
        ({"nodes": 2, "devices": 4}, "nodes 2: the processes of several machines are started by SLURM or torchrun"),
        ({"devices": 3}, r"optim\.batch_size 8 does not divide by the 3 processes"),
    ],
)
def test_processes_that_cannot_be_are_refused(tiny, cache_dir, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run_cell(tiny(), tmp_path, cache_dir=cache_dir, accelerator="cpu", **given)
    assert not list(tmp_path.iterdir())


SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"} | {
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "12345",
    "MASTER_ADDR": "n1",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "GROUP_RANK": "1"} | {
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "27345",
}


@pytest.mark.parametrize("variables", [SLURM, TORCHRUN], ids=["slurm", "torchrun"])
def test_processes_started_outside_know_who_they_are(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False) if variables is SLURM else None
    seen = []
    monkeypatch.setattr(distributed, "connected", lambda *a: seen.append(a) or nullcontext())
    with gathered("cpu", 2, 2) as team:
        assert (team.rank, team.world, team.devices, team.nodes, team.leads) == (3, 4, 2, 2, False)
    assert seen[0][2:] == (1, f"tcp://n1:{'17345' if variables is SLURM else '27345'}")
    check_processes(2, 2, "cpu")
    with pytest.raises(ValueError, match="devices 2 x nodes 1 is 2, but 4 processes were started"):
        check_processes(2, 1, "cpu")
    if variables is SLURM:
        monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
        with pytest.raises(ValueError, match="ntasks-per-node"):
            check_processes(2, 2, "cpu")


def test_a_batch_script_is_no_task(monkeypatch):
    """SLURM tells the script of a job how many tasks `srun` would start; the script is not one of them."""
    for name in ("SLURM_NTASKS", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, SLURM[name])
    with gathered("cpu", 1, 1) as team:
        assert team is SOLO


def test_a_worker_that_a_signal_ends_was_not_training():
    """Before the first step or after the last: while it trains it saves and reports."""
    flag = Flag()
    assert "died by signal 9" in str(_death(1, -9, flag)) and not isinstance(_death(1, -9, flag), Interrupted)
    flag.received.append(15)
    assert str(_death(0, -15, flag)) == "stopped outside of training"


class Unsendable(Exception):
    def __init__(self, a, b):
        super().__init__(a)


def test_errors_arrive_in_other_processes():
    stop = portable(Interrupted("stopped", 15))
    assert (str(stop), stop.code) == ("stopped", 143)
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(Unsendable(1, 2)))
    assert str(portable(Unsendable("why", 2))) == "Unsendable: why"
