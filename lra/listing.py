"""What the small subcommands print: tasks, data, parameters, one result."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lra.config import Cell, Model


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table, first column left-aligned, the others right; whole even when the terminal is narrow."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console = Console()
    widest = Console(width=1000).measure(shown).maximum
    Console(width=max(console.width, widest)).print(shown)


def show_tasks(cache_dir: str | None) -> None:
    """Prints the tasks with their defaults and the presets."""
    from lra.data import data_folder
    from lra.presets import presets
    from lra.tasks import TASKS

    rows = []
    for name, make in TASKS.items():
        task = make()
        here = "yes" if data_folder(task, cache_dir).exists() else f"lra data {name}"
        splits = " / ".join(f"{n:,}" for n in task.rows.values()) if task.rows else "as the source has"
        length = f"{'2 x ' if task.two_inputs else ''}{task.max_length:,}"
        numbers = [str(task.n_classes), f"{100 / task.n_classes:.2g}%", length, task.encoding, splits]
        rows.append([name, *numbers, f"{task.mask_rate:.0%}", task.pooling, here])
    columns = "task,classes,chance,longest,encoding,train / val / test,masked,pooling,data here".split(",")
    table("Tasks, with their defaults", columns, rows)
    for name, make in TASKS.items():
        print(f"  {name}: {make.summary}")
    by_folder: dict[str, list[str]] = {}
    for name, path in presets().items():
        by_folder.setdefault("" if path.parent.name == "configs" else path.parent.name, []).append(name)
    print("Presets (`lra run listops lru masked` merges three of them; those of sweep are for `lra sweep`):")
    for folder, names in by_folder.items():
        print(f"  {folder or 'whole runs'}: {', '.join(names)}")


def show_data(
    config: dict[str, Any],
    cache_dir: str | None,
    data_dir: str | None,
    workers: int | None,
    force: bool,
    picture: str | None,
) -> None:
    """Makes or checks a data set, prints its splits and reference lines, and writes a picture of it if asked."""
    from lra.data import data_folder, load
    from lra.examples import Examples, describe

    task = Cell(task=config).build_task()
    splits = load(task, cache_dir, workers=workers, force=force, data_dir=data_dir)
    rows = []
    for name, split in splits.items():
        size = describe(Examples.from_dataset(split, task))
        mean = f"{size['tokens'] / size['rows']:.0f}"
        rows.append([name, f"{size['rows']:,}", f"{size['tokens']:,}", str(size["min"]), mean, str(size["max"])])
    columns = ["split", "rows", "positions", "shortest", "mean", "longest"]
    table(f"{task.name}, {task.encoding}: {data_folder(task, cache_dir)}", columns, rows)
    print("Test accuracy of rules that need no network:")
    for name, accuracy in task.reference_lines(splits).items():
        print(f"  {accuracy:6.1%}  {name}")
    if picture is not None:
        task.picture(splits, Path(picture))
        print(f"wrote {picture}")


def show_params(config: dict[str, Any], model: Model, mixers: list[str] | None, both: bool) -> None:
    """Prints parameter counts of the mixers at the model's width and at the width that matches the model's size."""
    from lra.presets import presets

    names = list(dict.fromkeys([model.mixer, *presets("model")])) if mixers is None else mixers
    for bidirectional in (True, False) if both else (model.bidirectional,):
        _params_table(config, replace(model, bidirectional=bidirectional), names)


def _params_table(config: dict[str, Any], model: Model, names: list[str]) -> None:
    from lra.networks import check_mixer, sizes
    from lra.sweep import model_family, with_mixer

    cell = Cell(task=config, model=model)
    task = cell.build_task()
    rows, notes = [], []
    for name in names:
        plain = with_mixer(model, name)
        check_mixer(plain)
        try:
            size = sizes(plain, task)
            counts = [f"{size['total']:,}", f"{size['blocks']:,}"]
        except ValueError:  # such as a width that the number of heads does not divide
            counts = ["-", "-"]
        try:
            # The first name is what a sweep of these mixers matches the others to.
            fitted = model_family(model, cell, [names[0], name], match=True)[1]
            fit = [str(fitted.d_model), f"{sizes(fitted, task)['total']:,}"]
        except ValueError as error:
            fit = ["none", "-"]
            notes.append(f"{name}: {error}")
        rows.append([name, str(plain.d_model), *counts, *fit])
    columns = ["mixer", "width", "parameters", "in blocks", "matched width", "parameters"]
    direction = "both directions" if model.bidirectional else "causal"
    table(f"{task.name}, {model.n_layers} blocks, {direction}, matched to {names[0]}", columns, rows)
    print("".join(f"{note}\n" for note in notes), end="")


def show_result(result: dict[str, Any], folder: Path) -> None:
    """Prints the numbers of one cell."""
    cost = f"{result['parameters']['total']:,} parameters, {result['steps']:,} steps, {result['tokens']:,} tokens"
    waiting = f"{result['loader_seconds'] / max(result['seconds'], 1e-9):.0%} of them making batches"
    print(f"{result['key']}: {cost}, {result['seconds']:.0f} s ({waiting}) on {result['device']}")
    if "pretrain" in result:
        before = result["pretrain"]
        print(f"  after pretraining for {before['steps']:,} steps, {before['seconds']:.0f} s: {before['key']}")
    metric = result["metric"]
    if "test" not in result:
        value = _metric(metric, result["val"][metric])
        print(f"  denoising {metric} on validation {value} (step {result['best_step']})")
    else:
        value = _metric(metric, result["val"][metric])
        print(f"  test accuracy {result['test']['accuracy']:.1%}, validation {value} (step {result['best_step']})")
        for name, groups in result["test"]["groups"].items():
            for b in groups:
                print(f"    {name} {b['min']} to {b['max']}: {b['accuracy']:.1%} of {b['n']}")
        print("  reference lines: " + ", ".join(f"{k} {v:.1%}" for k, v in result["reference_lines"].items()))
    print(f"  {folder / 'result.json'}")


def _metric(name: str, value: float) -> str:
    """An accuracy in percent; the share of variance explained, which can be negative, as it is."""
    return f"{value:.1%}" if name == "accuracy" else f"{value:.3f}"
