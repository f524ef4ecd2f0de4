"""What a run is: frozen dataclasses without torch, and the content key that names a run's folder.

A *cell* is (task, model, optim, budget, regime, objective, seed). Its `plan` is everything that changes its numbers,
with the defaults filled in; the hash of the plan is in its `key`, so two cells share a folder exactly when they would
compute the same thing.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil
from typing import Any, Literal

from lra.checks import check, check_types

Regime = Literal["scratch", "pretrain", "finetune"]
Objective = Literal["auto", "masked", "causal"]

# Part of every plan: raised when the code changes what the same configuration computes.
PROTOCOL = 3


@dataclass(frozen=True)
class Model:
    """The network: an embedding, `n_layers` blocks of (mixer, gated feed-forward), pooling, a linear head."""

    mixer: str = "lru"
    """Sequence mixer of every block: a name of `linrnn.layers.available()`, such as lru or attention."""
    d_model: int = 64
    """Width of the residual stream."""
    n_layers: int = 2
    """Number of blocks."""
    bidirectional: bool = True
    """Whether a position sees both sides (masked denoising) or only its past (causal denoising)."""
    ffn_expand: float = 2.0
    """Width of the feed-forward layer over d_model."""
    norm: Literal["rms", "layer"] = "rms"
    """Normalisation of the blocks."""
    prenorm: bool = True
    """Normalise before each mixer and feed-forward layer (else after the residual sum)."""
    dropout: float = 0.0
    """Dropout probability in the blocks."""
    pooling: Literal["auto", "mean", "last", "max", "cls"] = "auto"
    """How the sequence becomes one vector; auto: the task's (ListOps: `last` when not bidirectional)."""
    mixer_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the mixer, such as {r_min: 0.5} for lru or {n_heads: 4} for attention."""
    per_mixer: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The same for several mixers by name, such as {lru: {r_min: 0.5}}; mixer_kwargs come on top."""

    def __post_init__(self) -> None:
        check_types(self, "model.")
        check(self.d_model >= 1, "model.d_model", self.d_model, "at least 1")
        check(self.n_layers >= 1, "model.n_layers", self.n_layers, "at least 1")
        check(self.ffn_expand > 0, "model.ffn_expand", self.ffn_expand, "positive")
        check(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        for name, kwargs in self.per_mixer.items():
            check(isinstance(kwargs, dict), f"model.per_mixer.{name}", kwargs, "a mapping of keyword arguments")

    @property
    def name(self) -> str:
        """The mixer, and what was asked of it: `lru`, `conv-conv_width=5`; fit for the name of a folder."""
        name = "-".join([self.mixer, *(f"{key}={value}" for key, value in sorted(self.mixer_kwargs.items()))])
        return re.sub(r"[^\w=.-]+", "_", name, flags=re.ASCII)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the mixer, resolved."""
        return {**self.per_mixer.get(self.mixer, {}), **self.mixer_kwargs}


def pooling(model: Model, task: Any) -> str:
    """How `model` pools on `task`, with `auto` resolved.

    Raises:
        ValueError: a pooling that does not fit the task's labels.
    """
    if task.dense or model.pooling == "auto":
        if model.pooling not in ("auto", task.pooling):
            raise ValueError(
                f"model.pooling must be auto for task {task.name!r}, which labels positions; got {model.pooling!r}"
            )
        return task.pooling if model.bidirectional else task.causal_pooling or task.pooling
    return model.pooling


@dataclass(frozen=True)
class Optim:
    """AdamW with a linear warm-up; recurrent parameters get the learning-rate scale their layer asks for."""

    lr: float = 1e-3
    """Peak learning rate of classification (scratch and finetune)."""
    pretrain_lr: float | None = None
    """Peak learning rate of pretraining; null: the same as lr."""
    batch_size: int = 32
    """Sequences per step, the same in every regime, so that equal steps are equal budgets."""
    weight_decay: float = 0.05
    """Decoupled weight decay, not applied to norms, biases, embeddings and recurrent parameters."""
    warmup: float = 0.1
    """Share of the run's steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warm-up: stay, or fall to 0 along half a cosine."""
    clip: float | None = None
    """Largest norm of the gradient; null: no clipping."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        check(self.lr > 0, "optim.lr", self.lr, "positive")
        check(self.pretrain_lr is None or self.pretrain_lr > 0, "optim.pretrain_lr", self.pretrain_lr, "positive")
        check(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        check(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        check(0 <= self.warmup <= 1, "optim.warmup", self.warmup, "in [0, 1]")
        check(self.clip is None or self.clip > 0, "optim.clip", self.clip, "positive or null")


@dataclass(frozen=True)
class Budget:
    """What a cell may spend. Scratch spends all of it on labels; finetune splits the same total."""

    steps: int = 10_000
    """Optimiser steps in all: pretraining + fine-tuning, or training from scratch."""
    pretrain_share: float = 0.4
    """Share of the steps that finetune spends on pretraining."""
    data: float = 1.0
    """Share of the training rows that pretraining and training on labels may see (the first ones: nested subsets)."""
    labels: int | None = None
    """Labelled training examples the classifier may see (the first n); pretraining sees all those of `data`."""
    evaluations: int = 20
    """How often a run scores the validation split; the best score chooses the weights that are kept."""
    checkpoint_every: int = 500
    """Steps between the checkpoints a killed run resumes from."""

    def __post_init__(self) -> None:
        check_types(self, "budget.")
        check(self.steps >= 2, "budget.steps", self.steps, "at least 2")
        check(0 < self.pretrain_share < 1, "budget.pretrain_share", self.pretrain_share, "strictly between 0 and 1")
        check(0 < self.data <= 1, "budget.data", self.data, "in (0, 1]")
        check(self.labels is None or self.labels >= 1, "budget.labels", self.labels, "at least 1, or null for all")
        check(self.evaluations >= 1, "budget.evaluations", self.evaluations, "at least 1")
        check(self.checkpoint_every >= 1, "budget.checkpoint_every", self.checkpoint_every, "at least 1")

    @property
    def pretrain_steps(self) -> int:
        return min(max(round(self.steps * self.pretrain_share), 1), self.steps - 1)


@dataclass(frozen=True)
class Compute:
    """How the numbers are computed; both change their last digits, and so the cell."""

    precision: Literal["32", "bf16"] = "32"
    """32: float32 throughout; bf16: matrix products in bfloat16 by autocast, weights and states in float32."""
    compile: bool = False
    """Run the network through torch.compile."""

    def __post_init__(self) -> None:
        check_types(self, "compute.")


@dataclass(frozen=True)
class Cell:
    """One entry of the comparison; `lra.cell.run_cell` computes it."""

    task: dict[str, Any] = field(default_factory=lambda: {"name": "listops"})
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    budget: Budget = field(default_factory=Budget)
    regime: Regime = "scratch"
    objective: Objective = "auto"
    seed: int = 0
    compute: Compute = field(default_factory=Compute)

    def __post_init__(self) -> None:
        named = isinstance(self.task, dict) and "name" in self.task
        check(named, "task", self.task, "a mapping with the key `name` (`lra tasks` lists the names)")
        check_types(self)
        check(self.seed >= 0, "seed", self.seed, "at least 0")
        allowed = "masked" if self.model.bidirectional else "causal"
        if self.objective not in ("auto", allowed):
            raise ValueError(
                f"objective {self.objective!r} does not fit model.bidirectional={self.model.bidirectional}: "
                f"masked denoising is for bidirectional models, causal for the others; "
                f"set objective to {allowed!r} or model.bidirectional to {not self.model.bidirectional}"
            )

    @property
    def denoising(self) -> Literal["masked", "causal"]:
        """The pretraining objective, resolved: the model's direction decides it."""
        return "masked" if self.model.bidirectional else "causal"

    @property
    def steps(self) -> int:
        """Steps of this run alone: scratch spends the whole budget, the other two split it."""
        pretrain = self.budget.pretrain_steps
        both = {"pretrain": pretrain, "finetune": self.budget.steps - pretrain}
        return both.get(self.regime, self.budget.steps)

    @property
    def lr(self) -> float:
        if self.regime == "pretrain" and self.optim.pretrain_lr is not None:
            return self.optim.pretrain_lr
        return self.optim.lr

    @property
    def eval_every(self) -> int:
        return ceil(self.steps / self.budget.evaluations)

    def pretraining(self) -> "Cell":
        """The cell whose weights a finetune cell starts from."""
        return replace(self, regime="pretrain")

    def build_task(self) -> Any:
        """The task, with its options checked.

        Raises:
            ValueError: unknown task or option, or a bad value, with what is allowed.
        """
        from lra.tasks import build_task

        try:
            return build_task(**self.task)
        except TypeError as error:
            raise ValueError(f"task: {error}") from error

    def plan(self) -> dict[str, Any]:
        """Everything that changes the numbers of this run, defaults filled in, as plain JSON types.

        A pretrain cell's plan holds neither the fine-tuning rate nor the number of labels, so fine-tuning grids share
        one pretraining; nor a scratch cell's what only pretraining reads, so grids of that share one scratch cell.
        `checkpoint_every` is absent since a resumed run equals an uninterrupted one.

        Raises:
            ValueError: unknown task or task key, with the allowed ones, or a pooling that does not fit the task.
        """
        task = self.build_task()
        options = asdict(task)
        if self.regime == "scratch":
            options = {name: value for name, value in options.items() if name not in task.pretraining_only}
        model = {**asdict(self.model), "mixer_kwargs": self.model.kwargs, "pooling": pooling(self.model, task)}
        del model["per_mixer"]
        plan: dict[str, Any] = {
            "protocol": PROTOCOL,
            "task": {"name": task.name, "version": task.version, **options},
            "model": model,
            "optim": {k: getattr(self.optim, k) for k in ("batch_size", "weight_decay", "warmup", "schedule", "clip")},
            "lr": self.lr,
            "steps": self.steps,
            "evaluations": self.budget.evaluations,
            "data": self.budget.data,
            "compute": asdict(self.compute),
            "regime": self.regime,
            "seed": self.seed,
        }
        if self.regime == "pretrain":
            plan["objective"] = self.denoising
        else:
            plan["labels"] = self.budget.labels
        if self.regime == "finetune":
            plan["pretrain"] = self.pretraining().key
        return json.loads(json.dumps(plan))

    @property
    def label(self) -> str:
        """Readable name of the run: `lru-scratch`, `lru-masked-finetune`, `lru-causal-scratch`."""
        middle = "" if self.regime == "scratch" and self.model.bidirectional else f"-{self.denoising}"
        return f"{self.model.name}{middle}-{self.regime}"

    @property
    def key(self) -> str:
        """The folder of the run below `runs_dir`: readable, with the first 8 digits of the plan's SHA-256."""
        canonical = json.dumps(self.plan(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
        return f"{self.task['name']}/{self.label}/seed{self.seed}-{digest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, the form of `config.yaml`; `lra run --config` reads it back."""
        return asdict(self)


def cell_from_dict(config: dict[str, Any]) -> Cell:
    """Builds a cell from nested dictionaries, as read from YAML.

    Raises:
        ValueError: an unknown key, with the allowed ones, or a bad value.
    """
    sections = {"model": Model, "optim": Optim, "budget": Budget, "compute": Compute}
    _refuse_unknown("", config, Cell)
    for name, section in sections.items():
        _refuse_unknown(f"{name}.", config.get(name, {}), section)
    built = {name: section(**config.get(name, {})) for name, section in sections.items()}
    return Cell(**{**config, **built})


def _refuse_unknown(prefix: str, given: dict[str, Any], section: type) -> None:
    check(isinstance(given, dict), prefix.rstrip(".") or "the configuration", given, "a mapping of keys")
    allowed = [f.name for f in fields(section)]
    for key in given:
        if key not in allowed:
            raise ValueError(f"unknown key {prefix + key!r}; allowed: {', '.join(prefix + a for a in allowed)}")
