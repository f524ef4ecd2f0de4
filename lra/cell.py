"""One cell: returned at once if computed, resumed if begun, bit-identical either way."""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

from lra.config import Cell
from lra.files import read_json, write_json, write_text

CONFIG, RESULT = "config.yaml", "result.json"
Say = Callable[[str], None]


def run_cell(
    cell: Cell,
    runs_dir: str | Path = "runs",
    *,
    cache_dir: str | Path | None = None,
    accelerator: str = "auto",
    say: Say = print,
) -> dict[str, Any]:
    """Computes a cell, and before it the pretrain cell it starts from, and returns its result.

    Args:
        cell: what to compute; `cell.key` is its folder in `runs_dir`.
        cache_dir: folder of the data sets; None for the default of `lra.data`.
        accelerator: auto (the GPU if there is one), cpu or gpu.
        say: takes one line of text per event.

    Returns:
        The content of `result.json`.

    Raises:
        ValueError: a bad configuration, or a damaged or foreign file in the folder.
        Interrupted: Ctrl-C; the same call resumes.
    """
    from filelock import FileLock, Timeout

    task = cell.build_task()
    folder = Path(runs_dir) / cell.key
    if (done := finished(folder)) is not None:
        return done
    _check_buildable(cell, task, accelerator)
    pretrained = None
    if cell.regime == "finetune":
        pretrained = run_cell(cell.pretraining(), runs_dir, cache_dir=cache_dir, accelerator=accelerator, say=say)

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{cell.key}: another process is computing it; waiting")
        lock.acquire()
    try:
        # Another process may have finished it while this one waited for the lock.
        if (done := finished(folder)) is not None:
            return done
        write_text(folder / CONFIG, config_yaml(cell))
        result = _compute(cell, task, folder, Path(runs_dir), pretrained, cache_dir, accelerator, say)
        write_json(folder / RESULT, result)
    finally:
        lock.release()
    return result


def finished(folder: Path) -> dict[str, Any] | None:
    """The result of a cell that is already computed, or None.

    Raises:
        ValueError: `result.json` is damaged.
    """
    path = folder / RESULT
    return read_json(path) if path.exists() else None


def config_yaml(cell: Cell) -> str:
    """The configuration of a cell, to be read back by `lra run --config`."""
    return f"# lra run --config {CONFIG}\n" + yaml.safe_dump(cell.to_dict(), sort_keys=False)


def _check_buildable(cell: Cell, task: Any, accelerator: str) -> None:
    """Refuses a bad model or device before any data is generated."""
    from lra.networks import sizes
    from lra.train import device_kind

    sizes(cell.model, task)
    device_kind(accelerator)


@lru_cache(maxsize=2)
def _data(task: Any, cache_dir: str | Path | None) -> tuple[dict[str, Any], dict[str, float]]:
    """Splits and reference lines of a task, shared by the cells that one process runs after one another."""
    from lra.data import load

    splits = load(task, cache_dir)
    return splits, task.reference_lines(splits)


def _compute(
    cell: Cell,
    task: Any,
    folder: Path,
    runs_dir: Path,
    pretrained: dict[str, Any] | None,
    cache_dir: str | Path | None,
    accelerator: str,
    say: Say,
) -> dict[str, Any]:
    from lra import objectives
    from lra.batches import Tokens, describe, stream_seed
    from lra.evaluate import by_length, predictions
    from lra.networks import build_net, load_weights, pooling, sizes
    from lra.provenance import provenance
    from lra.train import BEST, LAST, fit

    pretraining = cell.regime == "pretrain"
    splits, lines = _data(task, cache_dir)
    # Pretraining sees the inputs of all training rows and of no other split.
    train = Tokens.from_dataset(splits["train"], task.pad_id, None if pretraining else cell.budget.labels)
    val = Tokens.from_dataset(splits["val"], task.pad_id)

    net = build_net(cell.model, task, denoise=pretraining, seed=stream_seed(cell.seed, f"init {cell.regime}"))
    if pretrained is not None:
        load_weights(net, runs_dir / pretrained["key"] / BEST, heads=False)
    score: Any = lambda net, batch, generator: objectives.classification(net, batch)  # noqa: E731
    if pretraining:
        score = partial(_denoise, cell.denoising, task.mask_id, task.mask_rate)

    resumed = (folder / LAST).exists()
    say(f"{cell.key}: {'resuming' if resumed else 'starting'}, {cell.steps} steps")
    began = time.monotonic()
    run = fit(net, score, cell, train, val, folder, accelerator=accelerator)
    load_weights(net, folder / BEST, heads=True)

    parameters = sizes(cell.model, task)
    result: dict[str, Any] = {
        "key": cell.key,
        "config": cell.to_dict(),
        "plan": cell.plan(),
        "label": cell.label,
        "pooling": pooling(cell.model, task),
        "chance": 1 / task.n_classes,
        "parameters": parameters,
        "steps": cell.steps,
        "tokens": run["tokens"],
        "flops": flops(cell, parameters["blocks"], run["tokens"], run["squares"]),
        "seconds": run["seconds"],
        "best_step": run["best"]["step"],
        "val": {"loss": run["best"]["val_loss"], "accuracy": run["best"]["val_accuracy"]},
        "data": {"train": describe(train), "val": describe(val)},
        "device": run["device"],
        **provenance(),
        "curve": run["curve"],
    }
    if not pretraining:
        test = Tokens.from_dataset(splits["test"], task.pad_id)
        correct = predictions(net, test) == test.labels
        result["test"] = {"accuracy": float(correct.mean()), "by_length": by_length(correct, test.lengths)}
        result["data"]["test"] = describe(test)
        result["reference_lines"] = lines
    if pretrained is not None:
        shown = ("key", "steps", "tokens", "flops", "seconds", "val", "best_step", "curve")
        result["pretrain"] = {name: pretrained[name] for name in shown}
    scored = f"test accuracy {result['test']['accuracy']:.3f}" if not pretraining else "pretrained"
    say(f"{cell.key}: {scored}, val accuracy {result['val']['accuracy']:.3f}, {time.monotonic() - began:.0f} s")
    return result


def _denoise(kind: Any, mask_id: int, rate: float, net: Any, batch: Any, generator: Any) -> Any:
    from lra.objectives import denoising

    return denoising(kind, net, batch, generator, mask_id=mask_id, rate=rate)


def flops(cell: Cell, blocks: int, tokens: int, squares: int) -> float:
    """Estimated floating-point operations of training, forward and backward.

    6 per block parameter and token (Kaplan et al. 2020, arXiv:2001.08361), and for softmax attention 12 per layer,
    channel and pair of positions (half of it when causal). The scans themselves are not counted: they are small.
    """
    pairs = squares if cell.model.mixer == "attention" else 0
    attention = 12 * cell.model.n_layers * cell.model.d_model * pairs * (1.0 if cell.model.bidirectional else 0.5)
    return 6.0 * blocks * tokens + attention
