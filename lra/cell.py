"""One cell: returned at once if computed, resumed if begun, bit-identical either way."""

import time
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lra.config import Cell, pooling
from lra.files import remove_temporaries, write_json, write_text
from lra.folders import CONFIG, RESULT, Say, computed, config_yaml, held
from lra.tasks.base import Levels, Task

if TYPE_CHECKING:
    from lra.distributed import Team
    from lra.evaluate import Scorer


class Places(NamedTuple):
    """Where a cell is computed: no part of its key.

    Still the accelerator changes the last digits, and so does the number of processes, devices x nodes, which also
    decides the units that dropout drops.
    """

    runs_dir: Path
    cache_dir: str | Path | None
    data_dir: str | Path | None
    accelerator: str
    devices: int
    nodes: int


def run_cell(
    cell: Cell,
    runs_dir: str | Path = "runs",
    *,
    cache_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    accelerator: str = "auto",
    devices: int = 1,
    nodes: int = 1,
    say: Say = print,
) -> dict[str, Any]:
    """Computes a cell, and before it the pretrain cell it starts from, and returns its result.

    Args:
        cell: what to compute; `cell.key` is its folder in `runs_dir`.
        cache_dir: folder of the data sets; None for the default of `lra.data`.
        data_dir: folder of the source files of real data, read when the data set is not cached; None for the hub.
        accelerator: auto (the GPU if there is one), cpu or gpu.
        devices, nodes: processes on each machine, and machines, that share the cell's batches. Those of one machine
            are started here, unless SLURM or torchrun has started them: then each of them calls this.
        say: takes one line of text per event.

    Returns:
        The content of `result.json`.

    Raises:
        ValueError: a bad configuration, a damaged or foreign file in the folder, or a result or checkpoint there that
            belongs to other data than those cached now.
        Interrupted: Ctrl-C, or a deadline; the same call resumes.
        OSError: a file cannot be written, such as on a full disk.
    """
    where = Places(Path(runs_dir), cache_dir, data_dir, accelerator, devices, nodes)
    cell.build_task()
    if devices == nodes == 1 and (done := computed(cell, where.runs_dir / cell.key, cache_dir)) is not None:
        return done  # without torch

    from lra.distributed import check_processes, check_shares, gathered

    check_processes(devices, nodes, accelerator)
    check_shares(cell.optim.batch_size, devices * nodes)
    with gathered(accelerator, devices, nodes) as team:
        return _run(cell, where, team, say if team.leads else lambda line: None)


def _run(cell: Cell, where: Places, team: "Team", say: Say) -> dict[str, Any]:
    """What `run_cell` does, in each process of a team that was started outside, or in the one process there is."""
    task, folder = cell.build_task(), where.runs_dir / cell.key
    if (done := team.tell(lambda: computed(cell, folder, where.cache_dir))) is not None:
        return done
    _check_buildable(cell, task, where.accelerator)
    pretrained = _run(cell.pretraining(), where, team, say) if cell.regime == "finetune" else None
    with held(cell.key, folder, team, say):
        # Another process may have finished it while this one waited for the lock.
        if (done := team.tell(lambda: computed(cell, folder, where.cache_dir))) is not None:
            return done
        team.tell(lambda: remove_temporaries(folder))
        team.tell(lambda: write_text(folder / CONFIG, config_yaml(cell)))
        work = partial(_compute, cell, task, folder, where, pretrained)
        if where.devices > team.world:
            from lra.workers import in_workers

            result = in_workers(work, where.devices, where.accelerator, say)
        else:
            result = work(say, team)
        return team.tell(lambda: _recorded(folder, result))


def _recorded(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    write_json(folder / RESULT, result)
    return result


def _check_buildable(cell: Cell, task: Task, accelerator: str) -> None:
    """Refuses a bad model or device before any data is generated."""
    from lra.distributed import device_kind
    from lra.networks import sizes

    sizes(cell.model, task)
    device_kind(accelerator)


@lru_cache(maxsize=2)
def _data(task: Task, cache_dir: str | Path | None, data_dir: str | Path | None) -> tuple[dict[str, Any], Any, Any]:
    """Splits, reference lines and origin of a task, shared by the cells that one process runs after one another."""
    from lra.data import load, origin

    splits = load(task, cache_dir, data_dir=data_dir)
    return splits, task.reference_lines(splits), origin(task, cache_dir)


def _compute(
    cell: Cell, task: Task, folder: Path, where: Places, pretrained: dict[str, Any] | None, say: Say, team: "Team"
) -> dict[str, Any]:
    """Trains and scores; of a team, the first process returns the result and the others an empty one."""
    from lra.batches import BatchPlan, stream_seed
    from lra.checkpoints import BEST, LAST
    from lra.costs import run_flops
    from lra.examples import Examples, describe, histogram
    from lra.networks import build_net, load_weights, sizes
    from lra.provenance import provenance
    from lra.train import fit

    pretraining = cell.regime == "pretrain"
    splits, lines, origin = _data(task, where.cache_dir, where.data_dir)
    if pretrained is not None and pretrained["data"]["fingerprint"] != origin["fingerprint"]:  # made since it ended
        raise ValueError(
            f"{pretrained['key']} was pretrained on other data than those cached now (their values differ); "
            f"delete its folder and run again"
        )
    # Pretraining sees the inputs of training rows and of no other split.
    train = Examples.from_dataset(splits["train"], task, training_rows(cell, len(splits["train"])))
    val = Examples.from_dataset(splits["val"], task)

    denoise = cell.denoising if pretraining else None
    net = build_net(cell.model, task, denoise=denoise, seed=stream_seed(cell.seed, f"init {cell.regime}"))
    net.computed(cell.compute)
    if pretrained is not None:
        load_weights(net, where.runs_dir / pretrained["key"] / BEST, heads=False)

    resumed = (folder / LAST).exists()
    say(f"{cell.key}: {'resuming' if resumed else 'starting'}, {cell.steps} steps")
    began = time.monotonic()
    run = fit(
        net,
        scorer(cell, task),
        cell,
        train,
        val,
        folder,
        metric=cell_metric(cell, task),
        fingerprint=origin["fingerprint"],
        accelerator=where.accelerator,
        team=team,
    )
    if not team.leads:
        return {}
    load_weights(net, folder / BEST, heads=True)

    uses = BatchPlan(train.lengths, cell.optim.batch_size, cell.seed).uses(cell.steps)
    result: dict[str, Any] = {
        "key": cell.key,
        "config": cell.to_dict(),
        "plan": cell.plan(),
        "label": cell.label,
        "encoding": task.encoding,
        "pooling": pooling(cell.model, task),
        "chance": 1 / task.n_classes,
        "metric": cell_metric(cell, task),
        "parameters": sizes(cell.model, task),
        "steps": cell.steps,
        "tokens": int(uses @ train.lengths),
        "flops": run_flops(cell.model, task, histogram(train, uses), denoise=denoise, asked=train.asked),
        "seconds": run["seconds"],
        "loader_seconds": run["loader_seconds"],
        "best_step": run["best"]["step"],
        "val": {name.removeprefix("val_"): value for name, value in run["best"].items() if name.startswith("val_")},
        "data": {"train": describe(train), "val": describe(val), **origin},
        "device": run["device"],
        "processes": run["processes"],
        **provenance(),
        "curve": run["curve"],
    }
    if not pretraining:
        result["test"], result["data"]["test"] = _test(net, task, splits["test"], cell.seed)
        result["reference_lines"] = lines
    if pretrained is not None:
        shown = "key metric steps tokens flops seconds loader_seconds val best_step curve".split()
        result["pretrain"] = {name: pretrained[name] for name in shown}
    scored = f"test accuracy {result['test']['accuracy']:.3f}" if not pretraining else "pretrained"
    value = f"val {result['metric']} {result['val'][result['metric']]:.3f}"
    say(f"{cell.key}: {scored}, {value}, {time.monotonic() - began:.0f} s")
    return result


def training_rows(cell: Cell, rows: int) -> int:
    """How many training rows the cell may see; the first ones, so smaller sets lie in larger ones."""
    allowed = max(1, round(cell.budget.data * rows))
    if cell.regime == "pretrain" or cell.budget.labels is None:
        return allowed
    return min(allowed, cell.budget.labels)


def cell_metric(cell: Cell, task: Task) -> Literal["accuracy", "r2"]:
    """What chooses the weights that are kept: accuracy, or the variance explained where pretraining is a regression."""
    regression = isinstance(task.inputs, Levels) and task.inputs.loss == "l1"
    return "r2" if cell.regime == "pretrain" and regression else "accuracy"


def scorer(cell: Cell, task: Task) -> "Scorer":
    """The objective of the cell."""
    from lra import objectives

    if cell.regime == "pretrain":
        return partial(objectives.denoising, cell.denoising, rate=task.mask_rate)
    return lambda net, batch, generator: objectives.classification(net, batch)


def _test(net: Any, task: Task, split: Any, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies on the test split, as `result.json` has them, and the size of the split.

    They are over labels, as on the validation split: of a dense task over the positions that are asked, not over rows.
    """
    from lra.evaluate import PROBED, accuracies, grouped, overall, probe
    from lra.examples import Examples, describe, resident

    test = Examples.from_dataset(split, task)
    right = accuracies(net, resident(test, next(net.parameters()).device))
    groups = {"length": test.lengths, **task.strata(split)}
    scores = {
        "accuracy": overall(right, test.counts),
        "groups": {name: grouped(right, values, test.counts) for name, values in groups.items()},
        **({"shuffled": {}} if task.dense else probe(net, Examples.from_dataset(split, task, PROBED), seed)),
    }
    return scores, describe(test)
