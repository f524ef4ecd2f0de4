"""Learning rates chosen on validation: by whose score, for which phase, and with whose seed."""

import contextlib
import json

import pytest

from lra import choose
from lra.choose import TRIAL_SEED, choose_lr, group
from lra.sweep import How, SweepError, grid

LRS = [1e-3, 1e-2, 1e-1]


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Stands for training: each cell's validation score is what `best` says of its regime; returns what was run."""
    ran = []
    best = {"pretrain": 1e-3, "scratch": 1e-1, "finetune": 1e-2}

    def run(cells, folder, how):
        for cell in cells:
            ran.append((folder, cell))
            if cell.lr != 1e-2 or cell.regime == "finetune":  # that rate diverges, except in fine-tuning
                path = folder / cell.key / "result.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                metric = "r2" if cell.regime == "pretrain" else "accuracy"
                path.write_text(json.dumps({"metric": metric, "val": {metric: float(cell.lr == best[cell.regime])}}))
        if cells and cells[0].regime != "finetune":
            raise SweepError("some diverged")

    monkeypatch.setattr(choose, "run_sweep", run)
    return ran


def test_each_phase_has_its_rate_and_the_seeds_are_fresh(tiny, tmp_path, scored):
    cells = grid(tiny(), mixers=["lru"], seeds=[0, 1], lrs=[LRS[0]], match=False)
    final = choose_lr(cells, LRS, tmp_path, How(), 0.5)
    assert len(final) == len(cells) == 6 and {cell.seed for cell in final} == {0, 1}
    rates = {cell.regime: (cell.lr, cell.pretraining().lr) for cell in final}
    assert rates["scratch"][0] == 1e-1 and rates["pretrain"][0] == 1e-3 and rates["finetune"] == (1e-2, 1e-3)
    keys = {cell.key for cell in final}
    assert all(cell.pretraining().key in keys for cell in final if cell.regime == "finetune")
    assert {cell.seed for _, cell in scored} == {TRIAL_SEED} and {folder.name for folder, _ in scored} == {"choosing"}
    assert len(scored) == 3 * 3
    assert {cell.budget.steps for _, cell in scored} == {10} and {cell.budget.steps for cell in final} == {20}
    assert len({cell.pretraining().key for _, cell in scored if cell.regime == "finetune"}) == 1, "one pretraining"
    record = json.loads((tmp_path / "chosen.json").read_text())
    assert [one["lr"] for one in record] == [1e-3, 1e-1, 1e-2]
    assert record[0]["validation"] == {"0.001": 1.0, "0.01": None, "0.1": 0.0} and record[0]["share"] == 0.5
    assert sorted(key for one in record for key in one["runs"]) == sorted(keys)


def test_choices_for_other_cells_and_seeds_are_kept(tiny, tmp_path, scored):
    def chosen(seeds, lrs=LRS, **changes):
        choose_lr([tiny(seed=seed, **changes) for seed in seeds], lrs, tmp_path, How())
        return {one["cell"]: one for one in json.loads((tmp_path / "chosen.json").read_text())}

    first = chosen([0])
    both = chosen([0], task={"max_depth": 4})
    assert len(both) == 2 and first.items() <= both.items()
    more = chosen([1, 2])
    name = group(tiny())
    assert len(more) == 2 and len(more[name]["runs"]) == 3, "more seeds of the same choice"
    assert len(chosen([0], [1e-1, 1.0])[name]["runs"]) == 1, "another grid is another choice"


def test_a_trial_that_fails_otherwise_than_by_diverging_ends_the_choice(tiny, tmp_path, scored, monkeypatch):
    run = choose.run_sweep

    def failing(cells, folder, how):
        with contextlib.suppress(SweepError):
            run(cells, folder, how)
        raise SweepError("2 failed", {"a": "FloatingPointError: it diverged", "b": errors})

    monkeypatch.setattr(choose, "run_sweep", failing)
    errors = "FloatingPointError: it diverged"
    assert choose_lr([tiny()], LRS[:2], tmp_path, How())
    errors = "OSError: no space left on device"
    with pytest.raises(SweepError, match="2 failed"):
        choose_lr([tiny()], LRS, tmp_path / "other", How())
    assert not (tmp_path / "other" / "chosen.json").exists()


def test_the_trials_seed_is_no_seed_of_a_sweep(tiny, tmp_path):
    with pytest.raises(ValueError, match="seed 1000000 is that of the trials"):
        choose_lr([tiny(seed=TRIAL_SEED)], LRS, tmp_path, How())


def test_models_and_tasks_choose_apart(tiny):
    cells = [tiny(), tiny(model={"mixer": "attention"}), tiny(task={"max_depth": 4}), tiny(budget={"data": 0.5})]
    assert len({group(cell) for cell in cells}) == 4
    assert group(tiny(seed=3, optim={"lr": 0.5})) == group(tiny())


def test_without_any_result_the_grid_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "run_sweep", lambda *_: None)
    with pytest.raises(SweepError, match=r"lru-scratch.*no learning rate of 0.001, 0.01, 0.1 has a result"):
        choose_lr([tiny()], LRS, tmp_path, How())


@pytest.mark.parametrize(
    ("lrs", "how", "message"),
    [([1e-3], How(), "at least two values of --lrs; got 0.001"), (LRS, How(dry_run=True), "without --dry-run")],
)
def test_what_cannot_choose_is_refused(tiny, tmp_path, lrs, how, message):
    with pytest.raises(ValueError, match=message):
        choose_lr([tiny()], lrs, tmp_path, how)
