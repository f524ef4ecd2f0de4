"""SIGKILL at any step, Ctrl-C at any step: the run that goes on ends in the bits of the run that was left alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lra import train
from lra.__main__ import main
from lra.cell import run_cell
from lra.checkpoints import LAST
from lra.interrupt import Interrupted
from lra.train import Recorder

from .runs import assert_same_bits

# One process imports, children run: each is killed where `deaths` says, the last one finishes.
SCRIPT = """
import json, os, signal, sys
from lra.cell import run_cell
from lra.config import cell_from_dict
from lra.train import Recorder

def child(cell, cache_dir, runs_dir, death):
    real = Recorder.on_train_batch_end
    def killed(self, trainer, *rest):
        real(self, trainer, *rest)
        if death == [self.cell.regime, trainer.global_step]:
            os.kill(os.getpid(), signal.SIGKILL)
    Recorder.on_train_batch_end = killed
    run_cell(cell, runs_dir, cache_dir=cache_dir, accelerator="cpu")
    os._exit(0)

for config, cache_dir, runs_dir, deaths in json.loads(sys.argv[1]):
    for death in [*deaths, None]:
        if (pid := os.fork()) == 0:
            child(cell_from_dict(config), cache_dir, runs_dir, death)
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == (0 if death is None else -signal.SIGKILL), (death, status)
"""

DIGITS = {"name": "digits", "n_train": 60, "n_val": 30, "n_test": 30}


@pytest.mark.slow
def test_killed_runs_end_in_the_same_bits(tiny, cache_dir, tmp_path):
    """Deaths before and after a checkpoint (every 5), beside and on an evaluation (every 2 and 3), in both phases.

    Tokens are recovered by cross-entropy, the pixels of digits by absolute error.
    """
    deaths = [["pretrain", 3], ["pretrain", 6], ["finetune", 9], ["finetune", 10], ["finetune", 12]]
    tokens = tiny(regime="finetune", seed=1)
    cells = [tokens, replace(tokens, task=DIGITS)]
    jobs = [
        [cell.to_dict(), cache_dir, str(tmp_path / name), how]
        for cell in cells
        for name, how in (("whole", []), ("killed", deaths if cell is tokens else deaths[:2]))
    ]
    subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True
    )
    for cell in cells:
        for key in (cell.key, cell.pretraining().key):
            assert_same_bits(tmp_path / "killed" / key, tmp_path / "whole" / key)


def signal_at(monkeypatch, step: int, signum: int, times: int = 1) -> None:
    """Sends this process a signal, or several, while it works on `step`."""
    real = Recorder.on_train_batch_start

    def sending(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == step - 1:
            for _ in range(times):
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(Recorder, "on_train_batch_start", sending)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on(tiny, cache_dir, tmp_path, monkeypatch, signum):
    cell, handler = tiny(seed=2), signal.getsignal(signum)
    run_cell(cell, tmp_path / "whole", cache_dir=cache_dir, accelerator="cpu")
    for step in (7, 10):
        with monkeypatch.context() as patch:
            signal_at(patch, step, signum)
            with pytest.raises(Interrupted, match=f"stopped at step {step} of 20") as stop:
                run_cell(cell, tmp_path / "cut", cache_dir=cache_dir, accelerator="cpu")
        assert stop.value.code == 128 + signum
    said: list[str] = []
    run_cell(cell, tmp_path / "cut", cache_dir=cache_dir, accelerator="cpu", say=said.append)
    assert "resuming" in said[0]
    assert_same_bits(tmp_path / "cut" / cell.key, tmp_path / "whole" / cell.key)
    assert signal.getsignal(signum) == handler, "the handlers are put back"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_tells_how_to_go_on(tiny_yaml, cache_dir, tmp_path, monkeypatch, capsys, times):
    argv = ["run", tiny_yaml, "--runs-dir", str(tmp_path), "--cache-dir", cache_dir, "--accelerator", "cpu"]
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGINT, times)
        assert main(argv) == 130
    assert len(list(tmp_path.rglob(LAST))) == 1, "a second Ctrl-C does not prevent the checkpoint"
    error = capsys.readouterr().err
    assert "stopped at step 4 of 20" in error and f"lra run {tiny_yaml} --runs-dir" in error
    assert main(argv) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("evaluation", [1, 2])
def test_an_evaluation_cut_short_is_made_up_for(tiny, cache_dir, tmp_path, monkeypatch, evaluation):
    """Ctrl-C during an evaluation leaves it at once and loses no step, also at the run's last one."""
    cell = tiny(seed=3, budget={"evaluations": 2})
    run_cell(cell, tmp_path / "whole", cache_dir=cache_dir, accelerator="cpu")
    real, calls = train.evaluate, []

    def sending(*args):
        calls.append(1)
        if len(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", sending)
        with pytest.raises(Interrupted, match=f"stopped at step {10 * evaluation} of 20"):
            run_cell(cell, tmp_path / "cut", cache_dir=cache_dir, accelerator="cpu")
    assert torch.load(tmp_path / "cut" / cell.key / LAST, weights_only=True)["global_step"] == 10 * evaluation
    run_cell(cell, tmp_path / "cut", cache_dir=cache_dir, accelerator="cpu")
    assert_same_bits(tmp_path / "cut" / cell.key, tmp_path / "whole" / cell.key)
