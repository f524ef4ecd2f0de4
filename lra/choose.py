"""The learning rates of a sweep, chosen on validation: for each task, model and phase apart, with a seed of their own.

The grid is the same for every model. Pretraining is chosen by its own validation metric, then fine-tuning starts from
the winner; the seeds of the sweep are run with the winners and have taken no part in the choice. The trials' seed is
always the same one: a sweep that gets more seeds keeps its rates.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lra.config import Cell
from lra.files import read_json, write_json
from lra.launch import diverged
from lra.sweep import How, SweepError, run_sweep, unique

TRIALS, CHOSEN = "choosing", "chosen.json"
TRIAL_SEED = 1_000_000


def choose_lr(
    cells: Sequence[Cell], lrs: Sequence[float], runs_dir: str | Path, how: How, share: float = 1.0
) -> list[Cell]:
    """Tries the rates and returns the cells with the best ones.

    The trials are in `runs_dir`/choosing; `runs_dir`/chosen.json records every rate's validation score, the winners,
    and the keys of the cells that got them, beside what earlier choices for other cells have left there.

    Args:
        share: of a cell's steps, and of its evaluations, that a trial takes.

    Raises:
        ValueError: a launcher that does not wait for results, fewer than two rates, a share outside (0, 1], or a seed
            that is the trials'.
        SweepError: a trial failed other than by diverging, or no rate of a grid ended in a result.
        Unfinished: the time of the slice is over; the same call goes on.
    """
    if how.launcher != "local" or how.dry_run:
        raise ValueError("--choose needs results to choose from: use it with --launcher local and without --dry-run")
    if len(set(lrs)) < 2:
        raise ValueError(f"--choose lr needs at least two values of --lrs; got {', '.join(f'{lr:g}' for lr in lrs)}")
    if not 0 < share <= 1:
        raise ValueError(f"choose_share must be in (0, 1]; got {share:g}")
    if any(cell.seed == TRIAL_SEED for cell in cells):
        raise ValueError(f"seed {TRIAL_SEED} is that of the trials by which rates are chosen; leave it out of --seeds")
    from lra.cell import cell_metric

    folder = Path(runs_dir) / TRIALS
    groups = {group(cell): replace(cell, seed=TRIAL_SEED) for cell in cells}
    chosen: dict[str, float] = {}
    record: list[dict[str, Any]] = []
    for regimes in (("pretrain", "scratch"), ("finetune",)):
        trials = {
            name: {lr: shorter(with_rates(cell, lr, chosen), share) for lr in lrs}
            for name, cell in groups.items()
            if cell.regime in regimes
        }
        try:
            run_sweep(unique(cell for tried in trials.values() for cell in tried.values()), folder, how)
        except SweepError as error:
            if not all(map(diverged, error.failures.values())):
                raise
            print(f"lra: {error}", flush=True)  # a rate that diverges has lost, and is no reason to stop
        for name, tried in trials.items():
            scores = {lr: score for lr, cell in tried.items() if (score := validation(folder, cell)) is not None}
            if not scores:
                raise SweepError(f"{name}: no learning rate of {', '.join(f'{lr:g}' for lr in lrs)} has a result")
            chosen[name] = max(scores, key=lambda lr: scores[lr])
            rates = {str(lr): scores.get(lr) for lr in lrs}  # null: diverged
            one = {"cell": name, "seed": TRIAL_SEED, "share": share, "validation": rates, "lr": chosen[name]}
            record.append(one | {"metric": cell_metric(groups[name], groups[name].build_task())})
    for one in record:
        one["runs"] = sorted({with_rates(cell, None, chosen).key for cell in cells if group(cell) == one["cell"]})
    _remember(Path(runs_dir) / CHOSEN, record)
    return unique(with_rates(cell, None, chosen) for cell in cells)


def _remember(path: Path, record: list[dict[str, Any]]) -> None:
    """Puts choices beside those that the file holds for other cells; the same choice for more seeds keeps all keys."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        kept = {one["cell"]: one for one in (read_json(path) if path.exists() else [])}
        for one in record:
            before = kept.get(one["cell"], {})
            same = all(before.get(name) == one[name] for name in one if name != "runs")
            runs = {*one["runs"], *before.get("runs", ())} if same else one["runs"]
            kept[one["cell"]] = {**one, "runs": sorted(runs)}
        write_json(path, list(kept.values()))


def group(cell: Cell) -> str:
    """What shares a rate: everything but the seed and the rates, as the key such a cell would have."""
    return replace(cell, seed=0, optim=replace(cell.optim, lr=1.0, pretrain_lr=1.0)).key


def shorter(cell: Cell, share: float) -> Cell:
    """`cell` with a share of its steps and evaluations."""
    steps, evaluations = max(2, round(share * cell.budget.steps)), max(1, round(share * cell.budget.evaluations))
    return replace(cell, budget=replace(cell.budget, steps=steps, evaluations=evaluations))


def with_rates(cell: Cell, lr: float | None, chosen: dict[str, float]) -> Cell:
    """`cell` with `lr` in its own phase, or the chosen rate, and the chosen rate in the pretraining before it."""
    own = chosen[group(cell)] if lr is None else lr
    if cell.regime == "finetune":
        return replace(cell, optim=replace(cell.optim, lr=own, pretrain_lr=chosen[group(cell.pretraining())]))
    return replace(cell, optim=replace(cell.optim, lr=own, pretrain_lr=own))


def validation(folder: Path, cell: Cell) -> float | None:
    """The best validation score of a cell, or None if it has no result."""
    from lra.cell import RESULT

    path = folder / cell.key / RESULT
    if not path.exists():
        return None
    result = read_json(path)
    return result["val"][result["metric"]]
