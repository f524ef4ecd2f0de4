"""Published accuracies on the full-size tasks, which stand beside ours and are marked as published."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lra.tables import Entry

READ = {
    "paper": "read in the paper",
    "code": "read in the authors' repository",
    "quoted": "quoted in another publication's table",
    "secondary": "secondary: second hand, not checked against the paper's table",
}
OTHER = "other"
DIRECTIONS = ("bidirectional", "causal")


@dataclass(frozen=True)
class Published:
    """One published model: its accuracies by task, where they come from, and how far to trust them."""

    name: str
    pretraining: str | None
    """masked or causal, on the task's own inputs; other, on other data; None for a model trained from scratch."""
    direction: str | None
    """bidirectional or causal; None where the source does not state it."""
    source: str
    read: str
    accuracy: dict[str, tuple[float, float | None] | None]
    """{task: (mean in [0, 1], standard deviation or None)}; None for a run that failed."""

    @property
    def regime(self) -> str:
        if self.pretraining == OTHER:
            return "published, pretrained on other data"
        return "published, " + (f"{self.pretraining} pretraining" if self.pretraining else "scratch")

    @property
    def note(self) -> str:
        """Source, how it was read, direction, and whether pretraining was on other data than the task's inputs."""
        other = "; pretrained on other data, not on the task's own inputs" if self.pretraining == OTHER else ""
        return f"{self.source}; {READ[self.read]}; {self.direction or 'direction not stated'}{other}."

    def entry(self, task: str) -> Entry:
        """The accuracy on a task as it stands in a table; empty where none was published."""
        if task not in self.accuracy:
            return Entry("")
        if (found := self.accuracy[task]) is None:
            return Entry("fail")
        mean, std = found
        # 62.15 is a little less in binary, and rounds up all the same.
        text = f"{100 * mean + 1e-9:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")
        marks = ["secondary"] * (self.read == "secondary") + ["other data"] * (self.pretraining == OTHER)
        return Entry(text + (f" ({', '.join(marks)})" if marks else ""), mean)


@cache
def _all() -> tuple[Published, ...]:
    import yaml

    table = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(
        Published(
            row["name"],
            row.get("pretraining"),
            row.get("direction"),
            table["sources"][row["source"]],
            row["read"],
            {task: _value(value) for task, value in row["accuracy"].items()},
        )
        for row in table["rows"]
    )


def _value(value: Any) -> tuple[float, float | None] | None:
    if value == "fail":
        return None
    mean, std = value if isinstance(value, list) else (value, None)
    return mean / 100, None if std is None else std / 100


def published(task: str, direction: str) -> list[Published]:
    """The published models with a value for a task, of one direction.

    A model whose source does not state its direction stands among the bidirectional ones, and its note says so.
    """
    return [p for p in _all() if task in p.accuracy and (p.direction or DIRECTIONS[0]) == direction]
