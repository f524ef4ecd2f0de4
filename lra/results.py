"""Results of cells in sections that may be compared: what the report shows, without how it looks."""

import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lra.choose import CHOSEN, TRIALS
from lra.files import read_json
from lra.groups import (
    SETTINGS,
    Group,
    best,
    budget_of,
    direction,
    identity,
    mixer_of,
    model_names,
    setting,
    shared_options,
)

# Options with which a task stays the benchmark's, if it has as many rows.
SAME_DATA = ("seed", "encoding", "n_train", "n_val", "n_test", "n_images")
ARENA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "pathx256")


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
    def name(self) -> str:
        return self.task["name"]

    @property
    def lines(self) -> dict[str, float]:
        return self.first["reference_lines"]

    @property
    def title(self) -> str:
        return f"{self.name}, {self.direction}"

    @cached_property
    def changes(self) -> list[str]:
        return task_changes(self.task)

    @cached_property
    def full_size(self) -> bool:
        """Whether the task has the benchmark's data, all of it: published numbers compare with nothing else."""
        from lra.tasks import build_task

        _, data, labels = budget_of(self.main()[0])
        if task_changes(self.task, data_only=True) or data != 1 or labels is not None:
            return False
        made = build_task(self.name)
        wanted = made.benchmark_rows or made.rows or {}
        found = [result["data"] for g in self.main() for result in g.results]
        return all(splits.get(split, {}).get("rows") == n for splits in found for split, n in wanted.items())

    def varying(self) -> dict[str, Any]:
        """Settings in which the groups differ beside model and regime: {column: text of a group's value}."""
        names = dict.fromkeys(name for g in self.groups for name in g.settings)
        columns = {}
        for name in names:
            if name == "model.mixer_kwargs":  # part of the model's name
                continue
            if len({json.dumps(g.settings[name]) for g in self.groups if name in g.settings}) > 1:
                columns[SETTINGS.get(name, name)] = lambda g, name=name: setting(g, name)
        return columns

    def main(self) -> "tuple[Group, ...]":
        """The groups of the section's main budget: the most data, then the steps and labels of most of the cells."""
        most = max(g.data for g in self.groups)
        cells = Counter({budget_of(g): 0 for g in self.groups if g.data == most})
        for g in self.groups:
            if g.data == most:
                cells[budget_of(g)] += len(g.results)
        chosen = max(cells, key=lambda b: (cells[b], b[0]))
        return tuple(g for g in self.groups if budget_of(g) == chosen)

    def compared(self) -> list[Group]:
        """What may lead: of the main budget and share, of each model and regime the settings best on validation."""
        share = self.main_share()
        by_kind: dict[tuple[str, bool], list[Group]] = {}
        for g in self.main():
            if not g.pretrained or g.share == share:
                by_kind.setdefault((g.model, g.pretrained), []).append(g)
        return [found for same in by_kind.values() if (found := best(same))]

    def main_share(self) -> float | None:
        """The share of pretraining that most pretrained cells of the main budget have."""
        shares: Counter[float] = Counter()
        for g in self.main():
            if g.pretrained:
                shares[g.share] += len(g.results)
        return max(shares, key=lambda s: (shares[s], s)) if shares else None


def task_changes(task: dict[str, Any], *, data_only: bool = False) -> list[str]:
    """`max_depth 4 (10)`: the options of a task that are not its defaults, which follow in brackets.

    Args:
        task: name and options, as in a plan.
        data_only: leave out options that make no other task of the data: how they are encoded, pretrained and pooled,
            the seed of the split, and how many rows there are, which the results themselves say.
    """
    from lra.tasks import build_task

    made = build_task(task["name"])
    defaults = json.loads(json.dumps(asdict(made)))
    unread = (*made.not_data, *SAME_DATA) if data_only else ()
    kept = {name: value for name, value in defaults.items() if name not in unread}
    shown = {name: "all" if value is None else value for name, value in kept.items()}
    return [f"{name} {task[name]} ({shown[name]})" for name, value in kept.items() if task.get(name, value) != value]


def load_results(runs_dir: Path) -> list[dict[str, Any]]:
    """Every `result.json` below a folder, sorted by path, less those by which a sweep has chosen its rates.

    Of results with the same key, such as in a copied folder, the first is kept, and it is said that others were not.

    Raises:
        ValueError: no folder, no result, or a file that is damaged or no result of this program; it is named.
    """
    if not runs_dir.is_dir():
        raise ValueError(f"no folder {str(runs_dir)!r}; `lra run` and `lra sweep` write results to runs_dir")
    found: dict[str, dict[str, Any]] = {}
    again: list[Path] = []
    for path in sorted(runs_dir.rglob("result.json")):
        if TRIALS in path.relative_to(runs_dir).parts:
            continue
        result = read_json(path)
        if problem := _problem(result):
            raise ValueError(
                f"{path} is no result this version can read ({problem}); move it away, or delete it and run again"
            )
        if result["key"] in found:
            again.append(path)
        found.setdefault(result["key"], result)
    if again:
        print(f"lra: {len(again)} results left out, whose cells are there already, such as {again[0]}", file=sys.stderr)
    if not any("test" in result for result in found.values()):
        raise ValueError(f"no finished cell below {str(runs_dir)!r}; `lra run` and `lra sweep` write result.json there")
    return list(found.values())


def load_choices(runs_dir: Path) -> list[dict[str, Any]]:
    """Every choice of a learning rate that `chosen.json` below a folder records.

    Raises:
        ValueError: a file that is damaged or none of this program; it is named.
    """
    found = []
    for path in sorted(runs_dir.rglob(CHOSEN)):
        record = read_json(path)
        if not isinstance(record, list) or not all(isinstance(one, dict) and one.keys() >= _CHOICE for one in record):
            raise ValueError(f"{path} is no record of chosen learning rates; move it away")
        found += record
    return found


_CHOICE = {"cell", "seed", "share", "validation", "lr"}


# What the report reads of a result, by where it stands; `test` and `pretrain` only where they are.
_NEEDED = {
    "": "key config plan metric encoding pooling chance parameters val curve data device versions commit best_step "
    "steps tokens flops seconds loader_seconds",
    "config": "model optim budget seed regime",
    "config.model": "mixer d_model n_layers bidirectional mixer_kwargs",
    "config.budget": "steps pretrain_share data labels",
    "plan": "task",
    "plan.task": "name",
    "data": "train",
    "test": "accuracy groups",
    "pretrain": "metric val curve steps tokens flops seconds loader_seconds",
}


def _problem(result: Any) -> str | None:
    """What a result lacks, or None."""
    from lra.tasks import TASKS

    for where, names in _NEEDED.items():
        if where in ("test", "pretrain") and where not in result:
            continue
        inner = result
        for name in where.split(".") if where else ():
            inner = inner[name]
        if not isinstance(inner, dict):
            return f"{where or 'it'} is no mapping"
        for name in names.split():
            if name not in inner:
                return f"no {(where + '.' if where else '') + name!r}"
    if "test" in result and not ("reference_lines" in result and "test" in result["data"]):
        return "no 'reference_lines' or no 'data.test'"
    if (task := result["plan"]["task"]["name"]) not in TASKS:
        return f"unknown task {task!r}"
    return None


def sections(results: list[dict[str, Any]]) -> list[Section]:
    """Groups the classification results: by task and direction, then by everything else but the seed."""
    results = [result for result in results if "test" in result]
    names = model_names(results)
    grouped: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for result in results:
        outer = json.dumps([shared_options(result), direction(result)[0]], sort_keys=True)
        grouped.setdefault(outer, {}).setdefault(identity(result), []).append(result)
    made = []
    for inner in grouped.values():
        groups = [
            Group(sorted(seeds, key=lambda r: r["config"]["seed"]), names[mixer_of(seeds[0])])
            for seeds in inner.values()
        ]
        groups.sort(key=lambda g: (g.model != "lru", g.model, g.pretrained, g.share, g.data, g.size))
        first = groups[0].first
        made.append(Section(task_of(groups), direction(first)[0], groups))
    return sorted(made, key=lambda s: (_place(s.name), bool(s.changes), json.dumps(s.task), s.direction))


def task_of(groups: list[Group]) -> dict[str, Any]:
    """Name and options of a section's task; of those that only pretraining reads, what all pretrained groups share."""
    plans = [g.first["plan"]["task"] for g in groups if g.pretrained]
    told = {name: {json.dumps(plan.get(name)) for plan in plans} for plan in plans for name in plan}
    return {**shared_options(groups[0].first), **{k: v for p in plans[:1] for k, v in p.items() if len(told[k]) == 1}}


def _place(task: str) -> int:
    """Where a task stands in a report: the Long Range Arena in its own order, then the others in theirs."""
    from lra.tasks import TASKS

    arena = [name for name in ARENA if name in TASKS]
    return [*arena, *(name for name in TASKS if name not in arena)].index(task)


def highest_line(accuracy: float, lines: dict[str, float]) -> str:
    """The best reference line that an accuracy reaches, or `none`."""
    below = {name: value for name, value in lines.items() if value <= accuracy}
    return max(below, key=lambda name: below[name]) if below else "none"


def standard_error(accuracy: float, n: int) -> float:
    """Binomial standard error of an accuracy over n independent sequences."""
    return (accuracy * (1 - accuracy) / n) ** 0.5
