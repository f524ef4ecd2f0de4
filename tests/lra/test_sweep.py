"""Grids: which cells they hold, that parallel jobs agree with one process, that a failure stops nothing else."""

import json
import threading
import time
from pathlib import Path

import pytest

from lra.cell import run_cell
from lra.networks import sizes
from lra.sweep import SweepError, grid, run_sweep


def full_grid(base, **changes):
    axes = {"mixers": ["lru", "attention"], "regimes": ["scratch", "finetune"], "seeds": [0, 1], "lrs": [1e-3]}
    return grid(base, **{**axes, "match": True, **changes})


def test_a_grid_holds_every_cell_once_pretraining_first(tiny):
    cells = full_grid(tiny(), lrs=[1e-3, 5e-4])
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 2 + 2 * 2 * 2
    regimes = [cell.regime for cell in cells]
    assert regimes[:8] == ["pretrain"] * 8 and "pretrain" not in regimes[8:]
    # with its own rate, pretraining does not depend on the fine-tuning rate
    shared = full_grid(tiny(optim={"pretrain_lr": 1e-3}), lrs=[1e-3, 5e-4])
    assert sum(cell.regime == "pretrain" for cell in shared) == 4


def test_matching_and_mixer_options(tiny):
    base = tiny(model={"d_model": 48, "n_layers": 2, "mixer_kwargs": {"r_min": 0.5, "d_state": 80}})
    models = {cell.model.mixer: cell.model for cell in full_grid(base)}
    assert models["lru"].mixer_kwargs == {"r_min": 0.5, "d_state": 80} and models["attention"].mixer_kwargs == {}
    lru, attention = (sizes(models[m], base.build_task())["total"] for m in ("lru", "attention"))
    assert models["attention"].d_model > 48 and abs(lru - attention) <= 0.1 * lru
    assert {c.model.d_model for c in full_grid(base, match=False)} == {48}


@pytest.mark.parametrize("axis", ["mixers", "regimes", "seeds", "lrs"])
def test_an_empty_axis_is_refused(tiny, axis):
    with pytest.raises(ValueError, match=f"{axis} is empty"):
        full_grid(tiny(), **{axis: []})


def test_no_jobs_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="jobs must be at least 1; got 0"):
        run_sweep([tiny()], tmp_path, jobs=0)


@pytest.mark.slow
def test_parallel_jobs_compute_what_one_process_computes(tiny, cache_dir, tmp_path):
    cells = full_grid(tiny(), mixers=["lru"], regimes=["scratch"])
    run_sweep(cells, tmp_path / "two", cache_dir=cache_dir, accelerator="cpu", jobs=2, threads=1)
    for cell in cells:
        alone = run_cell(cell, tmp_path / "one", cache_dir=cache_dir, accelerator="cpu")
        together = json.loads((tmp_path / "two" / cell.key / "result.json").read_text())
        assert together["curve"] == alone["curve"] and together["test"] == alone["test"]


def test_a_failing_cell_is_named_and_stops_no_other(tiny, cache_dir, tmp_path, capsys):
    cells = [tiny(optim={"lr": 1e30}), tiny()]
    with pytest.raises(
        SweepError, match=r"1 of 2 cells failed:\n  listops/lru-scratch.*FloatingPointError: the training"
    ):
        run_sweep(cells, tmp_path, cache_dir=cache_dir, accelerator="cpu", threads=1)
    assert (tmp_path / cells[1].key / "result.json").exists()
    capsys.readouterr()
    run_sweep(cells, tmp_path, dry_run=True)
    out = capsys.readouterr().out
    assert "2 cells, 1 of them done" in out and f"to do  {cells[0].key}" in out and f"done   {cells[1].key}" in out


def test_a_cell_is_computed_by_one_process_at_a_time(tiny, cache_dir, tmp_path):
    from filelock import FileLock

    cell = tiny()
    folder = Path(tmp_path) / cell.key
    folder.mkdir(parents=True)
    said: list[str] = []
    with FileLock(folder / ".lock"):
        options = {"cache_dir": cache_dir, "accelerator": "cpu", "say": said.append}
        waiting = threading.Thread(target=run_cell, args=(cell, tmp_path), kwargs=options)
        waiting.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said == [f"{cell.key}: another process is computing it; waiting"]
        (folder / "result.json").write_text('{"done": true}')
    waiting.join(30)
    assert not waiting.is_alive() and len(said) == 1
    assert run_cell(cell, tmp_path) == {"done": True}
