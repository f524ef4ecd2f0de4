"""The tables over all tasks: models against tasks, shares of pretraining, shares of the data. One per direction."""

from collections import Counter
from collections.abc import Callable

from lra.groups import Group, best, budget_of
from lra.published import Published, published
from lra.results import Section
from lra.tables import Column, Entry, Row, Table, leader, mean_std

REGIMES = (False, True)  # pretrained?
READING = (
    "Test accuracy (%), mean ± standard deviation over seeds (number of seeds). Pretrained: on the task's own "
    "training inputs, with the steps of pretraining taken from the same total. Where a model ran with several "
    "settings, those with the most seeds are shown, and of these the best on validation. **Bold**: best of our column "
    "by at least one point, among runs of the same budget; smaller gaps mean nothing here."
)


def overviews(sections: list[Section]) -> list[Table]:
    """Per direction: tasks against models, then shares of pretraining and of the data if there are several."""
    tables = []
    for direction in dict.fromkeys(s.direction for s in sections):
        these = [s for s in sections if s.direction == direction]
        tables.append(tasks_by_models(these, direction))
        tables += [t for t in (by_share(these, direction), by_scale(these, direction)) if t is not None]
    return tables


def models_of(sections: list[Section]) -> list[str]:
    return list(dict.fromkeys(g.model for s in sections for g in s.groups))


def chosen(section: Section, model: str, pretrained: bool) -> Group | None:
    """The group of a model in the overview: of the section's main budget and share if it ran with them."""
    groups = [g for g in section.groups if (g.model, g.pretrained) == (model, pretrained)]
    share = section.main_share()
    wishes: tuple[Callable[[Group], bool], ...] = (
        lambda g: g in section.main() and (not pretrained or g.share == share),
        lambda g: g in section.main(),
        lambda g: True,
    )
    return next((found for wish in wishes if (found := best(filter(wish, groups)))), None)


def departures(group: Group, section: Section) -> str:
    """In what a group differs from the main budget of its section, or nothing."""
    budget, main, share = budget_of(group), budget_of(section.main()[0]), section.main_share()
    parts = []
    if budget[0] != main[0]:
        parts.append(f"{budget[0]:,} steps in all")
    if budget[1] != main[1]:
        parts.append(f"{100 * budget[1]:g} % of the training data")
    if budget[2] != main[2]:
        parts.append(f"{group.first['data']['train']['rows']:,} labels")
    if group.pretrained and group.share != share:
        parts.append(f"{100 * group.share:g} % of the steps for pretraining")
    return ", ".join(parts)


def tasks_by_models(sections: list[Section], direction: str) -> Table:
    """Rows are models, columns are tasks, scratch beside pretrained; published numbers below ours."""
    tasks = task_names(sections)
    columns = [Column(regime, task) for task in tasks for regime in ("scratch", "pretrained")]
    table = Table(f"overview-{direction}", f"Overview, {direction} models", [Column("model"), *columns])
    models = models_of(sections)
    grid = [[chosen(s, model, regime) for s in sections for regime in REGIMES] for model in models]
    places = [s for s in sections for _ in REGIMES]
    leaders = [leader([_equal(row[i], s) for row in grid]) for i, s in enumerate(places)]
    for i, (model, row) in enumerate(zip(models, grid, strict=True)):
        entries = [Entry(model, model)]
        for j, (g, section) in enumerate(zip(row, places, strict=True)):
            notes = (table.note(f"With {text}."),) if g and (text := departures(g, section)) else ()
            entries.append(
                mean_std(g.mean, g.std, len(g.results), bold=leaders[j] == i, notes=notes) if g else Entry("")
            )
        table.rows.append(Row(entries))
    rows = {p.name: p for s in sections if s.full_size for p in published(s.name, direction)}
    for p in rows.values():
        add_published(table, p, sections)
    table.below.append(READING)
    changed = [f"{name}: {', '.join(s.changes)}" for name, s in zip(tasks, sections, strict=True) if s.changes]
    if changed:
        table.below.append(f"Not the tasks' defaults (in brackets): {'; '.join(changed)}.")
    reduced = [
        name for name, s in zip(tasks, sections, strict=True) if published(s.name, direction) and not s.full_size
    ]
    if reduced:
        table.below.append(f"Reduced: {', '.join(reduced)}. Published numbers do not compare and are left out there.")
    if rows:
        table.below.append(PUBLISHED)
    return table


def _equal(group: Group | None, section: Section) -> float | None:
    """The accuracy of a group that has what the others of its column have, and so may lead them."""
    return group.mean if group is not None and not departures(group, section) else None


PUBLISHED = (
    "*In italics*: published numbers, not measured here, with other sizes, budgets and encodings; on Text most were "
    "chosen on the test split, and a rerun of one model by another group has moved by three points."
)


def add_published(table: Table, p: Published, sections: list[Section]) -> None:
    """A row of published numbers under those of the tasks they compare with."""
    note = table.note(p.note)
    entries = [Entry(f"{p.name}, published", p.name, notes=(note,))]
    for section in sections:
        for regime in REGIMES:
            here = section.full_size and regime == bool(p.pretraining)
            entries.append(p.entry(section.name) if here else Entry(""))
    table.rows.append(Row(entries, "published"))


def task_names(sections: list[Section]) -> list[str]:
    """`listops`, `listops (changed)`, `listops (changed, 2)`: a name for the column of each section."""
    names: list[str] = []
    for section in sections:
        name, k = f"{section.name} (changed)" if section.changes else section.name, 2
        while name in names:
            name, k = f"{section.name} (changed, {k})", k + 1
        names.append(name)
    return names


def by_share(sections: list[Section], direction: str) -> Table | None:
    """Accuracy against the share of the steps that pretraining takes, at equal total; None if only one was run."""
    values = sorted({share for s in sections for _, share in shares(s)})
    if not values:
        return None
    columns = [Column("task"), Column("model"), *(Column(f"{100 * v:g} %", "share of the steps") for v in values)]
    table = Table(f"shares-{direction}", f"Shares of pretraining, {direction} models", columns)
    for task, section in zip(task_names(sections), sections, strict=True):
        groups = shares(section)
        for model in dict.fromkeys(model for model, _ in groups):
            add_values(table, [task, model], [groups.get((model, v)) for v in values])
    table.below.append(
        "Test accuracy (%), mean ± standard deviation (seeds). All steps together are the same in a row; 0 % is "
        "training from scratch. **Bold**: best of its row by at least one point."
    )
    return table


def shares(section: Section) -> dict[tuple[str, float], Group]:
    """{(model, share): group} at the section's main budget, of the models pretrained with more than one share."""
    main = section.main()
    tried = Counter(model for model, share in {(g.model, g.share) for g in main} if share)
    keys = dict.fromkeys((g.model, g.share) for g in main if tried[g.model] > 1)
    return {key: found for key in keys if (found := best(g for g in main if (g.model, g.share) == key))}


def by_scale(sections: list[Section], direction: str) -> Table | None:
    """Accuracy against the share of the training rows; None if only one was run."""
    values = sorted({value for s in sections for _, _, value in scales(s)})
    if not values:
        return None
    data = [Column(f"{100 * v:g} %", "training rows") for v in values]
    columns = [Column("task"), Column("model"), Column("regime"), *data]
    table = Table(f"scales-{direction}", f"Less data, {direction} models", columns)
    for task, section in zip(task_names(sections), sections, strict=True):
        groups = scales(section)
        for model, pretrained in dict.fromkeys((model, pretrained) for model, pretrained, _ in groups):
            row = [groups.get((model, pretrained, v)) for v in values]
            notes = [budget_note(g, section) if g else "" for g in row]
            add_values(table, [task, model, "pretrained" if pretrained else "scratch"], row, notes, bold=False)
    table.below.append(
        "Test accuracy (%), mean ± standard deviation (seeds), on the whole test split. Pretraining and labels are cut "
        "to the same rows, and a smaller share is part of every larger one."
    )
    return table


def budget_note(group: Group, section: Section) -> str:
    steps = budget_of(group)[0]
    return f"With {steps:,} steps in all." if steps != budget_of(section.main()[0])[0] else ""


def scales(section: Section) -> dict[tuple[str, bool, float], Group]:
    """{(model, pretrained, share of the data): group} of the models that ran with more than one share of the data.

    Pretrained groups have the section's main share of pretraining where that was run.
    """
    share, labels = section.main_share(), budget_of(section.main()[0])[2]
    by_key: dict[tuple[str, bool, float], list[Group]] = {}
    for g in section.groups:
        if budget_of(g)[2] == labels:
            by_key.setdefault((g.model, g.pretrained, g.data), []).append(g)
    tried = Counter((model, pretrained) for model, pretrained, _ in by_key)
    made = {}
    for key, same in by_key.items():
        found = best(g for g in same if not g.pretrained or g.share == share) or best(same)
        if found is not None and tried[key[:2]] > 1:
            made[key] = found
    return made


def add_values(
    table: Table, names: list[str], row: list[Group | None], notes: list[str] | None = None, bold: bool = True
) -> None:
    """A row of means, the leading one bold."""
    first = leader([g.mean if g else None for g in row]) if bold else None
    entries = [Entry(name, name) for name in names]
    for i, g in enumerate(row):
        marks = (table.note(notes[i]),) if notes and notes[i] else ()
        entries.append(mean_std(g.mean, g.std, len(g.results), bold=i == first, notes=marks) if g else Entry(""))
    table.rows.append(Row(entries))
