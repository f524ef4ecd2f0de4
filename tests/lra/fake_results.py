"""Results written by hand, as `run_cell` writes them, with chosen accuracies."""

import copy
import json
from pathlib import Path
from typing import Any

from lra.config import Cell

LINES = {"majority": 0.17, "root operator": 0.37, "exact to depth 1": 0.57, "exact to depth 2": 0.73}
COST = {"steps": 10, "tokens": 1000, "flops": 1e12, "seconds": 5.0, "loader_seconds": 0.1}
BEFORE = {"steps": 40, "tokens": 4000, "flops": 4e12, "seconds": 20.0, "loader_seconds": 0.4, "best_step": 5}
CURVE = [{"step": 5, "train_loss": 2.0, "train_accuracy": 0.1, "val_loss": 2.0, "val_accuracy": 0.2}]
R2_CURVE = [{"step": 5, "train_loss": 2.0, "train_r2": 0.1, "val_loss": 2.0, "val_r2": 0.4}]


def result(cell: Cell, accuracy: float, metric: str = "accuracy") -> dict[str, Any]:
    """The result of a cell with a test accuracy; `metric` is that of its pretraining.

    A task of the benchmark has the benchmark's rows where it is left as it is.
    """
    task = cell.build_task()
    rows = {"train": 60, "test": 2000} if "n_train" in cell.task else (task.benchmark_rows or task.rows)
    made = {
        "key": cell.key,
        "config": cell.to_dict(),
        "plan": cell.plan(),
        "encoding": "tokens",
        "pooling": "mean",
        "chance": 0.1,
        "metric": "accuracy",
        "parameters": {"total": 1234, "blocks": 1000},
        **COST,
        "best_step": 5,
        "val": {"loss": 1.0, "accuracy": accuracy - 0.01},
        "data": {split: {"rows": n} for split, n in rows.items()},
        "device": "cpu",
        "versions": {"torch": "2"},
        "commit": None,
        "curve": CURVE,
        "test": {
            "accuracy": accuracy,
            "groups": {
                "length": [
                    {"min": 4, "max": 9, "n": 1000, "accuracy": accuracy + 0.1},
                    {"min": 10, "max": 23, "n": 1000, "accuracy": accuracy - 0.1},
                ],
                "depth": [{"min": d, "max": d, "n": 1000, "accuracy": accuracy / d} for d in (1, 2)],
            },
            "shuffled": {"1": 0.11, "16": accuracy / 2},
        },
        "reference_lines": LINES,
    }
    if cell.budget.labels:
        made["data"]["train"]["rows"] = cell.budget.labels
    if cell.regime == "finetune":
        curve = CURVE if metric == "accuracy" else R2_CURVE
        made["pretrain"] = {
            "key": cell.pretraining().key,
            "metric": metric,
            **BEFORE,
            "curve": curve,
            "val": {"loss": 1.5, metric: 0.5},
        }
    return copy.deepcopy(made)


def write(results: list[dict[str, Any]], runs: Path) -> Path:
    """Writes each result to its folder below `runs`."""
    for made in results:
        path = runs / made["key"] / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(made))
    return runs
