"""Cells that differ in their seed alone, and what tells such groups apart."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lra.tasks import TASKS

# Columns for settings that may differ between the groups of a section; other settings go by their dotted names.
SETTINGS = {
    "optim.lr": "lr",
    "optim.pretrain_lr": "pretraining lr",
    "optim.batch_size": "batch",
    "budget.steps": "steps in all",
    "budget.pretrain_share": "share",
    "budget.data": "data",
    "budget.labels": "labels",
    "model.dropout": "dropout",
    "compute.precision": "precision",
    "task.mask_rate": "mask rate",
    "task.pretrain_loss": "pretraining loss",
    "protocol": "protocol",
    "data.fingerprint": "values of the data",
}
UNCHANGED = {"shuffled": "in order", "windows": "whole"}  # of each probe, the rows before anything is done to them
_PRETRAINING = ("optim.pretrain_lr", "budget.pretrain_share")  # settings that a run from scratch does not read


@dataclass(frozen=True)
class Group:
    """The cells that differ in nothing but their seed."""

    results: list[dict[str, Any]]
    model: str
    """Name of the mixer, with its keyword arguments where the results hold it with several."""

    @property
    def first(self) -> dict[str, Any]:
        return self.results[0]

    @property
    def config(self) -> dict[str, Any]:
        return self.first["config"]

    @property
    def pretrained(self) -> bool:
        return "pretrain" in self.first

    @property
    def regime(self) -> str:
        """`scratch`, or what came before fine-tuning: `masked + finetune`."""
        return f"{direction(self.first)[1]} + finetune" if self.pretrained else "scratch"

    @property
    def share(self) -> float:
        """Share of the steps spent on pretraining; 0 from scratch."""
        return self.config["budget"]["pretrain_share"] if self.pretrained else 0.0

    @property
    def data(self) -> float:
        """Share of the training rows in use."""
        return self.config["budget"]["data"]

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
    def validation(self) -> float:
        """Mean accuracy on the validation split, by which settings are chosen."""
        return statistics.fmean(result["val"][result["metric"]] for result in self.results)

    @property
    def size(self) -> str:
        model = self.config["model"]
        return f"{model['d_model']} x {model['n_layers']}"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings by their dotted names, without task, seed, mixer, width and what this group does not read."""
        return settings_of(self.first)

    def cost(self, name: str) -> tuple[float, float]:
        """Mean (pretraining, training on labels) of steps, tokens, flops, seconds or loader_seconds."""
        before = statistics.fmean(result.get("pretrain", {}).get(name, 0) for result in self.results)
        return before, statistics.fmean(result[name] for result in self.results)

    @property
    def loader_share(self) -> float:
        """Share of the seconds spent on making batches."""
        seconds = sum(self.cost("seconds"))
        return sum(self.cost("loader_seconds")) / seconds if seconds else 0.0

    def accuracy_by(self, name: str) -> list[tuple[str, float]]:
        """(range, mean accuracy) of the test rows grouped by `length` or by a stratum of the task."""
        buckets: dict[str, list[float]] = {}
        for result in self.results:
            for b in result["test"]["groups"].get(name, []):
                text = f"{b['min']:,}" if b["min"] == b["max"] else f"{b['min']:,} to {b['max']:,}"
                buckets.setdefault(text, []).append(b["accuracy"])
        return [(text, statistics.fmean(values)) for text, values in buckets.items()]

    def probed(self, probe: str) -> dict[int, float]:
        """{size: mean accuracy on test inputs `shuffled` in blocks, or cut into `windows`, of this many positions}."""
        tests = [result["test"].get(probe, {}) for result in self.results]
        sizes = sorted({int(name) for test in tests for name in test if name not in UNCHANGED.values()})
        found = {size: [test.get(str(size)) for test in tests] for size in sizes}
        return {size: statistics.fmean(v for v in values if v is not None) for size, values in found.items()}

    def unprobed(self, probe: str) -> float:
        """Mean accuracy on the rows that `probed` is about as they are; on all rows where a result has no such."""
        tests = [result["test"] for result in self.results]
        return statistics.fmean(test.get(probe, {}).get(UNCHANGED[probe], test["accuracy"]) for test in tests)

    def denoised(self, name: str) -> float | None:
        """Mean of a validation number of the pretraining: loss, accuracy, r2 or ink_accuracy; None if it has none."""
        values = [r["pretrain"]["val"][name] for r in self.results if name in r.get("pretrain", {}).get("val", {})]
        return statistics.fmean(values) if values else None


def budget_of(group: Group) -> tuple[int, float, int | None]:
    """(steps, share of the data, labels): what groups must share to be compared at equal budget."""
    budget = group.config["budget"]
    return budget["steps"], budget["data"], budget.get("labels")


def best(groups: Iterable[Group]) -> Group | None:
    """The group with the most seeds, and of those the best on validation; None of none."""
    return max(groups, key=lambda g: (len(g.results), g.validation), default=None)


def direction(result: dict[str, Any]) -> tuple[str, str]:
    """(direction of the model, its denoising objective)."""
    return ("bidirectional", "masked") if result["config"]["model"]["bidirectional"] else ("causal", "causal")


def shared_options(result: dict[str, Any]) -> dict[str, Any]:
    """Name and options of the task, without those that only pretraining reads."""
    task = result["plan"]["task"]
    return {name: value for name, value in task.items() if name not in TASKS[task["name"]].pretraining_only}


def settings_of(result: dict[str, Any]) -> dict[str, Any]:
    """{dotted name: value} of what a group of results shares beside task, mixer and width."""
    config, task = result["config"], result["plan"]["task"]
    model = {k: v for k, v in config["model"].items() if k not in ("mixer", "d_model", "bidirectional", "per_mixer")}
    # Of the arguments that a task names by mixer, a group reads those of its own.
    model["mixer_kwargs"] = _kwargs(result)
    parts = {"model": model, "optim": config["optim"], "budget": config["budget"], "compute": config.get("compute", {})}
    parts["task"] = {
        name: task[name] for name in TASKS[task["name"]].pretraining_only if name in task and "pretrain" in result
    }
    flat = {f"{outer}.{name}": value for outer, part in parts.items() for name, value in part.items()}
    # Other versions of this program and other values of the data make other numbers.
    flat |= {"protocol": result["plan"].get("protocol"), "data.fingerprint": result["data"].get("fingerprint")}
    unread = ("budget.checkpoint_every", *(() if "pretrain" in result else _PRETRAINING))
    return {name: value for name, value in flat.items() if name not in unread}


def _kwargs(result: dict[str, Any]) -> dict[str, Any]:
    model = result["config"]["model"]
    return {**model.get("per_mixer", {}).get(model["mixer"], {}), **model["mixer_kwargs"]}


def identity(result: dict[str, Any]) -> str:
    """What two results share when they differ in their seed alone."""
    model = result["config"]["model"]
    return json.dumps([model["mixer"], model["d_model"], settings_of(result), "pretrain" in result], sort_keys=True)


def mixer_of(result: dict[str, Any]) -> tuple[str, str]:
    model = result["config"]["model"]
    return model["mixer"], json.dumps(model["mixer_kwargs"], sort_keys=True)


def model_names(results: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """{(mixer, its keyword arguments): name}: the arguments are named where they tell two models apart."""
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for result in results:
        mixer, arguments = mixer_of(result)
        kinds.setdefault(mixer, {})[arguments] = result["config"]["model"]["mixer_kwargs"]
    names = {}
    for mixer, variants in kinds.items():
        keys = dict.fromkeys(key for kwargs in variants.values() for key in kwargs)
        telling = [k for k in keys if len({json.dumps(v.get(k)) for v in variants.values()}) > 1]
        for arguments, kwargs in variants.items():
            extra = ", ".join(f"{k} {kwargs[k]}" for k in telling if k in kwargs)
            names[mixer, arguments] = f"{mixer} ({extra})" if extra else mixer
    return names


def setting(group: Group, name: str) -> str:
    """A setting of a group as text, empty where the group does not read it."""
    if name not in group.settings:
        return ""
    value = group.settings[name]
    if name == "budget.labels":
        return f"{group.first['data']['train']['rows']:,}"
    if name in ("budget.data", "budget.pretrain_share"):
        return f"{100 * value:g} %"
    if isinstance(value, float):
        return f"{value:g}"
    if name == "data.fingerprint":
        return str(value)[:8]
    return f"{value:,}" if type(value) is int else str(value)  # True and False are ints of their own
