"""Grids of cells over tasks, models, regimes and seeds, and how they are run: here, or on a SLURM cluster."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from lra.config import Cell, Model, Regime
from lra.launch import Place, Slurm, attempt, cores, has_result

Launcher = Literal["local", "slurm", "submitit-local"]


class SweepError(RuntimeError):
    """Some cells of a sweep failed; the message names them, `failures` holds their errors by key."""

    def __init__(self, message: str, failures: Mapping[str, str] | None = None):
        super().__init__(message)
        self.failures = dict(failures or {})


class Unfinished(RuntimeError):
    """The time of a sweep's slice is over; the message says how far it came, and names the cells that failed."""


@dataclass(frozen=True)
class How:
    """How the cells of a sweep are run: no part of their keys (of `place` some changes last digits)."""

    place: Place = field(default_factory=Place)
    launcher: Launcher = "local"
    slurm: Slurm = field(default_factory=Slurm)
    jobs: int = 1
    minutes: float | None = None
    dry_run: bool = False
    deadline: float | None = field(init=False, default=None)  # on the monotonic clock: `minutes` from now

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs must be at least 1; got {self.jobs}")
        if self.minutes is not None and self.minutes <= 0:
            raise ValueError(f"minutes must be positive; got {self.minutes:g}")
        if self.launcher != "local" and (self.minutes is not None or self.jobs != 1):
            raise ValueError(
                "--minutes and --jobs belong to the local launcher; on a cluster use --slurm.time and --slurm.parallel"
            )
        if self.minutes is not None:
            object.__setattr__(self, "deadline", time.monotonic() + 60 * self.minutes)


@dataclass(frozen=True)
class Plan:
    """A sweep of one task: what the command line asks for, before it is run together with that of other tasks."""

    cells: list[Cell]
    how: How
    runs_dir: str = "runs"
    choose_lrs: list[float] | None = None
    """Rates of which the best is chosen for each model and phase before the cells are run."""
    choose_share: float = 1.0
    """Share of a cell's steps for which each rate is tried."""


def grid(
    base: Cell,
    *,
    mixers: Sequence[str],
    seeds: Sequence[int],
    lrs: Sequence[float],
    match: bool,
    regimes: Sequence[Regime] | None = None,
    shares: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
) -> list[Cell]:
    """The cells of mixers x (regimes or shares) x scales x lrs x seeds, each once, pretraining first.

    Args:
        base: everything else. `base.model.mixer_kwargs` belong to `base.model.mixer`; the others take their own.
        mixers: mixers, or presets of `configs/model`.
        seeds: seeds.
        lrs: peak learning rates.
        match: widen or narrow the later mixers until they have as many parameters as the first.
        regimes: regimes; None for scratch and finetune.
        shares: in place of regimes, shares of the steps spent on pretraining; 0 is scratch.
        scales: shares of the training rows; None for base's.

    Raises:
        ValueError: an unknown mixer, no width within 10 %, a bad value, or an empty grid.
    """
    if regimes is not None and shares is not None:
        raise ValueError("give regimes or shares, not both: a share of 0 is scratch, any other is finetune")
    if regimes is None and shares is None:
        regimes = ["scratch", "finetune"]
    axes = {"mixers": mixers, "regimes": regimes, "shares": shares, "scales": scales, "seeds": seeds, "lrs": lrs}
    for name, values in axes.items():
        if values is not None and not values:
            raise ValueError(f"{name} is empty: the grid has no cells")
    budgets = [base.budget] if scales is None else [replace(base.budget, data=scale) for scale in scales]
    models = model_family(base.model, base, mixers, match=match)
    cells = []
    for seed in seeds:
        for lr in lrs:
            for budget in budgets:
                for model in models:
                    one = replace(base, model=model, seed=seed, budget=budget, optim=replace(base.optim, lr=lr))
                    if shares is None:
                        cells += [replace(one, regime=regime) for regime in regimes or ()]
                    else:
                        cells += [with_share(one, share) for share in shares]
    # A finetune cell would run its pretrain cell itself; listed first, parallel jobs do not wait for one another.
    pretraining = [cell.pretraining() for cell in cells if cell.regime == "finetune"]
    return unique([*pretraining, *cells])


def with_share(cell: Cell, share: float) -> Cell:
    """`cell` with a share of its steps spent on pretraining; with 0, from scratch."""
    if share == 0:
        return replace(cell, regime="scratch")
    return replace(cell, regime="finetune", budget=replace(cell.budget, pretrain_share=share))


def unique(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, each key once, in the order of its first."""
    return list({cell.key: cell for cell in cells}.values())


def model_family(model: Model, cell: Cell, mixers: Sequence[str], *, match: bool) -> list[Model]:
    """`model` with each of the mixers or model presets, the later ones matched to the size of the first."""
    from lra.networks import matched, sizes

    task = cell.build_task()
    family = [with_mixer(model, name) for name in mixers]
    if not match or len(family) == 1:
        return family
    target = sizes(family[0], task)["total"]
    return [family[0], *(_matched_once(matched, other, cell, target) for other in family[1:])]


def with_mixer(model: Model, name: str) -> Model:
    """`model` with another mixer: a preset of `configs/model`, or the name of a layer with its own defaults.

    `model.mixer_kwargs` are kept if the mixer stays the same, over those of the preset.
    """
    given = _model_presets().get(name, {"mixer": name})
    mixer, kwargs = given.get("mixer", name), given.get("mixer_kwargs", {})
    return replace(model, mixer=mixer, mixer_kwargs={**kwargs, **(model.mixer_kwargs if mixer == model.mixer else {})})


@lru_cache(maxsize=1)
def _model_presets() -> dict[str, dict[str, Any]]:
    from lra.presets import load, presets

    return {name: load(name).get("model", {}) for name in presets("model")}


_matched: dict[Any, Model] = {}


def _matched_once(matched: Any, model: Model, cell: Cell, target: int) -> Model:
    """The width search builds some forty networks, and a sweep asks for the same one in every slice of its grid."""
    key = (repr(model), repr(cell.task), target)
    if key not in _matched:
        _matched[key] = matched(model, cell.build_task(), target)
    return _matched[key]


def run_plans(plans: Sequence[Plan]) -> None:
    """Runs the cells of all plans as one sweep, seed by seed, so that a sweep cut short holds whole seeds first."""
    cells = unique(cell for plan in plans for cell in plan.cells)
    lrs, runs_dir, how = plans[0].choose_lrs, plans[0].runs_dir, plans[0].how
    if lrs is not None and how.dry_run:
        tried = ", ".join(f"{lr:g}" for lr in lrs)
        print(f"of the learning rates {tried} each cell's is chosen first; as with {lrs[0]:g}:")
    elif lrs is not None:
        from lra.choose import choose_lr

        cells = choose_lr(cells, lrs, runs_dir, how, plans[0].choose_share)
    run_sweep(sorted(cells, key=lambda cell: cell.seed), runs_dir, how)


def run_sweep(cells: Sequence[Cell], runs_dir: str | Path, how: How) -> None:
    """Runs the cells that have no result yet; one that fails does not stop the others.

    Raises:
        SweepError: some cells failed; they are named with their errors, and the same call tries them again.
        Unfinished: `how.minutes` are over; the same call goes on.
    """
    todo = [cell for cell in cells if not has_result(cell, runs_dir)]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done", flush=True)
    if how.dry_run:
        for cell in cells:
            print(f"{'to do' if cell in todo else 'done '}  {cell.key}  {cell.steps} steps, lr {cell.lr:g}")
        return
    if how.launcher != "local":
        from lra.launch import submit

        submit(todo, runs_dir, how.place, how.slurm, cluster=how.launcher.removeprefix("submitit-"))
        return
    place = replace(how.place, threads=how.place.threads or max(1, cores() // how.jobs))
    if how.jobs == 1:
        failed, time_over = _one_by_one(todo, str(runs_dir), place, how.deadline)
    else:
        from lra.pool import run_cells

        failed, time_over = run_cells(todo, str(runs_dir), place, how.deadline, how.jobs)
    errors = "".join(f"\n  {key}: {error}" for key, error in failed.items())
    if time_over:
        done = sum(has_result(cell, runs_dir) for cell in cells)
        text = f"{how.minutes:g} minutes are over, {done} of {len(cells)} cells are done"
        raise Unfinished(f"{text}, {len(failed)} failed:{errors}" if failed else text)
    if failed:
        raise SweepError(f"{len(failed)} of {len(todo)} cells failed:{errors}", failed)


def _one_by_one(
    todo: Sequence[Cell], runs_dir: str, place: Place, deadline: float | None
) -> tuple[dict[str, str], bool]:
    """In this process: returns the errors by key, and whether the time was over before every cell had its turn."""
    from lra.interrupt import TIME_UP, Interrupted

    failed: dict[str, str] = {}
    for cell in todo:
        if deadline is not None and time.monotonic() >= deadline:
            return failed, True
        try:
            error = attempt(cell, runs_dir, place, deadline)
        except Interrupted as stop:
            if stop.signum != TIME_UP:
                raise
            return failed, True
        if error:
            failed[cell.key] = error
    return failed, False
