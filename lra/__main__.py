"""The `lra` command: typed functions, one per subcommand; torch and Lightning are imported inside them."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from lra.arguments import prepare
from lra.config import Budget, Cell, Compute, Model, Objective, Optim, Regime
from lra.data import CacheError
from lra.failures import explain
from lra.launch import LaunchError, Place, Slurm
from lra.sweep import How, Launcher, Plan, SweepError, Unfinished

LISTOPS = {"name": "listops"}
Accelerator = Literal["auto", "cpu", "gpu"]


def tasks(cache_dir: str | None = None) -> None:
    """List the tasks, their accuracy by chance, their size, whether the data is here, and the presets.

    Args:
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
    """
    from lra.listing import show_tasks

    show_tasks(cache_dir)


def data(
    task: dict[str, Any] = LISTOPS,
    cache_dir: str | None = None,
    data_dir: str | None = None,
    workers: int | None = None,
    force: bool = False,
    picture: str | None = None,
) -> None:
    """Make a task's data, or check what is cached: `lra data listops`.

    Args:
        task: name and options of the task.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        data_dir: folder of the source files of a task on real data; null: the Hugging Face hub.
        workers: parallel workers; null: one per core. The data do not depend on it.
        force: generate again, replacing what is cached.
        picture: a PNG file to write examples to, of tasks with images.
    """
    from lra.listing import show_data

    show_data(task, cache_dir, data_dir, workers, force, picture)


def run(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    optim: Optim = Optim(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    compute: Compute = Compute(),  # noqa: B008
    regime: Regime = "scratch",
    objective: Objective = "auto",
    seed: int = 0,
    runs_dir: str = "runs",
    cache_dir: str | None = None,
    data_dir: str | None = None,
    accelerator: Accelerator = "auto",
    devices: int = 1,
    nodes: int = 1,
    threads: int | None = None,
) -> None:
    """Train one cell, or go on with it: `lra run listops lru masked --seed 1`.

    Args:
        task: name and options of the task.
        model: the network.
        optim: the optimiser.
        budget: steps, labels, evaluations.
        compute: precision and compilation.
        regime: scratch, pretrain, or finetune (which finds, or first runs, its pretrain cell).
        objective: what pretraining does; auto: masked for bidirectional models, causal for the others.
        seed: of initialisation, batches, noise and dropout.
        runs_dir: folder of the results.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        data_dir: folder of the source files of a task on real data; null: the Hugging Face hub.
        accelerator: where to train.
        devices: GPUs, or processes on a CPU, of each node that share every batch.
        nodes: machines; under SLURM or torchrun, which start the processes.
        threads: threads of torch; null: its own choice. Bit-identical results need the same number.
    """
    from lra.launch import compute as compute_cell
    from lra.listing import show_result

    cell = Cell(
        task=task,
        model=model,
        optim=optim,
        budget=budget,
        compute=compute,
        regime=regime,
        objective=objective,
        seed=seed,
    )
    cell.key  # noqa: B018  (a bad task is refused before torch is imported)
    place = Place(cache_dir, data_dir, accelerator, devices, nodes, threads)
    show_result(compute_cell(cell, runs_dir, place), Path(runs_dir) / cell.key)


def sweep(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    optim: Optim = Optim(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    compute: Compute = Compute(),  # noqa: B008
    objective: Objective = "auto",
    preset: str | None = None,
    mixers: list[str] = ["lru", "attention"],  # noqa: B006
    regimes: list[Regime] | None = None,
    shares: list[float] | None = None,
    scales: list[float] | None = None,
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    lrs: list[float] | None = None,
    choose: Literal["lr"] | None = None,
    choose_share: float = 1.0,
    match: bool = True,
    launcher: Launcher = "local",
    slurm: Slurm = Slurm(),  # noqa: B008
    jobs: int = 1,
    minutes: float | None = None,
    dry_run: bool = False,
    runs_dir: str = "runs",
    cache_dir: str | None = None,
    data_dir: str | None = None,
    accelerator: Accelerator = "auto",
    devices: int = 1,
    nodes: int = 1,
    threads: int | None = None,
) -> Plan:
    """Run a grid of cells on one or several tasks: `lra sweep listops image --mixers lru,attention --dry-run`.

    Presets that name a task multiply, all others hold for every task. What is done is not computed again: the same
    command goes on after an error, an interruption, or the end of its minutes.

    Args:
        task: name and options of the task.
        model: the network; `mixers` replaces its mixer.
        optim: the optimiser; `lrs` replaces its lr.
        budget: steps, labels, evaluations.
        compute: precision and compilation.
        objective: what pretraining does; auto: masked for bidirectional models, causal for the others.
        preset: a whole sweep of configs/sweep, such as gpu-short; its name among the presets means the same.
        mixers: models of the grid: presets of configs/model, or names of layers.
        regimes: regimes of the grid; null: scratch and finetune.
        shares: in place of regimes, shares of the steps spent on pretraining, such as 0,0.2,0.4,0.6; 0 is scratch.
        scales: shares of the training rows, such as 0.01,0.1,1; null: budget.data alone.
        seeds: seeds of the grid.
        lrs: learning rates of the grid; null: optim.lr alone.
        choose: lr: try `lrs` with a seed of its own, keep the best on validation by model and phase, run the seeds.
        choose_share: share of its steps for which each rate is tried.
        match: widen or narrow the other mixers until their parameters match the first one's within 10 %.
        launcher: local: processes of this machine; slurm: a job array, which goes on without this program.
        slurm: what a job of the array asks for.
        jobs: cells run at the same time by the local launcher, each in its own process.
        minutes: stop after so many, saving the running cell, with exit code 75 if anything is left to do.
        dry_run: print the cells and run nothing.
        runs_dir: folder of the results.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        data_dir: folder of the source files of tasks on real data; null: the Hugging Face hub.
        accelerator: where to train.
        devices: GPUs, or processes on a CPU, of each node that share every batch.
        nodes: machines; under SLURM.
        threads: threads of torch per job; null: the cores shared between the jobs.

    Returns:
        The cells of one task and how to run them; `main` runs those of all tasks together.
    """
    from lra.sweep import grid

    place = Place(cache_dir, data_dir, accelerator, devices, nodes, threads)
    how = How(place, launcher, slurm, jobs, minutes, dry_run)
    base = Cell(task=task, model=model, optim=optim, budget=budget, compute=compute, objective=objective)
    axes = {"mixers": mixers, "regimes": regimes, "shares": shares, "scales": scales, "seeds": seeds}
    rates = [optim.lr] if lrs is None else lrs
    # A choice sets the rates of the cells itself.
    cells = grid(base, **axes, lrs=rates[:1] if choose else rates, match=match)  # type: ignore[arg-type]
    return Plan(cells, how, runs_dir, rates if choose else None, choose_share)


def report(runs_dir: str = "runs", out: str | None = None) -> None:
    """Write a report of the results in a folder (report.md, .html, .csv and pictures), and print its tables.

    Args:
        runs_dir: folder of the results, searched for result.json at any depth.
        out: folder of the report; null: runs_dir.
    """
    from lra.report import show_report, write_report
    from lra.results import load_choices, load_results

    results, choices = load_results(Path(runs_dir)), load_choices(Path(runs_dir))
    show_report(results, choices)
    written = write_report(results, Path(out or runs_dir), choices)
    print("\n".join(f"wrote {path}" for path in written))


def params(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    mixers: list[str] | None = None,
    both: bool = False,
) -> None:
    """Count parameters, and find the widths at which the mixers match the model's: `lra params listops`.

    Args:
        task: name and options of the task.
        model: the network whose size is matched; `mixers` replaces its mixer.
        mixers: what to compare with it: presets of configs/model, or names of layers; null: every preset.
        both: print two tables, of models that see both sides and of models that see only the past.
    """
    from lra.listing import show_params

    show_params(task, model, mixers, both)


def quick(
    steps: int | None = None,
    seed: int = 0,
    out: str = "runs/quick",
    cache_dir: str | None = None,
    threads: int = 1,
) -> None:
    """Compare LRU and Transformer, from scratch and pretrained, on a reduced ListOps in minutes on a CPU.

    Args:
        steps: optimiser steps of each of the four cells; null: the preset's.
        seed: of initialisation, batches, noise and dropout.
        out: folder of the results and the report; running again resumes there.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        threads: threads of torch; the models are too small for more than one to pay.
    """
    from lra.launch import use_threads
    from lra.quick import run_quick

    use_threads(Place(threads=threads))
    run_quick(Path(out), steps=steps, seed=seed, cache_dir=cache_dir)


COMMANDS = {f.__name__: f for f in (tasks, data, run, sweep, report, params, quick)}
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: try again
DESCRIPTION = """The Long Range Arena with pretraining.
Presets (`lra tasks` lists them) or YAML files come first, in the order in which they are merged; flags override them:
lra run listops lru masked --seed 1 --optim.lr 5e-4"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of `lra`; returns the exit code: 0, 2 for bad input, 75 for a sweep out of time, 130 after Ctrl-C."""
    from lra.interrupt import Interrupted

    given = sys.argv[1:] if argv is None else argv
    if given == ["--version"]:
        from importlib.metadata import version

        print(f"lra, linrnn {version('linrnn')}")
        return 0
    again = f"To go on, run the same command again:\n  lra {shlex.join(given)}"
    try:
        from lra.parser import parse_and_call

        returned = [parse_and_call(COMMANDS, line, DESCRIPTION) for line in prepare(given)]
        if given and given[0] == "sweep":
            from lra.sweep import run_plans

            run_plans(returned)
    except Unfinished as stop:
        print(f"\nlra: unfinished: {stop}\n{again}", file=sys.stderr)
        return UNFINISHED
    except Interrupted as stop:
        print(f"\nlra: {stop}. {again}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"\nlra: interrupted. {again}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name in ("jsonargparse", "lightning", "datasets", "rich", "matplotlib", "yaml", "numpy"):
            print(f"lra: {error.name} is not installed: pip install 'linrnn[lra]'", file=sys.stderr)
            return 2
        raise
    except (ValueError, FloatingPointError, OSError, CacheError, SweepError, LaunchError) as error:
        if os.environ.get("LRA_TRACEBACK"):
            raise
        print(f"lra: error: {error if isinstance(error, SweepError) else explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
