"""Results of cells, grouped over seeds: what the report shows, without how it looks."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lra.files import read_json


@dataclass(frozen=True)
class Group:
    """The cells that differ in nothing but their seed."""

    results: list[dict[str, Any]]

    @property
    def first(self) -> dict[str, Any]:
        return self.results[0]

    @property
    def config(self) -> dict[str, Any]:
        return self.first["config"]

    @property
    def model(self) -> str:
        return self.config["model"]["mixer"]

    @property
    def regime(self) -> str:
        """`scratch`, or what came before fine-tuning: `masked + finetune`."""
        pretrained = "pretrain" in self.first
        return f"{direction(self.first)[1]} + finetune" if pretrained else "scratch"

    @property
    def accuracies(self) -> list[float]:
        return [result["test"]["accuracy"] for result in self.results]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds, None of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def size(self) -> str:
        model = self.config["model"]
        return f"{model['d_model']} x {model['n_layers']}"

    def cost(self, name: str) -> tuple[float, float]:
        """Mean (pretraining, training on labels) of steps, tokens, flops or seconds."""
        before = statistics.fmean(result.get("pretrain", {}).get(name, 0) for result in self.results)
        return before, statistics.fmean(result[name] for result in self.results)

    def by_length(self) -> list[tuple[str, float]]:
        """(length range, mean accuracy) of the buckets of the test split."""
        buckets = zip(*(result["test"]["by_length"] for result in self.results), strict=True)
        return [
            (f"{seeds[0]['min']} to {seeds[0]['max']}", statistics.fmean(b["accuracy"] for b in seeds))
            for seeds in buckets
        ]


@dataclass(frozen=True)
class Section:
    """The groups that may be compared: same task, same direction."""

    task: dict[str, Any]
    direction: str
    groups: list[Group]

    @property
    def first(self) -> dict[str, Any]:
        return self.groups[0].first

    @property
    def lines(self) -> dict[str, float]:
        return self.first["reference_lines"]

    @property
    def title(self) -> str:
        """Task, direction, and the options in which the task differs from its defaults."""
        return f"{self.task['name']}, {self.direction}"

    @property
    def changes(self) -> list[str]:
        return task_changes(self.task)

    def varying(self) -> dict[str, Any]:
        """Settings in which the groups differ beside model and regime: {column: value of a group}."""
        columns = {
            "lr": lambda g: f"{g.config['optim']['lr']:g}",
            "batch": lambda g: str(g.config["optim"]["batch_size"]),
            "labels": lambda g: f"{g.first['data']['train']['rows']:,}",
            "dropout": lambda g: f"{g.config['model']['dropout']:g}",
        }
        return {name: get for name, get in columns.items() if len({get(g) for g in self.groups}) > 1}


def task_changes(task: dict[str, Any]) -> list[str]:
    """`max_depth 4 (10)`: the options of a task that are not its defaults, which follow in brackets."""
    from lra.tasks import build_task

    defaults = asdict(build_task(task["name"]))
    return [f"{name} {task[name]} ({value})" for name, value in defaults.items() if task[name] != value]


def direction(result: dict[str, Any]) -> tuple[str, str]:
    """(direction of the model, its denoising objective)."""
    return ("bidirectional", "masked") if result["config"]["model"]["bidirectional"] else ("causal", "causal")


def load_results(runs_dir: Path) -> list[dict[str, Any]]:
    """Every `result.json` below a folder, sorted by path.

    Raises:
        ValueError: no folder, no result, or a damaged file.
    """
    if not runs_dir.is_dir():
        raise ValueError(f"no folder {str(runs_dir)!r}; `lra run` and `lra sweep` write results to runs_dir")
    found = [read_json(path) for path in sorted(runs_dir.rglob("result.json"))]
    if not any("test" in result for result in found):
        raise ValueError(f"no finished cell below {str(runs_dir)!r}; `lra run` and `lra sweep` write result.json there")
    return found


def sections(results: list[dict[str, Any]]) -> list[Section]:
    """Groups the classification results: by task and direction, then by everything else but the seed."""
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        if "test" in result:
            outer = json.dumps([result["plan"]["task"], direction(result)[0]], sort_keys=True)
            grouped.setdefault(outer, {}).setdefault(_identity(result), []).append(result)
    made = []
    for inner in grouped.values():
        groups = [Group(sorted(seeds, key=lambda r: r["config"]["seed"])) for seeds in inner.values()]
        groups.sort(key=lambda g: (g.model != "lru", g.model, "pretrain" in g.first, g.size))
        first = groups[0].first
        made.append(Section(first["plan"]["task"], direction(first)[0], groups))
    return sorted(made, key=lambda s: s.title)


def _identity(result: dict[str, Any]) -> str:
    """What two results share when they differ in their seed alone."""
    config = result["config"]
    optim, budget = dict(config["optim"]), dict(config["budget"])
    del budget["checkpoint_every"]
    if "pretrain" not in result:  # settings that a run from scratch does not read
        del optim["pretrain_lr"], budget["pretrain_share"]
    return json.dumps([config["model"], optim, budget, "pretrain" in result], sort_keys=True)


def highest_line(accuracy: float, lines: dict[str, float]) -> str:
    """The best reference line that an accuracy reaches, or `none`."""
    below = {name: value for name, value in lines.items() if value <= accuracy}
    return max(below, key=lambda name: below[name]) if below else "none"


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of an accuracy over n independent sequences."""
    return (accuracy * (1 - accuracy) / n) ** 0.5
