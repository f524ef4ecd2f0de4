"""The tables of one task: accuracies with what they cost, pretraining, groups of the test rows, probes of range."""

from collections.abc import Callable, Sequence

from lra.groups import UNCHANGED, Group
from lra.overview import PUBLISHED
from lra.published import published
from lra.rates import Choice, rates_table
from lra.results import Section, highest_line, standard_error
from lra.tables import Column, Entry, Table, accuracy, leader, percent

COSTS = ("steps", "tokens (M)", "Tflop", "seconds", "loader %")


def task_tables(section: Section, slug: str, choices: Sequence[Choice] = ()) -> list[Table]:
    """Every table of a section; those without anything to show are left out."""
    tables = [accuracy_table(section, slug), pretraining_table(section, slug), rates_table(section, slug, choices)]
    names = dict.fromkeys(name for g in section.groups for r in g.results for name in r["test"]["groups"])
    tables += [group_table(section, slug, name) for name in names]
    tables += [probe_table(section, slug, probe) for probe in PROBES]
    return [table for table in tables if table is not None]


def introduction(section: Section) -> list[str]:
    """Paragraphs above the tables: how the task differs from its defaults, encodings, poolings."""
    results = [r for g in section.groups for r in g.results]
    encodings = ", ".join(dict.fromkeys(r["encoding"] for r in results))
    poolings = ", ".join(dict.fromkeys(r["pooling"] for r in results))
    chance = section.first["chance"]
    texts = [f"Inputs: {encodings}. Pooling: {poolings}. Chance: {percent(chance)} %."]
    if section.changes:
        texts.insert(0, f"Not the task's defaults (in brackets): {', '.join(section.changes)}.")
    return texts


def accuracy_table(section: Section, slug: str) -> Table:
    """The groups, then the rules that need no network, then published numbers."""
    varying = section.varying()
    names = ["model", "regime", *varying, "accuracy %", "std", "seeds", "reaches", "width x blocks", "parameters"]
    table = Table(f"{slug}-accuracy", f"{section.title}: test accuracy", [Column(name) for name in [*names, *COSTS]])
    compared = section.compared()
    best = leader([g.mean if g in compared else None for g in section.groups])
    for i, g in enumerate(section.groups):
        table.add(
            *named(g, varying),
            accuracy(g.mean, bold=i == best),
            Entry("-") if g.std is None else accuracy(g.std),
            number(len(g.results)),
            Entry(highest_line(g.mean, section.lines), highest(g, section)),
            Entry(g.size, g.config["model"]["d_model"]),
            number(g.first["parameters"]["total"]),
            *costs(g),
        )
    blank = [Entry("")] * len(varying)
    rest = [Entry("")] * (5 + len(COSTS))
    for name, value in section.lines.items():
        table.add(f"({name})", Entry(""), *blank, accuracy(value), *rest, kind="rule")
    shown = published(section.name, section.direction) if section.full_size else []
    for p in shown:
        model = Entry(p.name, p.name, notes=(table.note(p.note),))
        table.add(model, p.regime, *blank, p.entry(section.name), *rest, kind="published")
    table.below = [reading(section)]
    if shown:
        table.below.append(PUBLISHED)
    elif published(section.name, section.direction):
        table.below.append("The task is reduced here: published numbers do not compare with it and are left out.")
    return table


def reading(section: Section) -> str:
    """What the columns of the accuracies mean, and where they were made."""
    n = section.first["data"]["test"]["rows"]
    worst = max(standard_error(g.mean, n) for g in section.groups)
    machines = sorted({f"{r['device']}, torch {r['versions']['torch']}" for g in section.groups for r in g.results})
    return (
        f"In brackets: rules that need no network, on the same {n:,} test sequences; `reaches` is the best of them "
        "that a mean accuracy is not below. std is over seeds; the standard error of one accuracy on this test split "
        f"is {percent(worst)} points or less. **Bold**: ahead by at least one point among the runs of the main budget, "
        "of each model and regime the one with the settings that were best on validation. Costs are pretraining + "
        "training on labels. Tflop are estimated from the layers' multiplications. loader % is the share of the "
        "seconds that went into making batches. The weights of the best validation score are tested, once. "
        f"Run on: {'; '.join(machines)}."
    )


def named(group: Group, varying: dict[str, Callable[[Group], str]]) -> list[Entry | str]:
    """Model, regime, and the settings in which the groups of the section differ."""
    return [group.model, group.regime, *settings(group, varying)]


def settings(group: Group, varying: dict[str, Callable[[Group], str]]) -> list[Entry]:
    """The values of the settings, ordered as numbers where they are numbers."""
    return [Entry(text, _number(text)) for text in (get(group) for get in varying.values())]


def _number(text: str) -> float | str | None:
    try:
        return float(text.replace(",", "").removesuffix(" %"))
    except ValueError:
        return text or None


def highest(group: Group, section: Section) -> float:
    return section.lines.get(highest_line(group.mean, section.lines), 0.0)


def number(value: float) -> Entry:
    return Entry(f"{value:,}", value)


def costs(group: Group) -> list[Entry]:
    """Steps, tokens, Tflop and seconds as `pretraining + fine-tuning`, ordered by their sums; the loader's share."""
    spent = [("steps", 1.0), ("tokens", 1e6), ("flops", 1e12), ("seconds", 1.0)]
    return [*(both(group, name, unit) for name, unit in spent), accuracy(group.loader_share)]


def both(group: Group, name: str, unit: float) -> Entry:
    parts = [part / unit for part in group.cost(name) if part]
    text = " + ".join(f"{part:,.0f}" if part >= 100 or unit == 1 else f"{part:.2g}" for part in parts)
    return Entry(text, sum(parts))


def pretraining_table(section: Section, slug: str) -> Table | None:
    """How well the pretrained networks recover hidden or next tokens of the validation inputs."""
    groups = [g for g in section.groups if g.pretrained]
    if not groups:
        return None
    varying = section.varying()
    ink = any(g.denoised("ink_accuracy") is not None for g in groups)
    columns = ["model", *varying, "loss", "score", "value", *(["ink accuracy %"] if ink else []), "steps", "seconds"]
    what = "hidden" if section.direction == "bidirectional" else "next"
    title = f"{section.title}: pretraining, validation scores on {what} positions"
    table = Table(f"{slug}-pretraining", title, [Column(name) for name in columns])
    for g in groups:
        metric = g.first["pretrain"]["metric"]
        loss, value, on_ink = (g.denoised(name) for name in ("loss", metric, "ink_accuracy"))
        shown: list[Entry | str] = [
            g.model,
            *settings(g, varying),
            decimals(loss),
            SCORES[metric],
            scored(metric, value),
        ]
        if ink:
            shown.append(Entry("") if on_ink is None else accuracy(on_ink))
        steps, seconds = g.cost("steps")[0], g.cost("seconds")[0]
        table.add(*shown, Entry(f"{steps:,.0f}", steps), Entry(f"{seconds:,.0f}", seconds))
    texts = []
    if ink:
        texts.append("Ink: positions that are not background; the background alone gives a high accuracy.")
    if any(g.first["pretrain"]["metric"] == "r2" for g in groups):
        texts.append("R² is the share of the variance of the levels that the network explains.")
    table.below = texts
    return table


SCORES = {"accuracy": "accuracy %", "r2": "R²"}


def decimals(value: float | None) -> Entry:
    return Entry("") if value is None else Entry(f"{value:.3f}", value)


def scored(metric: str, value: float | None) -> Entry:
    return decimals(value) if metric == "r2" or value is None else accuracy(value)


def group_table(section: Section, slug: str, name: str) -> Table | None:
    """Accuracy by `length` or by a stratum of the task; None where all rows are one group."""
    ranges = list(dict.fromkeys(text for g in section.groups for text, _ in g.accuracy_by(name)))
    if len(ranges) < 2:
        return None
    varying = section.varying()
    unit = "length in positions" if name == "length" else name
    columns = [Column("model"), Column("regime"), *map(Column, varying), *(Column(text, unit) for text in ranges)]
    table = Table(f"{slug}-{name}", f"{section.title}: test accuracy (%) by {unit}", columns)
    for g in section.groups:
        found = dict(g.accuracy_by(name))
        table.add(*named(g, varying), *(accuracy(found[text]) if text in found else Entry("") for text in ranges))
    return table


PROBES = {
    "shuffled": (
        "with blocks shuffled",
        "blocks of",
        "Some test inputs, the same in every column, are cut into blocks of this many positions, put in random order. "
        "An accuracy that stays was reached without the order of anything farther apart than a block.",
    ),
    "windows": (
        "within windows",
        "windows of",
        "The same test inputs, cut into windows of this many positions: no feature sees beyond its own, and all are "
        "pooled as usual. An accuracy that stays was reached within windows. Trained on whole inputs, a network can "
        "lose more by the cut than it needs from farther away.",
    ),
}


def probe_table(section: Section, slug: str, probe: str) -> Table | None:
    """Accuracy on test inputs of which something far apart is taken away: how far the network looks."""
    title, above, below = PROBES[probe]
    sizes = sorted({size for g in section.groups for size in g.probed(probe)})
    if not sizes:
        return None
    varying = section.varying()
    columns = [Column("model"), Column("regime"), *map(Column, varying), Column(UNCHANGED[probe])]
    columns += [Column(f"{above} {size:,}") for size in sizes]
    table = Table(f"{slug}-{probe}", f"{section.title}: test accuracy (%) {title}", columns)
    for g in section.groups:
        found = g.probed(probe)
        probed = [accuracy(found[size]) if size in found else Entry("") for size in sizes]
        table.add(*named(g, varying), accuracy(g.unprobed(probe)), *probed)
    table.below = [below]
    if not all(UNCHANGED[probe] in r["test"].get(probe, {}) for g in section.groups for r in g.results):
        table.below.append(
            f"Where a result does not hold it, the accuracy {UNCHANGED[probe]} is that of all test inputs."
        )
    return table
