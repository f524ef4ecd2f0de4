"""What the small subcommands print: tasks, data, parameters, one result."""

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
        splits = " / ".join(f"{n:,}" for n in (task.n_train, task.n_val, task.n_test))
        numbers = [str(task.n_classes), f"{1 / task.n_classes:.0%}", f"{task.max_length:,}", str(task.vocab_size)]
        rows.append([name, *numbers, splits, f"{task.mask_rate:.0%}", task.pooling, here])
    columns = ["task", "classes", "chance", "longest", "tokens", "train / val / test", "masked", "pooling", "data here"]
    table("Tasks", columns, rows)
    by_folder: dict[str, list[str]] = {}
    for name, path in presets().items():
        by_folder.setdefault("" if path.parent.name == "configs" else path.parent.name, []).append(name)
    print("Presets (`lra run listops lru masked` merges three of them):")
    for folder, names in by_folder.items():
        print(f"  {folder or 'whole runs'}: {', '.join(names)}")


def show_data(config: dict[str, Any], cache_dir: str | None, workers: int | None, force: bool) -> None:
    """Makes or checks a data set and prints its splits and reference lines."""
    from lra.batches import Tokens, describe
    from lra.data import data_folder, load

    task = Cell(task=config).build_task()
    splits = load(task, cache_dir, workers=workers, force=force)
    rows = []
    for name, split in splits.items():
        size = describe(Tokens.from_dataset(split, task.pad_id))
        mean = f"{size['tokens'] / size['rows']:.0f}"
        rows.append([name, f"{size['rows']:,}", f"{size['tokens']:,}", str(size["min"]), mean, str(size["max"])])
    table(f"{task.name}: {data_folder(task, cache_dir)}", ["split", "rows", "tokens", "shortest", "mean", "longest"], rows)
    print("Test accuracy of rules that need no network:")
    for name, accuracy in task.reference_lines(splits).items():
        print(f"  {accuracy:6.1%}  {name}")


def show_params(config: dict[str, Any], model: Model, mixers: list[str]) -> None:
    """Prints parameter counts of the mixers at the given width and at the width that matches the first."""
    from lra.networks import sizes
    from lra.sweep import model_family

    cell = Cell(task=config, model=model)
    task = cell.build_task()
    rows = []
    for plain, fitted in zip(
        model_family(model, cell, mixers, match=False), model_family(model, cell, mixers, match=True), strict=True
    ):
        size, fit = sizes(plain, task), sizes(fitted, task)
        rows.append(
            [
                plain.mixer,
                str(plain.d_model),
                f"{size['total']:,}",
                f"{size['blocks']:,}",
                str(fitted.d_model),
                f"{fit['total']:,}",
            ]
        )
    columns = ["mixer", "width", "parameters", "in blocks", "matched width", "parameters"]
    table(f"{task.name}, {model.n_layers} blocks", columns, rows)


def show_result(result: dict[str, Any], folder: Path) -> None:
    """Prints the numbers of one cell."""
    cost = f"{result['parameters']['total']:,} parameters, {result['steps']:,} steps, {result['tokens']:,} tokens"
    print(f"{result['key']}: {cost}, {result['seconds']:.0f} s on {result['device']}")
    if "pretrain" in result:
        before = result["pretrain"]
        print(f"  after pretraining for {before['steps']:,} steps, {before['seconds']:.0f} s: {before['key']}")
    if "test" not in result:
        print(f"  denoising accuracy on validation {result['val']['accuracy']:.1%} (step {result['best_step']})")
    else:
        print(f"  test accuracy {result['test']['accuracy']:.1%}, validation {result['val']['accuracy']:.1%}")
        for b in result["test"]["by_length"]:
            print(f"    {b['min']} to {b['max']} tokens: {b['accuracy']:.1%} of {b['n']}")
        print("  reference lines: " + ", ".join(f"{k} {v:.1%}" for k, v in result["reference_lines"].items()))
    print(f"  {folder / 'result.json'}")
