"""A grid of cells, run one after another or in several processes."""

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from lra.config import Cell, Model, Regime


class SweepError(RuntimeError):
    """Some cells of a sweep failed; the message names them."""


def grid(
    base: Cell,
    *,
    mixers: Sequence[str],
    regimes: Sequence[Regime],
    seeds: Sequence[int],
    lrs: Sequence[float],
    match: bool,
) -> list[Cell]:
    """The cells of mixers x regimes x lrs x seeds, each once, pretraining first.

    `base.model.mixer_kwargs` belong to `base.model.mixer`; the other mixers take their defaults. With `match` their
    width is the one at which they have as many parameters as the first mixer.

    Raises:
        ValueError: an unknown mixer, no width within 10 %, or an empty grid.
    """
    for name, values in (("mixers", mixers), ("regimes", regimes), ("seeds", seeds), ("lrs", lrs)):
        if not values:
            raise ValueError(f"{name} is empty: the grid has no cells")
    models = model_family(base.model, base, mixers, match=match)
    cells = [
        replace(base, model=model, regime=regime, seed=seed, optim=replace(base.optim, lr=lr))
        for seed in seeds
        for lr in lrs
        for model in models
        for regime in regimes
    ]
    # A finetune cell would run its pretrain cell itself; listed first, parallel jobs do not wait for one another.
    pretraining = [cell.pretraining() for cell in cells if cell.regime == "finetune"]
    return list({cell.key: cell for cell in [*pretraining, *cells]}.values())


def model_family(model: Model, cell: Cell, mixers: Sequence[str], *, match: bool) -> list[Model]:
    """`model` with each of the mixers, the later ones matched to the size of the first."""
    from lra.networks import matched, sizes

    task = cell.build_task()
    family = [replace(model, mixer=m, mixer_kwargs=model.mixer_kwargs if m == model.mixer else {}) for m in mixers]
    target = sizes(family[0], task)["total"]
    return family if not match else [family[0], *(matched(other, task, target) for other in family[1:])]


def run_sweep(
    cells: Sequence[Cell],
    runs_dir: str | Path,
    *,
    cache_dir: str | None = None,
    accelerator: str = "auto",
    jobs: int = 1,
    threads: int | None = None,
    dry_run: bool = False,
) -> None:
    """Runs the cells that have no result yet, `jobs` at a time; one that fails does not stop the others.

    Raises:
        SweepError: some cells failed; they are named with their errors, and the same call tries them again.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    from lra.cell import RESULT

    todo = [cell for cell in cells if not (Path(runs_dir) / cell.key / RESULT).exists()]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done", flush=True)
    if dry_run:
        for cell in cells:
            print(f"{'to do' if cell in todo else 'done '}  {cell.key}  {cell.steps} steps, lr {cell.lr:g}")
        return
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    arguments = (str(runs_dir), cache_dir, accelerator, threads)
    failed: dict[str, str] = {}
    if jobs == 1:
        for cell in todo:
            if error := attempt(cell, *arguments):
                failed[cell.key] = error
    else:
        failed = _in_processes(todo, arguments, jobs)
    if failed:
        lines = "\n".join(f"  {key}: {error}" for key, error in failed.items())
        raise SweepError(f"{len(failed)} of {len(todo)} cells failed:\n{lines}")


def _in_processes(todo: Sequence[Cell], arguments: tuple[Any, ...], jobs: int) -> dict[str, str]:
    """Errors by key. Fresh processes: torch does not survive a fork once it has used its threads."""
    from multiprocessing import get_context

    failed: dict[str, str] = {}
    for wave in ([c for c in todo if c.regime == "pretrain"], [c for c in todo if c.regime != "pretrain"]):
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(attempt, cell, *arguments): cell for cell in wave}
            try:
                for future in as_completed(running):
                    if error := future.result():
                        failed[running[future].key] = error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return failed


def attempt(cell: Cell, runs_dir: str, cache_dir: str | None, accelerator: str, threads: int) -> str | None:
    """Runs one cell and returns its error, or None; an interruption is not an error of the cell and goes on up."""
    import torch

    from lra.cell import run_cell
    from lra.interrupt import Interrupted

    torch.set_num_threads(threads)
    try:
        run_cell(cell, runs_dir, cache_dir=cache_dir, accelerator=accelerator)
    except Interrupted:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
