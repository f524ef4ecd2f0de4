"""`lra quick`: LRU and Transformer, from scratch and pretrained, on a reduced ListOps; minutes on two CPU cores."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from lra.config import Cell, Regime, cell_from_dict
from lra.results import highest_line, standard_error, task_changes

PRESET = "listops_quick"
NAMES = {"lru": "LRU", "attention": "Transformer"}
REGIMES: dict[Regime, str] = {"scratch": "scratch", "finetune": "pretrained"}


def quick_cells(steps: int | None, seed: int) -> dict[tuple[str, Regime], Cell]:
    """The four cells by (mixer, regime); the Transformer's width is the one that matches the LRU's parameters."""
    from lra.presets import read
    from lra.sweep import model_family

    base = replace(cell_from_dict(read([PRESET])), seed=seed)
    if steps is not None:
        if steps < 2:
            raise ValueError(f"steps must be at least 2; got {steps}")
        base = replace(base, budget=replace(base.budget, steps=steps))
    models = model_family(base.model, base, list(NAMES), match=True)
    return {(m.mixer, regime): replace(base, model=m, regime=regime) for m in models for regime in REGIMES}


def run_quick(out: Path, *, steps: int | None = None, seed: int = 0, cache_dir: str | None = None) -> dict[Any, Any]:
    """Runs the four cells in `out`, prints the table and a reading of it, writes the report; returns the results.

    Run again, it returns at once what is done and resumes what is not.
    """
    from lra.cell import run_cell
    from lra.listing import table
    from lra.report import write_report

    began = time.monotonic()
    cells = quick_cells(steps, seed)
    print("\n".join(introduction(cells)), flush=True)
    results: dict[Any, dict[str, Any]] = {}
    for i, (name, cell) in enumerate(cells.items()):
        print(f"[{i + 1}/{len(cells)}] {NAMES[cell.model.mixer]}, {REGIMES[cell.regime]}", flush=True)
        results[name] = run_cell(cell, out, cache_dir=cache_dir, accelerator="cpu")

    written = write_report(list(results.values()), out)
    rows = [
        [NAMES[mixer], *(f"{100 * results[mixer, regime]['test']['accuracy']:.1f} %" for regime in REGIMES)]
        for mixer in NAMES
    ]
    table("Test accuracy", ["", *REGIMES.values()], rows)
    print("\n".join(ladder(results)))
    print(f"\n{reading(results)}")
    print(f"\n{time.monotonic() - began:.0f} s in all; " + ", ".join(str(path) for path in written))
    return results


def introduction(cells: dict[tuple[str, Regime], Cell]) -> list[str]:
    """What is compared, and how it differs from the benchmark."""
    from lra.networks import sizes

    cell = next(iter(cells.values()))
    task, plan = cell.build_task(), cell.plan()
    models = {cell.model.mixer: cell.model for cell in cells.values()}
    counts = " and ".join(f"{NAMES[m]} {sizes(model, task)['total']:,}" for m, model in models.items())
    labels = f"{min(cell.budget.labels or task.n_train, task.n_train):,}"
    return [
        f"Reduced {task.name}: the grammar of the Long Range Arena, changed from its defaults (in brackets):",
        f"  {', '.join(task_changes(plan['task']))}",
        f"Parameters: {counts}. Every cell takes {cell.budget.steps:,} steps of {cell.optim.batch_size} sequences;",
        f"  pretrained: the first {cell.budget.pretrain_steps:,} of them recover hidden tokens "
        f"of the {task.n_train:,} training inputs, the rest learn from {labels} labels.",
    ]


def ladder(results: dict[Any, dict[str, Any]]) -> list[str]:
    """Models and rules in one list, best first."""
    lines = next(iter(results.values()))["reference_lines"]
    steps = [(value, f"        {name}") for name, value in lines.items()]
    steps += [(r["test"]["accuracy"], f"  ----  {NAMES[m]}, {REGIMES[regime]}") for (m, regime), r in results.items()]
    return ["Rules that need no network, and the four cells (----):"] + [
        f"  {100 * value:5.1f} %{name}" for value, name in sorted(steps, key=lambda s: -s[0])
    ]


def reading(results: dict[Any, dict[str, Any]]) -> str:
    """What the numbers say, and what they do not: computed from them."""
    first = next(iter(results.values()))
    n, lines = first["data"]["test"]["rows"], first["reference_lines"]
    accuracy = {name: result["test"]["accuracy"] for name, result in results.items()}
    best = max(accuracy, key=lambda name: accuracy[name])
    parts = [
        f"Best here is {NAMES[best[0]]}, {REGIMES[best[1]]}, with {100 * accuracy[best]:.1f} %; "
        f"the best rule it reaches is: {highest_line(accuracy[best], lines)}."
    ]
    for mixer in dict.fromkeys(m for m, _ in accuracy):
        before, after = accuracy[mixer, "scratch"], accuracy[mixer, "finetune"]
        parts.append(f"Pretraining {change(before, after, n)} the {NAMES[mixer]}.")
    if "root operator" in lines and accuracy[best] - lines["root operator"] <= 2 * standard_error(accuracy[best], n):
        parts.append("No cell is clearly above reading the root operator alone: nothing was learnt about the digits.")
    parts.append(f"One seed, {n:,} test sequences: this is an example, not a measurement of the models.")
    return " ".join(parts)


def change(before: float, after: float, n: int) -> str:
    """`adds 5.2 points to`, or that the difference is within two standard errors of it."""
    points, noise = (
        100 * (after - before),
        200 * (standard_error(before, n) ** 2 + standard_error(after, n) ** 2) ** 0.5,
    )
    if abs(points) <= noise:
        return f"makes no clear difference ({points:+.1f} points, noise {noise:.1f}) to"
    return (
        f"adds {points:.1f} points (noise {noise:.1f}) to"
        if points > 0
        else (f"costs {-points:.1f} points (noise {noise:.1f}) to")
    )
