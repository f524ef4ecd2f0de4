"""Grids: which cells they hold, that parallel jobs agree with one process, that a failure stops nothing else."""

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lra import interrupt
from lra.cell import run_cell
from lra.launch import Place
from lra.networks import sizes
from lra.sweep import How, Plan, SweepError, Unfinished, grid, model_family, run_plans, run_sweep
from lra.train import LAST, Recorder


def here(cache_dir) -> Place:
    return Place(cache_dir=cache_dir, accelerator="cpu", threads=1)


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


def test_shares_spend_the_same_steps_and_scales_lie_in_one_another(tiny):
    base = tiny(budget={"steps": 20})
    cells = full_grid(base, mixers=["lru"], seeds=[0], regimes=None, shares=[0, 0.2, 0.6], scales=[0.1, 1.0])
    assert len(cells) == 2 * (1 + 2 + 2)  # per scale: scratch, and two of each pretraining and fine-tuning
    for scale in (0.1, 1.0):
        ours = [c for c in cells if c.budget.data == scale]
        assert sorted(c.steps for c in ours) == [4, 8, 12, 16, 20]
        assert sorted(c.pretraining().steps for c in ours if c.regime == "finetune") == [4, 12]
    with pytest.raises(ValueError, match="regimes or shares, not both"):
        full_grid(base, shares=[0.2])
    with pytest.raises(ValueError, match="pretrain_share"):
        full_grid(base, regimes=None, shares=[1.0])


def test_mixers_may_be_model_presets(tiny, monkeypatch):
    preset = {"wide": {"mixer": "lru", "mixer_kwargs": {"r_min": 0.2, "r_max": 0.9}}}
    monkeypatch.setattr("lra.sweep._model_presets", lambda: preset)
    base = tiny(model={"mixer_kwargs": {"r_min": 0.5}})
    wide, plain = model_family(base.model, base, ["wide", "attention"], match=False)
    assert wide.mixer == "lru" and wide.mixer_kwargs == {"r_min": 0.5, "r_max": 0.9}, "what is asked for comes first"
    assert plain.mixer == "attention" and plain.mixer_kwargs == {}


def test_a_slice_stops_saves_and_goes_on(tiny, cache_dir, tmp_path, monkeypatch):
    """The deadline passes in the second cell: its steps are saved, the third is not begun, the next call ends all."""
    cells = full_grid(tiny(), mixers=["lru"], regimes=["scratch"], seeds=[0, 1, 2])
    run_cell(cells[0], tmp_path, cache_dir=cache_dir, accelerator="cpu")
    real = Recorder.on_train_batch_start

    def passing(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == 6:
            interrupt._deadline = time.monotonic()

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "on_train_batch_start", passing)
        with pytest.raises(Unfinished, match="5 minutes are over, 1 of 3 cells are done"):
            run_sweep(cells, tmp_path, How(here(cache_dir), minutes=5))
    assert torch.load(tmp_path / cells[1].key / LAST, weights_only=True)["global_step"] == 7
    assert not (tmp_path / cells[2].key).exists()
    run_sweep(cells, tmp_path, How(here(cache_dir), minutes=5))
    alone = run_cell(cells[1], tmp_path / "alone", cache_dir=cache_dir, accelerator="cpu")
    together = json.loads((tmp_path / cells[1].key / "result.json").read_text())
    assert together["curve"] == alone["curve"] and (tmp_path / cells[2].key / "result.json").exists()


def test_a_slice_that_is_over_begins_nothing(tiny, cache_dir, tmp_path):
    with pytest.raises(Unfinished, match="0 of 1 cells"):
        run_sweep([tiny()], tmp_path, How(here(cache_dir), minutes=1e-9))
    assert not list(tmp_path.rglob("config.yaml"))


def test_a_slice_that_is_over_names_what_failed(tiny, cache_dir, tmp_path, monkeypatch):
    """Unfinished comes before failed: a caller that goes on after exit code 75 must not stop at 2."""
    cells = [tiny(optim={"lr": 1e30}), tiny()]
    real = interrupt.until

    def over(deadline):  # once the first cell has begun
        monkeypatch.setattr("lra.sweep.time", SimpleNamespace(monotonic=lambda: float("inf")))
        return real(None)

    monkeypatch.setattr(interrupt, "until", over)
    with pytest.raises(Unfinished, match=r"0 of 2 cells are done, 1 failed:\n  .*FloatingPointError"):
        run_sweep(cells, tmp_path, How(here(cache_dir), minutes=5))


def test_plans_run_as_one_sweep_seed_by_seed(tiny, tmp_path, capsys):
    first = full_grid(tiny(), mixers=["lru"])
    second = full_grid(tiny(task={"max_depth": 4}), mixers=["lru"])
    how = How(dry_run=True)
    run_plans([Plan(first, how, str(tmp_path)), Plan([*second, *first], how, str(tmp_path))])
    lines = capsys.readouterr().out.splitlines()
    seeds = [line.split("seed")[1][0] for line in lines[1:]]
    assert lines[0] == "12 cells, 0 of them done" and seeds == ["0"] * 6 + ["1"] * 6


@pytest.mark.parametrize("axis", ["mixers", "regimes", "seeds", "lrs"])
def test_an_empty_axis_is_refused(tiny, axis):
    with pytest.raises(ValueError, match=f"{axis} is empty"):
        full_grid(tiny(), **{axis: []})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "jobs must be at least 1; got 0"),
        ({"minutes": 0}, "minutes must be positive; got 0"),
        ({"launcher": "slurm", "minutes": 9}, "--slurm.time"),
        ({"launcher": "slurm", "jobs": 2}, "--slurm.parallel"),
    ],
)
def test_impossible_ways_to_run_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        How(**options)


@pytest.mark.slow
def test_parallel_jobs_compute_what_one_process_computes(tiny, cache_dir, tmp_path):
    cells = full_grid(tiny(), mixers=["lru"], regimes=["scratch"])
    run_sweep(cells, tmp_path / "two", How(here(cache_dir), jobs=2))
    for cell in cells:
        alone = run_cell(cell, tmp_path / "one", cache_dir=cache_dir, accelerator="cpu")
        together = json.loads((tmp_path / "two" / cell.key / "result.json").read_text())
        assert together["curve"] == alone["curve"] and together["test"] == alone["test"]


def test_a_failing_cell_is_named_and_stops_no_other(tiny, cache_dir, tmp_path, capsys):
    cells = [tiny(optim={"lr": 1e30}), tiny()]
    with pytest.raises(
        SweepError, match=r"1 of 2 cells failed:\n  listops/lru-scratch.*FloatingPointError: the training"
    ):
        run_sweep(cells, tmp_path, How(here(cache_dir)))
    assert (tmp_path / cells[1].key / "result.json").exists()
    capsys.readouterr()
    run_sweep(cells, tmp_path, How(dry_run=True))
    out = capsys.readouterr().out
    assert "2 cells, 1 of them done" in out and f"to do  {cells[0].key}" in out and f"done   {cells[1].key}" in out


def test_a_cell_is_computed_by_one_process_at_a_time(tiny, tmp_path):
    from filelock import FileLock

    cell = tiny()
    folder = Path(tmp_path) / cell.key
    folder.mkdir(parents=True)
    said: list[str] = []
    with FileLock(folder / ".lock"):
        options = {"cache_dir": tmp_path / "cache", "accelerator": "cpu", "say": said.append}
        waiting = threading.Thread(target=run_cell, args=(cell, tmp_path), kwargs=options)
        waiting.start()
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said == [f"{cell.key}: another process is computing it; waiting"]
        (folder / "result.json").write_text('{"done": true}')
    waiting.join(30)
    assert not waiting.is_alive() and len(said) == 1
    assert run_cell(cell, tmp_path, cache_dir=tmp_path / "cache") == {"done": True}
