"""What a report says of the learning rates that a sweep has tried: which, how long, with which seed, how they did."""

from collections.abc import Sequence
from typing import Any

from lra.groups import Group
from lra.results import Section
from lra.tables import Column, Entry, Table

Choice = dict[str, Any]
"""An entry of chosen.json."""


def choices_of(section: Section, choices: Sequence[Choice]) -> list[tuple[Group, Choice]]:
    """The choices by which the section's groups have their rates, each with the first group that has."""
    found: dict[int, tuple[Group, Choice]] = {}
    for i, choice in enumerate(choices):
        for g in section.groups:
            if i not in found and any(_made(choice, key) for key in _keys(g)):
                found[i] = g, choice
    return list(found.values())


def _keys(group: Group) -> list[str]:
    return [key for r in group.results for key in (r["key"], r.get("pretrain", {}).get("key")) if key]


def _made(choice: Choice, key: str) -> bool:
    """Whether a cell got its rate by a choice. One that does not list its cells is known by task, model and regime."""
    if "runs" in choice:
        return key in choice["runs"]
    return key.rpartition("/")[0] == choice["cell"].rpartition("/")[0]


def phase_of(choice: Choice) -> str:
    """pretrain, scratch or finetune."""
    return str(choice["cell"].rsplit("/", 2)[-2].rpartition("-")[2])


def rates_table(section: Section, slug: str, choices: Sequence[Choice]) -> Table | None:
    """Validation scores of the rates tried, the chosen one bold; None where nothing was chosen for the section."""
    found = choices_of(section, choices)
    if not found:
        return None
    rates = sorted({float(rate) for _, choice in found for rate in choice["validation"]})
    columns = [Column(name) for name in ("model", "phase", "chosen", "seed", "share of the steps")]
    columns += [Column(f"{rate:g}", "validation score with learning rate") for rate in rates]
    table = Table(f"{slug}-rates", f"{section.title}: learning rates tried", columns)
    for group, choice in found:
        scores = {float(rate): score for rate, score in choice["validation"].items()}
        chosen, share = choice["lr"], choice["share"]
        table.add(
            group.model,
            phase_of(choice),
            Entry(f"{chosen:g}", chosen),
            Entry(str(choice["seed"]), choice["seed"]),
            Entry(f"{100 * share:g} %", share),
            *(_score(scores, rate, chosen) for rate in rates),
        )
    table.below = [
        "Each model and phase was tried with these rates, in this share of its steps, and has the one with the best "
        "validation score (bold): accuracy, or R² where pretraining is a regression."
    ]
    seeds = {r["config"]["seed"] for g in section.groups for r in g.results} & {c["seed"] for _, c in found}
    text = f"is also one of the results' ({', '.join(map(str, sorted(seeds)))})" if seeds else "is none of the results'"
    table.below.append(f"The seed of the trials {text}.")
    return table


def _score(scores: dict[float, float | None], rate: float, chosen: float) -> Entry:
    if rate not in scores:
        return Entry("")
    score = scores[rate]
    return Entry("diverged") if score is None else Entry(f"{score:.3f}", score, bold=rate == chosen)
