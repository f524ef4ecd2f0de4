"""The `lra` command: typed functions, one per subcommand; torch and Lightning are imported inside them."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from lra.config import Budget, Cell, Model, Objective, Optim, Regime
from lra.data import CacheError
from lra.sweep import SweepError

LISTOPS = {"name": "listops"}
Accelerator = Literal["auto", "cpu", "gpu"]


def tasks(cache_dir: str | None = None) -> None:
    """List the tasks, their reference accuracy by chance, whether the data is here, and the presets.

    Args:
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
    """
    from lra.listing import show_tasks

    show_tasks(cache_dir)


def data(
    task: dict[str, Any] = LISTOPS, cache_dir: str | None = None, workers: int | None = None, force: bool = False
) -> None:
    """Make a task's data, or check what is cached: `lra data listops`.

    Args:
        task: name and options of the task.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        workers: parallel workers; null: one per core. The data do not depend on it.
        force: generate again, replacing what is cached.
    """
    from lra.listing import show_data

    show_data(task, cache_dir, workers, force)


def run(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    optim: Optim = Optim(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    regime: Regime = "scratch",
    objective: Objective = "auto",
    seed: int = 0,
    runs_dir: str = "runs",
    cache_dir: str | None = None,
    accelerator: Accelerator = "auto",
    threads: int | None = None,
) -> None:
    """Train one cell, or go on with it: `lra run listops lru masked --seed 1`.

    Args:
        task: name and options of the task.
        model: the network.
        optim: the optimiser.
        budget: steps, labels, evaluations.
        regime: scratch, pretrain, or finetune (which finds, or first runs, its pretrain cell).
        objective: what pretraining does; auto: masked for bidirectional models, causal for the others.
        seed: of initialisation, batches, noise and dropout.
        runs_dir: folder of the results.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        accelerator: where to train.
        threads: threads of torch; null: its own choice. Bit-identical results need the same number.
    """
    from lra.cell import run_cell
    from lra.listing import show_result

    cell = Cell(task, model, optim, budget, regime, objective, seed)
    cell.key  # noqa: B018  (a bad task is refused before torch is imported)
    _threads(threads)
    show_result(run_cell(cell, runs_dir, cache_dir=cache_dir, accelerator=accelerator), Path(runs_dir) / cell.key)


def sweep(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    optim: Optim = Optim(),  # noqa: B008
    budget: Budget = Budget(),  # noqa: B008
    objective: Objective = "auto",
    mixers: list[str] = ["lru", "attention"],  # noqa: B006
    regimes: list[Regime] = ["scratch", "finetune"],  # noqa: B006
    seeds: list[int] = [0, 1, 2],  # noqa: B006
    lrs: list[float] | None = None,
    match: bool = True,
    jobs: int = 1,
    dry_run: bool = False,
    runs_dir: str = "runs",
    cache_dir: str | None = None,
    accelerator: Accelerator = "auto",
    threads: int | None = None,
) -> None:
    """Run a grid of cells: `lra sweep listops --mixers lru,attention --seeds 0,1,2 --dry-run`.

    Args:
        task: name and options of the task.
        model: the network; `mixers` replaces its mixer.
        optim: the optimiser; `lrs` replaces its lr.
        budget: steps, labels, evaluations.
        objective: what pretraining does; auto: masked for bidirectional models, causal for the others.
        mixers: models of the grid.
        regimes: regimes of the grid.
        seeds: seeds of the grid.
        lrs: learning rates of the grid; null: optim.lr alone.
        match: widen or narrow the other mixers until their parameters match the first one's within 10 %.
        jobs: cells run at the same time, each in its own process.
        dry_run: print the cells and run nothing.
        runs_dir: folder of the results.
        cache_dir: folder of the data sets; null: $LRA_CACHE or the user's cache.
        accelerator: where to train.
        threads: threads of torch per job; null: the cores shared between the jobs.
    """
    from lra.sweep import grid, run_sweep

    base = Cell(task, model, optim, budget, "scratch", objective)
    cells = grid(base, mixers=mixers, regimes=regimes, seeds=seeds, lrs=lrs or [optim.lr], match=match)
    run_sweep(
        cells, runs_dir, cache_dir=cache_dir, accelerator=accelerator, jobs=jobs, threads=threads, dry_run=dry_run
    )


def report(runs_dir: str = "runs", out: str | None = None) -> None:
    """Write report.md, report.csv and report.png from the results in a folder, and print the tables.

    Args:
        runs_dir: folder of the results, searched for result.json at any depth.
        out: folder of the report; null: runs_dir.
    """
    from lra.report import show_report, write_report
    from lra.results import load_results

    results = load_results(Path(runs_dir))
    show_report(results)
    written = write_report(results, Path(out or runs_dir))
    print("\n".join(f"wrote {path}" for path in written))


def params(
    task: dict[str, Any] = LISTOPS,
    model: Model = Model(),  # noqa: B008
    mixers: list[str] = ["lru", "attention"],  # noqa: B006
) -> None:
    """Count parameters, and find the widths at which the mixers match the first one's: `lra params listops lru`.

    Args:
        task: name and options of the task.
        model: the network; `mixers` replaces its mixer.
        mixers: what to compare.
    """
    from lra.listing import show_params

    show_params(task, model, mixers)


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
    from lra.quick import run_quick

    _threads(threads)
    run_quick(Path(out), steps=steps, seed=seed, cache_dir=cache_dir)


COMMANDS = {f.__name__: f for f in (tasks, data, run, sweep, report, params, quick)}
TAKES_PRESETS = ("data", "run", "sweep", "params")
LISTS = ("--mixers", "--regimes", "--seeds", "--lrs")
# What a subcommand takes of a file that describes a whole run.
SECTIONS = {
    "data": ("task", "cache_dir"),
    "params": ("task", "model"),
    "sweep": ("task", "model", "optim", "budget", "objective", "runs_dir", "cache_dir", "accelerator", "threads"),
}
DESCRIPTION = """The Long Range Arena with pretraining.
Presets (`lra tasks` lists them) or YAML files come first, in the order in which they are merged; flags override them:
lra run listops lru masked --seed 1 --optim.lr 5e-4"""


def _threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1; got {threads}")
        import torch

        torch.set_num_threads(threads)


def prepare(argv: list[str]) -> list[str]:
    """Rewrites what a person types into what jsonargparse takes.

    `lra run listops lru --config my.yaml --dry-run --seeds 0,1` becomes one merged `--config` (so that flags override
    files wherever they stand), `--dry_run=true` and `--seeds=[0,1]`.
    """
    if not argv or argv[0] not in COMMANDS:
        return argv
    command, rest = argv[0], argv[1:]
    names: list[str] = []
    flags: list[str] = []
    i = 0
    while i < len(rest):
        word = rest[i]
        i += 1
        if not word.startswith("-"):
            if command == "report":
                if any(f.startswith("--runs_dir=") for f in flags):
                    raise ValueError(f"report takes one folder, searched at any depth; got a second one, {word!r}")
                flags.append(f"--runs_dir={word}")
            elif command in TAKES_PRESETS:
                names.append(word)
            else:
                flags.append(word)
            continue
        if not word.startswith("--"):
            flags.append(word)
            continue
        flag, given, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        if flag in ("--help", "--print_config"):
            flags.append(word)
            continue
        if not given:
            if i < len(rest) and not rest[i].startswith("--"):
                value, i = rest[i], i + 1
            else:
                value = "true"
        if flag == "--config":
            names.append(value)
        elif flag in LISTS and not value.startswith("["):
            flags.append(f"{flag}=[{value}]")
        else:
            flags.append(f"{flag}={value}")
    if not names:
        return [command, *flags]
    from lra.presets import read

    config = read(names)
    kept = {k: v for k, v in config.items() if k in SECTIONS.get(command, config)}
    return [command, f"--config={json.dumps(kept)}", *flags]


def main(argv: list[str] | None = None) -> int:
    """Entry point of `lra`; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C."""
    from lra.interrupt import Interrupted

    given = sys.argv[1:] if argv is None else argv
    if given == ["--version"]:
        from importlib.metadata import version

        print(f"lra, linrnn {version('linrnn')}")
        return 0
    try:
        from lra.parser import parse_and_call

        parse_and_call(COMMANDS, prepare(given), DESCRIPTION)
    except Interrupted as stop:
        print(f"\nlra: {stop}. To go on, run the same command again:\n  lra {shlex.join(given)}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print(f"\nlra: interrupted. To go on, run the same command again:\n  lra {shlex.join(given)}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name in ("jsonargparse", "lightning", "datasets", "rich", "matplotlib", "yaml", "numpy"):
            print(f"lra: {error.name} is not installed: pip install 'linrnn[lra]'", file=sys.stderr)
            return 2
        raise
    except (ValueError, FloatingPointError, OSError, CacheError, SweepError) as error:
        if os.environ.get("LRA_TRACEBACK"):
            raise
        print(f"lra: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
