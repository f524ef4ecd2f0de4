"""Reports from results written by hand: what is grouped, averaged, compared, and what stays apart."""

import csv
import json
import shutil
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lra.groups import settings_of
from lra.plot import spread
from lra.report import show_report, write_report
from lra.results import highest_line, load_choices, load_results, sections, task_changes
from lra.tables import escape, leader
from lra.task_tables import probe_table

from .fake_results import LINES, result, write


@pytest.fixture
def folder(tiny, tmp_path):
    """LRU and attention, scratch and finetuned, three seeds; one causal cell; one pretrain cell, which has no test."""
    made = [
        result(tiny(regime=regime, seed=seed, model={"mixer": mixer}), base + 0.01 * seed)
        for mixer, regime, base in [
            ("lru", "scratch", 0.40),
            ("lru", "finetune", 0.60),
            ("attention", "scratch", 0.20),
            ("attention", "finetune", 0.36),
        ]
        for seed in range(3)
    ]
    made.append(result(tiny(model={"bidirectional": False}), 0.30))
    pretraining = result(tiny(regime="pretrain"), 0.9)
    del pretraining["test"], pretraining["reference_lines"]
    return write([*made, pretraining], tmp_path / "runs")


def test_groups_average_seeds_and_keep_directions_apart(folder):
    found = sections(load_results(folder))
    assert [s.direction for s in found] == ["bidirectional", "causal"]
    groups = found[0].groups
    assert [(g.model, g.regime) for g in groups] == [
        ("lru", "scratch"),
        ("lru", "masked + finetune"),
        ("attention", "scratch"),
        ("attention", "masked + finetune"),
    ]
    assert groups[1].mean == pytest.approx(0.61) and groups[1].std == pytest.approx(0.01)
    assert groups[1].accuracies == [0.60, 0.61, 0.62] and groups[1].cost("steps") == (40, 10)
    assert groups[0].cost("tokens") == (0, 1000)
    assert groups[1].loader_share == pytest.approx(0.5 / 25) and groups[1].denoised("accuracy") == 0.5
    assert groups[0].accuracy_by("length") == [("4 to 9", pytest.approx(0.51)), ("10 to 23", pytest.approx(0.31))]
    assert groups[0].accuracy_by("depth") == [("1", pytest.approx(0.41)), ("2", pytest.approx(0.205))]
    assert groups[0].probed("shuffled") == {1: pytest.approx(0.11), 16: pytest.approx(0.205)}
    assert found[1].groups[0].std is None


def test_settings_that_differ_are_groups_and_columns(tiny):
    cells = [tiny(), tiny(seed=1), tiny(optim={"lr": 0.5}), tiny(budget={"labels": 16})]
    # what a run from scratch does not read makes no second group
    cells += [tiny(seed=2, optim={"pretrain_lr": 0.1}, budget={"pretrain_share": 0.1, "checkpoint_every": 9})]
    cells += [tiny(seed=3, model={"per_mixer": {"attention": {"n_heads": 2}}})]
    (section,) = sections([result(cell, 0.5) for cell in cells])
    assert [len(g.results) for g in section.groups] == [4, 1, 1]
    varying = section.varying()
    assert {name: {get(g) for g in section.groups} for name, get in varying.items()} == {
        "lr": {"0.001", "0.5"},
        "labels": {"60", "16"},
    }


def test_other_versions_and_other_data_are_groups_and_columns(tiny):
    made = [result(tiny(seed=seed), 0.5) for seed in range(3)]
    made[1]["plan"]["protocol"] = 0
    made[2]["data"]["fingerprint"] = "0123456789abcdef"
    (section,) = sections(made)
    assert len(section.groups) == 3 and set(section.varying()) == {"protocol", "values of the data"}
    assert {get(g) for get in section.varying().values() for g in section.groups} >= {"0", "01234567"}


def test_a_copied_folder_counts_once(folder, capsys):
    alone = load_results(folder)
    shutil.copytree(folder, folder / "z-copy")
    assert load_results(folder) == alone
    error = capsys.readouterr().err
    assert "14 results left out" in error and "z-copy" in error


def test_shuffled_blocks_stand_beside_the_same_rows_in_order(tiny):
    whole, part = result(tiny(), 0.5), result(tiny(model={"mixer": "attention"}), 0.5)
    part["test"]["shuffled"]["in order"] = 0.625
    (section,) = sections([whole, part])
    table = probe_table(section, "t", "shuffled")
    assert table is not None and [c.title for c in table.columns[2:]] == ["in order", "blocks of 1", "blocks of 16"]
    assert [row.entries[2].text for row in table.rows] == ["50.0", "62.5"] and "all test inputs" in table.below[-1]


@pytest.mark.parametrize("listed", [True, False], ids=["cells listed", "of an earlier version"])
def test_the_rates_that_were_tried_are_reported(tiny, tmp_path, listed):
    made = [result(tiny(seed=s, regime="finetune"), 0.5) for s in (0, 1)]
    cells = {"pretrain": made[0]["pretrain"]["key"], "finetune": made[0]["key"]}
    record: list[dict[str, Any]] = [
        {
            "cell": f"{key[:-8]}00000000",
            "seed": 7,
            "share": 0.25,
            "validation": {"0.001": None, "0.01": 0.5},
            "lr": 0.01,
        }
        for key in cells.values()
    ]
    other = {**record[0], "cell": "smnist/lru-masked-pretrain/seed0-00000000", "seed": 8}
    if listed:
        for one, key in zip(record, cells.values(), strict=True):
            one["runs"] = [key]
        other = {**record[0], "seed": 8, "runs": []}
    write(made, tmp_path / "runs" / "deeper")
    (tmp_path / "runs" / "deeper" / "chosen.json").write_text(json.dumps([*record, other]))
    choices = load_choices(tmp_path / "runs")
    show_report(made, choices)
    paths = write_report(made, tmp_path / "out", choices)
    text = paths[0].read_text()
    rows = table_rows(text[text.index("learning rates tried") :])
    assert rows[0][:5] == ["model", "phase", "chosen", "seed", "share of the steps"]
    assert rows[2] == ["lru", "pretrain", "0.01", "7", "25 %", "diverged", "**0.500**"]
    assert rows[3][:2] == ["lru", "finetune"] and rows[4][0] != "lru"
    assert "The seed of the trials is none of the results'" in text
    assert "learning rates tried" in paths[1].read_text()
    assert "learning rates tried" not in write_report(made, tmp_path / "none")[0].read_text()


def test_a_foreign_record_of_rates_is_named(tmp_path):
    (tmp_path / "chosen.json").write_text('{"lr": 1}')
    with pytest.raises(ValueError, match=r"chosen\.json is no record of chosen learning rates"):
        load_choices(tmp_path)


def test_arguments_of_a_mixer_are_named_where_they_tell_models_apart(tiny):
    kwargs = [{"kernel_size": 5}, {"kernel_size": 61}]
    made = [result(tiny(model={"mixer": "conv", "mixer_kwargs": k}), 0.5) for k in kwargs]
    (section,) = sections([*made, result(tiny(model={"mixer_kwargs": {"r_min": 0.5}}), 0.5)])
    assert [g.model for g in section.groups] == ["lru", "conv (kernel_size 5)", "conv (kernel_size 61)"]
    assert "mixer_kwargs" not in " ".join(section.varying())
    per_task = result(tiny(model={"per_mixer": {"lru": {"r_min": 0.5}}}), 0.5)
    assert settings_of(per_task) == settings_of(result(tiny(model={"mixer_kwargs": {"r_min": 0.5}}), 0.5))


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in text.splitlines() if line[:1] == "|"]


def test_report_files_say_what_the_results_say(folder, tmp_path, capsys):
    show_report(load_results(folder))
    paths = write_report(load_results(folder), tmp_path / "out")
    names = ["report.md", "report.html", "report.csv", "report.png"]
    assert [p.name for p in paths] == [
        *names,
        "report-listops-bidirectional.png",
        "report-listops-causal.png",
    ]
    text = paths[0].read_text()
    assert text.index("## Overview") < text.index("## listops, bidirectional") < text.index("## listops, causal")
    rows = table_rows(text[text.index("## listops, bidirectional") :])
    header, lru = rows[0], next(row for row in rows if row[:2] == ["lru", "masked + finetune"])
    named = dict(zip(header, lru, strict=True))
    assert named["accuracy %"] == "**61.0**" and named["std"] == "1.0" and named["seeds"] == "3"
    assert named["reaches"] == "exact to depth 1" and named["steps"] == "40 + 10" and named["seconds"] == "20 + 5"
    assert named["loader %"] == "2.0"
    assert ["(root operator)", "", "37.0"] == [next(r for r in rows if r[0] == "(root operator)")[i] for i in (0, 1, 2)]
    assert "max_depth 3 (10)" in text and "2,000 test sequences" in text and "Inputs: tokens" in text
    assert "length in positions, 4 to 9" in text and "depth, 2" in text and "blocks of 16" in text

    table = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert len(table) == 13, "one line per classification cell"
    accuracies = [float(r["test_accuracy"]) for r in table if r["model"] == "lru" and r["regime"] == "finetune"]
    assert statistics.fmean(accuracies) == pytest.approx(0.61)
    assert {r["direction"] for r in table} == {"bidirectional", "causal"}

    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[3:])
    out = capsys.readouterr().out
    assert "61.0" in out and "causal" in out and "4 to 9" in out
    assert max(map(len, out.splitlines())) <= 120


def test_tasks_with_other_rules_and_probes_share_a_csv(tiny, tmp_path):
    first, second = result(tiny(), 0.5), result(tiny(task={"max_depth": 4}), 0.6)
    second["reference_lines"], second["test"]["shuffled"] = {"nearest": 0.2}, {}
    paths = write_report([first, second], tmp_path)
    rows = list(csv.DictReader(paths[2].read_text().splitlines()))
    assert [r["line nearest"] for r in rows] == ["", "0.2"] and [r["shuffled 16"] for r in rows] == ["0.25", ""]


def test_reports_read_and_never_write_results(folder, tmp_path):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write_report(load_results(folder), tmp_path / "out")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pretraining_is_reported_in_its_own_metric(tiny, tmp_path):
    r2, ink = (result(tiny(regime="finetune", model={"mixer": m}), 0.5, "r2") for m in ("lru", "attention"))
    ink["pretrain"]["val"]["ink_accuracy"] = 0.31
    text = write_report([r2, ink], tmp_path)[0].read_text()
    rows = table_rows(text[text.index("pretraining, validation scores") :])
    assert rows[0] == ["model", "loss", "score", "value", "ink accuracy %", "steps", "seconds"]
    assert rows[2] == ["lru", "1.500", "R²", "0.500", "", "40", "20"]
    assert rows[3] == ["attention", "1.500", "R²", "0.500", "31.0", "40", "20"]


def test_inputs_of_one_length_have_no_table_of_lengths(tiny, tmp_path):
    made = result(tiny(), 0.5)
    made["test"] |= {"groups": {"length": [{"min": 64, "max": 64, "n": 9, "accuracy": 0.5}]}, "shuffled": {}}
    text = write_report([made], tmp_path)[0].read_text()
    assert "length in positions" not in text and "blocks" not in text.replace("width x blocks", "")


def test_highest_line_reached():
    assert highest_line(0.1, LINES) == "none"
    assert highest_line(0.37, LINES) == "root operator"
    assert highest_line(0.99, LINES) == "exact to depth 2"


def test_leads_under_a_point_do_not_count():
    assert leader([0.60, 0.61]) == 1 and leader([0.60, 0.609]) is None
    assert leader([0.7, None, 0.2]) == 0 and leader([0.7, None]) is None and leader([]) is None


def test_task_changes_name_value_and_default(tiny):
    task = tiny(regime="pretrain", task={"seed": 3, "mask_rate": 0.5}).plan()["task"]
    changes = task_changes(task)
    assert "max_depth 3 (10)" in changes and "seed 3 (0)" in changes and not any("pooling" in c for c in changes)
    assert "mask_rate 0.5 (0.1)" in changes and not any("mask_rate" in c for c in task_changes(task, data_only=True))


def test_markdown_leaves_names_alone():
    assert escape("a|b *c* <d> e_f") == r"a\|b \*c\* \<d> e_f"


def test_labels_of_lines_do_not_overlap():
    for values in ([10, 11, 12, 50], [99, 100, 100, 100], [100, 3, 99]):
        placed = spread(values, 4.0)
        order = sorted(range(len(values)), key=values.__getitem__)
        assert all(placed[b] - placed[a] >= 4 for a, b in pairwise(order))
        assert max(placed) <= 102


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished cell"):
        load_results(Path(tmp_path))


def without(*path: str) -> Any:
    def damage(made: dict[str, Any]) -> dict[str, Any]:
        inner = made
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return made

    return damage


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda made: [made], "it is no mapping"),
        (lambda made: {"accuracy": 0.5}, "no 'key'"),
        (without("metric"), "no 'metric'"),
        (without("test", "groups"), "no 'test.groups'"),
        (without("pretrain", "metric"), "no 'pretrain.metric'"),
        (without("config", "budget", "data"), "no 'config.budget.data'"),
        (lambda made: {**made, "plan": {"task": {"name": "chess"}}}, "unknown task 'chess'"),
        (lambda made: {**made, "plan": {"task": "chess"}}, "plan.task is no mapping"),
        (lambda made: {**made, "config": 3}, "config is no mapping"),
    ],
)
def test_foreign_results_are_named_in_one_line(tiny, tmp_path, damage, said):
    write([result(tiny(), 0.5)], tmp_path)
    path = tmp_path / "foreign" / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps(damage(result(tiny(regime="finetune"), 0.5))))
    with pytest.raises(ValueError) as caught:
        load_results(tmp_path)
    message = str(caught.value)
    assert str(path) in message and said in message and "delete it and run again" in message and "\n" not in message
