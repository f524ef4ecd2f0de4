"""Cells as jobs of submitit: here by its local executor, which requeues as SLURM does; test_slurm.py has a cluster."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lra import interrupt, launch
from lra.__main__ import main
from lra.cell import run_cell
from lra.interrupt import Interrupted, listening, until
from lra.launch import LaunchError, Place, Slurm, submit
from lra.sweep import How, run_sweep
from lra.train import LAST

LONG = {"steps": 400, "evaluations": 2, "checkpoint_every": 20}


def wait_for(what, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def process_of(job) -> int:
    """The process that computes: the child of submitit's controller."""
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children")
    wait_for(lambda: children.read_text().strip())
    return int(children.read_text().split()[0])


def result(runs_dir: Path, cell) -> dict:
    return json.loads((runs_dir / cell.key / "result.json").read_text())


@pytest.mark.slow
def test_jobs_are_requeued_when_told_and_resubmitted_when_killed(tiny, cache_dir, tmp_path, capsys):
    pytest.importorskip("submitit")
    cells = preempted, killed = tiny(budget=LONG, seed=1), tiny(budget=LONG, seed=2)
    place = Place(cache_dir, accelerator="cpu", threads=1)
    alone = [run_cell(cell, tmp_path / "alone", cache_dir=cache_dir, accelerator="cpu") for cell in cells]
    jobs = submit(cells, tmp_path / "runs", place, Slurm(gpus=0), cluster="local")
    assert "2 submitted" in capsys.readouterr().out
    waiting = {jobs[0]: (preempted, signal.SIGUSR2), jobs[1]: (killed, signal.SIGKILL)}

    def begun() -> list:
        return [job for job, (cell, _) in waiting.items() if (tmp_path / "runs" / cell.key / LAST).exists()]

    while waiting:  # each as soon as it has a checkpoint: the runs are short
        wait_for(begun)
        for job in begun():
            os.kill(process_of(job), waiting.pop(job)[1])
    for job in jobs:
        assert job._process.wait(300) == 0
    log = jobs[0].paths.stdout.read_text() + jobs[0].paths.stderr.read_text()
    assert "Requeued job" in log and f"{preempted.key}: resuming" in log, log
    assert not (tmp_path / "runs" / killed.key / "result.json").exists()

    todo = [cell for cell in cells if not launch.has_result(cell, tmp_path / "runs")]
    assert todo == [killed]
    [again] = submit(todo, tmp_path / "runs", place, Slurm(gpus=0), cluster="local")
    assert again._process.wait(300) == 0 and f"{killed.key}: resuming" in again.paths.stdout.read_text()
    assert [result(tmp_path / "runs", cell)["curve"] for cell in cells] == [one["curve"] for one in alone]


def test_a_signal_that_somebody_handles_is_handed_on_after_the_saving(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGUSR2, lambda *_: seen.append(flag.received))
    try:
        with listening() as flag:
            signal.raise_signal(signal.SIGUSR2)
            assert flag.signum == signal.SIGUSR2 and not seen
        assert seen == [[signal.SIGUSR2]]
        with listening() as flag:
            pass
        assert len(seen) == 1
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_deadline_is_a_signal_to_those_inside():
    with until(time.monotonic() - 1), listening() as flag:
        assert flag.signum == interrupt.TIME_UP
        with until(None), listening() as inner:
            assert inner.signum is None
    assert not interrupt.time_is_up()


def test_an_interruption_crosses_processes_whole():
    import pickle

    copy = pickle.loads(pickle.dumps(Interrupted("stopped at step 3", signal.SIGTERM)))
    assert (str(copy), copy.signum, copy.code) == ("stopped at step 3", signal.SIGTERM, 143)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": 0}, "slurm.time must be at least 1; got 0"),
        ({"gpus": -1}, "slurm.gpus must be at least 0; got -1"),
        ({"cpus": 0}, "slurm.cpus"),
        ({"parallel": 0}, "slurm.parallel"),
        ({"grace": 0}, "slurm.grace"),
        ({"memory": 0}, "slurm.memory must be at least 1, or null; got 0"),
    ],
)
def test_impossible_jobs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Slurm(**options)


def test_without_submitit_or_slurm_the_error_says_what_to_do(tiny_yaml, tmp_path, monkeypatch, capsys):
    argv = ["sweep", tiny_yaml, "--mixers", "lru", "--launcher", "slurm", "--runs-dir", str(tmp_path / "runs")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "submitit", None)
        assert main(argv) == 2
        assert "pip install 'linrnn[slurm]'" in capsys.readouterr().err
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "lra: error: launcher slurm" in error and "srun" in error and len(error.splitlines()) == 1


def test_what_is_queued_is_not_submitted_again(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit")
    monkeypatch.setattr(launch, "_queued", lambda ids: {"7_1"} & set(ids))
    cells = [tiny(seed=seed) for seed in (0, 1)]
    launch._remember(tmp_path / "slurm", {cells[1].key: "7_1"})
    made = []

    class Executor:
        def __init__(self, folder, cluster, **_):
            assert cluster == "slurm" and folder == tmp_path / "slurm"

        def update_parameters(self, **given):
            self.given = given

        def submit_array(self, jobs):
            made.append((jobs, self.given))
            ids = [f"{len(made) + 7}_{i}" for i in range(len(jobs))]
            return [type("Made", (), {"job_id": one}) for one in ids]

    monkeypatch.setattr("submitit.AutoExecutor", Executor)
    place = Place(cache_dir="data", devices=2)
    todo = [cells[0].pretraining(), *cells]
    submit(todo, tmp_path, place, Slurm(partition="long", gpus=1, memory=8, cpus=3))
    (first, _), (second, given) = made
    assert [job.cell["regime"] for job in (*first, *second)] == ["pretrain", "scratch"]
    assert second[0].place.cache_dir == str(Path("data").resolve()) and second[0].place.threads == 3
    assert given["slurm_dependency"] == "afterany:8" and given["slurm_partition"] == "long" and given["mem_gb"] == 8
    assert given["gpus_per_node"] == given["tasks_per_node"] == 2, "one GPU for each process of a node"
    out = capsys.readouterr().out
    assert "1 still queued, 2 submitted as 8, 9" in out and "scancel 8 9" in out
    assert json.loads((tmp_path / "slurm" / "submitted.json").read_text())[cells[0].key] == "9_0"


def test_a_failed_query_of_the_queue_is_an_error(monkeypatch, tmp_path):
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho slurm_load_jobs error: no controller >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LaunchError, match="squeue failed: slurm_load_jobs error: no controller"):
        launch._queued(["1_0"])
    squeue.write_text("#!/bin/sh\necho 1_0\necho 2_5\n")
    assert launch._queued(["1_0", "1_1"]) == {"1_0"}


def test_two_submissions_do_not_read_what_is_queued_at_the_same_time(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from filelock import FileLock, Timeout

    def read(folder):
        with pytest.raises(Timeout):
            FileLock(folder / ".lock").acquire(timeout=0)
        return {}

    monkeypatch.setattr(launch, "_submitted", read)
    assert submit([], tmp_path, Place(), Slurm(), cluster="local") == []


def test_jobs_share_the_cores_this_process_may_use(tiny, tmp_path, monkeypatch):
    """A batch system that gives three of a machine's cores gives three."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    places = []
    monkeypatch.setattr("lra.sweep.attempt", lambda cell, runs_dir, place, deadline: places.append(place))
    run_sweep([tiny()], tmp_path, How())
    run_sweep([tiny()], tmp_path, How(Place(threads=5)))
    assert [place.threads for place in places] == [3, 5]
