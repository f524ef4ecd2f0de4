"""Tables over all tasks: what stands in one place, what is bold, shares, scales, and published numbers."""

import pytest

from lra.overview import chosen, overviews, task_names
from lra.published import DIRECTIONS, OTHER, READ, _all, published
from lra.results import sections
from lra.tables import Table
from lra.task_tables import accuracy_table
from lra.tasks import TASKS

from .fake_results import result


def entries(table: Table, row: str) -> dict[str, str]:
    """{column: text} of our row."""
    (found,) = (r for r in table.rows if r.kind == "ours" and r.entries[0].text == row)
    return {c.title: e.text for c, e in zip(table.columns, found.entries, strict=True)}


def bold(table: Table) -> list[str]:
    return [e.text for row in table.rows for e in row.entries if e.bold]


def test_scratch_and_pretrained_stand_side_by_side(tiny):
    made = [
        result(tiny(seed=seed, regime=regime, model={"mixer": mixer}), base + 0.02 * seed)
        for mixer, regime, base in (("lru", "scratch", 0.4), ("lru", "finetune", 0.5), ("attention", "scratch", 0.405))
        for seed in range(2)
    ]
    (table,) = overviews(sections(made))
    assert table.title == "Overview, bidirectional models"
    task = "listops (changed)"
    assert entries(table, "lru") == {
        "model": "lru",
        f"{task}, scratch": "41.0 ± 1.4 (2)",
        f"{task}, pretrained": "51.0 ± 1.4 (2)",
    }
    assert entries(table, "attention")[f"{task}, pretrained"] == ""
    assert bold(table) == [], "half a point is no lead, and alone is no lead either"
    assert not [row for row in table.rows if row.kind == "published"]
    assert any("Reduced: listops (changed)" in text for text in table.below)


def test_a_lead_of_a_point_is_bold_and_directions_are_apart(tiny):
    values = {("lru", True): 0.50, ("attention", True): 0.51, ("attention", False): 0.9, ("lru", False): 0.2}
    made = [
        result(tiny(model={"mixer": mixer, "bidirectional": both}), value) for (mixer, both), value in values.items()
    ]
    first, second = overviews(sections(made))
    assert bold(first) == ["51.0 (1)"] and bold(second) == ["90.0 (1)"]
    assert first.slug == "overview-bidirectional" and second.slug == "overview-causal"


def test_the_main_budget_is_shown_and_others_are_footnotes(tiny):
    most = [result(tiny(seed=s), 0.4) for s in range(2)]
    short = [result(tiny(budget={"steps": 10}), 0.9)]
    short += [result(tiny(budget={"data": 0.5}, seed=seed), 0.95) for seed in range(3)]  # more seeds, of less data
    other = [result(tiny(model={"mixer": "attention"}, budget={"steps": 10}), 0.3)]
    (section,) = sections([*most, *short, *other])
    group = chosen(section, "lru", False)
    assert group is not None and group.mean == 0.4
    table = overviews([section])[0]
    assert table.notes == ["With 10 steps in all."]
    assert [e.notes for row in table.rows for e in row.entries if e.notes] == [(0,)]


def test_of_several_settings_the_best_on_validation_is_shown(tiny):
    made = [result(tiny(optim={"lr": lr}), accuracy) for lr, accuracy in ((0.1, 0.5), (0.2, 0.6), (0.3, 0.9))]
    made[2]["val"]["accuracy"] = 0.1  # best on the test split, which must not choose
    (section,) = sections(made)
    found = chosen(section, "lru", False)
    assert found is not None and found.mean == 0.6
    (section,) = sections([*made, result(tiny(optim={"lr": 0.1}, seed=1), 0.5)])
    found = chosen(section, "lru", False)
    assert found is not None and len(found.results) == 2, "a setting that ran with more seeds was the one chosen"


def test_shares_of_pretraining_have_a_table(tiny):
    shares = {0.2: 0.5, 0.4: 0.6, 0.6: 0.55}
    made = [result(tiny(regime="finetune", budget={"pretrain_share": s}), value) for s, value in shares.items()]
    made += [result(tiny(), 0.4), result(tiny(model={"mixer": "attention"}), 0.3)]
    table = overviews(sections(made))[1]
    assert [c.title for c in table.columns[2:]] == [f"share of the steps, {s} %" for s in (0, 20, 40, 60)]
    (row,) = table.rows
    assert [e.text for e in row.entries] == ["listops (changed)", "lru", "40.0 (1)", "50.0 (1)", "60.0 (1)", "55.0 (1)"]
    assert bold(table) == ["60.0 (1)"]
    assert len(overviews(sections(made[1:2] + made[3:]))) == 1, "one share is in the overview already"


def test_scales_of_the_data_have_a_table(tiny):
    made = [
        result(tiny(regime=regime, budget={"data": data, "steps": 20 if data > 0.05 else 10}), 0.3 + data / 10)
        for regime in ("scratch", "finetune")
        for data in (0.01, 0.1, 1.0)
    ]
    table = overviews(sections(made))[1]
    assert [c.title for c in table.columns[3:]] == [f"training rows, {p} %" for p in (1, 10, 100)]
    assert [[e.text for e in row.entries[1:]] for row in table.rows] == [
        ["lru", regime, "30.1 (1)", "31.0 (1)", "40.0 (1)"] for regime in ("scratch", "pretrained")
    ]
    assert table.notes == ["With 10 steps in all."] and table.rows[0].entries[3].notes == (0,)


def full_size(tiny, **changes):
    """A tiny model's cell on the benchmark's ListOps."""
    from dataclasses import replace

    return replace(tiny(**changes), task={"name": "listops"})


def test_published_numbers_stand_beside_full_tasks_only(tiny):
    full, small = result(full_size(tiny), 0.4), result(tiny(), 0.5)
    (table,) = overviews(sections([full, small]))
    rows = {row.entries[0].text: [e.text for e in row.entries[1:]] for row in table.rows if row.kind == "published"}
    assert rows["S5, published"] == ["62.2", "", "", ""]
    assert rows["S4, masked SPT, published"] == ["", "61.3 (secondary)", "", ""]
    assert "LRU, published" not in rows, "the published LRU is causal on ListOps"
    text = table.markdown()
    assert "*S5, published*" in text and "*62.2*" in text and "published numbers, not measured here" in text
    assert "arXiv:2310.02980; secondary: second hand" in text

    (table,) = overviews(sections([result(full_size(tiny, model={"bidirectional": False}), 0.4)]))
    names = [row.entries[0].text for row in table.rows if row.kind == "published"]
    assert "LRU, published" in names and "S5, published" not in names

    for budget in ({"data": 0.5}, {"labels": 16}):
        (table,) = overviews(sections([result(full_size(tiny, budget=budget), 0.4)]))
        assert not [row for row in table.rows if row.kind == "published"]


def test_rows_and_not_options_decide_what_is_full(tiny):
    """Path-X at its default is a tenth of the benchmark's; at the benchmark's number it is full, whatever its seed."""
    from dataclasses import replace

    def full(task, **rows):
        made = result(replace(tiny(), task=task), 0.4)
        made["data"] = {split: {"rows": n} for split, n in rows.items()}
        return sections([made])[0].full_size

    benchmark = {"train": 160_000, "val": 20_000, "test": 20_000}
    assert not full({"name": "pathx"}, train=16_000, val=2_000, test=2_000)
    assert not full({"name": "pathx"}, **{**benchmark, "test": 19_999})
    assert full({"name": "pathx", "n_images": 200_000}, **benchmark)
    assert full({"name": "pathfinder", "seed": 3, "encoding": "tokens"}, **benchmark)
    assert not full({"name": "pathfinder", "difficulty": "easy"}, **benchmark)


def test_what_ran_with_another_budget_or_rate_does_not_lead(tiny):
    made = [result(tiny(model={"mixer": m}, seed=seed), 0.5) for m in ("lru", "attention") for seed in (0, 1)]
    made.append(result(tiny(model={"mixer": "conv"}, budget={"steps": 10}), 0.9))
    found = sections(made)
    assert bold(overviews(found)[0]) == [] == bold(accuracy_table(found[0], "t"))

    tried = [result(tiny(optim={"lr": lr}), value) for lr, value in ((0.1, 0.7), (0.2, 0.6))]
    tried[0]["val"]["accuracy"] = 0.1  # ahead on the test split alone
    found = sections([*tried, result(tiny(model={"mixer": "attention"}), 0.5)])
    assert bold(accuracy_table(found[0], "t")) == ["60.0"]


def test_pretraining_on_other_data_is_said_in_the_column_of_pretraining(tiny):
    (table,) = overviews(sections([result(full_size(tiny, model={"bidirectional": False}), 0.4)]))
    (row,) = (r for r in table.rows if r.entries[0].text.startswith("Pythia-70M, pretrained"))
    assert [e.text for e in row.entries[1:]] == ["", "43.1 (secondary, other data)"]
    assert "pretrained on other data" in table.notes[row.entries[0].notes[0]]


def test_how_a_task_is_pretrained_does_not_reduce_it(tiny):
    from dataclasses import replace

    def at(rate, **changes):
        return result(replace(tiny(**changes), task={"name": "listops", "mask_rate": rate}), 0.4)

    pretrained = at(0.2, regime="finetune")
    (section,) = sections([at(0.1), pretrained])
    assert section.full_size and section.changes == ["mask_rate 0.2 (0.1)"], "scratch stands beside its twin"
    (section,) = sections([at(0.1), pretrained, at(0.5, regime="finetune")])
    rates = section.varying()["mask rate"]
    assert section.changes == [] and [rates(g) for g in section.groups] == ["", "0.2", "0.5"]


def test_the_published_table_is_sound():
    arena = {"listops", "text", "retrieval", "image", "pathfinder", "pathx", "pathx256", "scifar"}
    for p in _all():
        assert p.read in READ and (p.direction is None or p.direction in DIRECTIONS)
        assert p.pretraining in (None, "masked", "causal", OTHER) and set(p.accuracy) <= arena
        assert all(value is None or 0.2 < value[0] < 1 for value in p.accuracy.values())
    for direction in DIRECTIONS:
        for task in arena & set(TASKS):
            names = [p.name for p in published(task, direction)]
            assert len(set(names)) == len(names)
    # The row averages that the paper's text prints, of the rows that are second hand.
    averages = {"S4, masked SPT": 86.93, "larger rotary Transformer, masked SPT": 86.21}
    averages |= {"Transformer of LRA's size, masked SPT": 81.34, "Transformer of LRA's size, causal SPT": 81.81}
    for p in _all():
        if p.name in averages:
            values = [value[0] for task, value in p.accuracy.items() if value and task != "pathx256"]
            assert 100 * sum(values) / 6 == pytest.approx(averages[p.name], abs=0.01)


def test_names_of_sections_are_unique(tiny):
    made = [result(tiny(task={"max_depth": depth}), 0.5) for depth in (3, 4)] + [result(full_size(tiny), 0.5)]
    assert task_names(sections(made)) == ["listops", "listops (changed)", "listops (changed, 2)"]
