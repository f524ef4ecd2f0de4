"""Reports from results written by hand: what is grouped, averaged, compared, and what stays apart."""

import copy
import csv
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lra.config import Cell
from lra.plot import spread
from lra.quick import NAMES, change, introduction, ladder, quick_cells, reading, run_quick
from lra.report import show_report, write_report
from lra.results import highest_line, load_results, sections, task_changes

LINES = {"majority": 0.17, "root operator": 0.37, "exact to depth 1": 0.57, "exact to depth 2": 0.73}
COST = {"steps": 10, "tokens": 1000, "flops": 1e12, "seconds": 5.0}
CURVE = [{"step": 5, "train_loss": 2.0, "train_accuracy": 0.1, "val_loss": 2.0, "val_accuracy": 0.2}]


def result(cell: Cell, accuracy: float) -> dict[str, Any]:
    """A result as `run_cell` writes it, with chosen accuracy."""
    made = {
        "key": cell.key,
        "config": cell.to_dict(),
        "plan": cell.plan(),
        "parameters": {"total": 1234, "blocks": 1000},
        **COST,
        "best_step": 5,
        "val": {"loss": 1.0, "accuracy": accuracy - 0.01},
        "data": {"train": {"rows": cell.budget.labels or 60}, "test": {"rows": 2000}},
        "device": "cpu",
        "versions": {"torch": "2"},
        "commit": None,
        "curve": CURVE,
        "test": {
            "accuracy": accuracy,
            "by_length": [
                {"min": 4, "max": 9, "n": 1000, "accuracy": accuracy + 0.1},
                {"min": 10, "max": 23, "n": 1000, "accuracy": accuracy - 0.1},
            ],
        },
        "reference_lines": LINES,
    }
    if cell.regime == "finetune":
        made["pretrain"] = {"key": "p", "steps": 40, "tokens": 4000, "flops": 4e12, "seconds": 20.0, "curve": CURVE}
        made["pretrain"]["val"] = {"accuracy": 0.5}
    return copy.deepcopy(made)


@pytest.fixture
def folder(tiny, tmp_path):
    """LRU and attention, scratch and finetuned, three seeds; one causal cell; one pretrain cell, which has no test."""
    cells = [
        (tiny(regime=regime, seed=seed, model={"mixer": mixer}), base + 0.01 * seed)
        for mixer, regime, base in [
            ("lru", "scratch", 0.40),
            ("lru", "finetune", 0.60),
            ("attention", "scratch", 0.20),
            ("attention", "finetune", 0.36),
        ]
        for seed in range(3)
    ]
    cells.append((tiny(model={"bidirectional": False}), 0.30))
    for cell, accuracy in cells:
        path = tmp_path / "runs" / cell.key / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(result(cell, accuracy)))
    pretraining = result(tiny(regime="pretrain"), 0.9)
    del pretraining["test"], pretraining["reference_lines"]
    path = tmp_path / "runs" / "p" / "result.json"
    path.parent.mkdir()
    path.write_text(json.dumps(pretraining))
    return tmp_path / "runs"


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
    assert groups[0].by_length() == [("4 to 9", pytest.approx(0.51)), ("10 to 23", pytest.approx(0.31))]
    assert found[1].groups[0].std is None


def test_settings_that_differ_are_groups_and_columns(tiny):
    cells = [tiny(), tiny(seed=1), tiny(optim={"lr": 0.5}), tiny(budget={"labels": 16})]
    # what a run from scratch does not read makes no second group
    cells += [tiny(seed=2, optim={"pretrain_lr": 0.1}, budget={"pretrain_share": 0.1, "checkpoint_every": 9})]
    (section,) = sections([result(cell, 0.5) for cell in cells])
    assert [len(g.results) for g in section.groups] == [3, 1, 1]
    varying = section.varying()
    assert {name: {get(g) for g in section.groups} for name, get in varying.items()} == {
        "lr": {"0.001", "0.5"},
        "labels": {"60", "16"},
    }


def test_report_files_say_what_the_results_say(folder, tmp_path, capsys):
    show_report(load_results(folder))
    paths = write_report(load_results(folder), tmp_path / "out")
    assert [p.name for p in paths] == ["report.md", "report.csv", "report.png"]
    text = paths[0].read_text()
    assert text.index("## listops, bidirectional") < text.index("## listops, causal")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, lru = rows[0], next(row for row in rows if row[:2] == ["lru", "masked + finetune"])
    named = dict(zip(header, lru, strict=True))
    assert named["accuracy %"] == "61.0" and named["std"] == "1.0" and named["seeds"] == "3"
    assert named["reaches"] == "exact to depth 1" and named["steps"] == "40 + 10" and named["seconds"] == "20 + 5"
    assert ["(root operator)", "", "37.0"] == [next(r for r in rows if r[0] == "(root operator)")[i] for i in (0, 1, 2)]
    assert "max_depth 3 (10)" in text and "2,000 test sequences" in text

    table = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert len(table) == 13, "one line per classification cell"
    lru = [float(r["test_accuracy"]) for r in table if r["model"] == "lru" and r["regime"] == "finetune"]
    assert statistics.fmean(lru) == pytest.approx(0.61)
    assert {r["direction"] for r in table} == {"bidirectional", "causal"}

    assert paths[2].read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "61.0" in out and "causal" in out and "4 to 9" in out
    assert max(map(len, out.splitlines())) <= 120


def test_reports_read_and_never_write_results(folder, tmp_path):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    write_report(load_results(folder), tmp_path / "out")
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_highest_line_reached():
    assert highest_line(0.1, LINES) == "none"
    assert highest_line(0.37, LINES) == "root operator"
    assert highest_line(0.99, LINES) == "exact to depth 2"


def test_task_changes_name_value_and_default(tiny):
    changes = task_changes(tiny(task={"seed": 3}).plan()["task"])
    assert "max_depth 3 (10)" in changes and "seed 3 (0)" in changes and not any("pooling" in c for c in changes)


def test_labels_of_lines_do_not_overlap():
    for values in ([10, 11, 12, 50], [99, 100, 100, 100], [100, 3, 99]):
        placed = spread(values, 4.0)
        order = sorted(range(len(values)), key=values.__getitem__)
        assert all(placed[b] - placed[a] >= 4 for a, b in pairwise(order))
        assert max(placed) <= 102


def accuracies(tiny, lru, attention):
    cells = quick_like(tiny)
    values = dict(zip(cells, [*lru, *attention], strict=True))
    return {name: result(cell, values[name]) for name, cell in cells.items()}


def quick_like(tiny):
    return {(m, r): tiny(regime=r, model={"mixer": m}) for m in NAMES for r in ("scratch", "finetune")}


def test_the_reading_follows_the_numbers(tiny):
    text = reading(accuracies(tiny, (0.50, 0.60), (0.40, 0.41)))
    assert "Best here is LRU, pretrained, with 60.0 %" in text and "exact to depth 1" in text
    assert "Pretraining adds 10.0 points (noise 3.1) to the LRU" in text
    assert "makes no clear difference (+1.0 points, noise 3.1) to the Transformer" in text
    assert "No cell is clearly above" not in text and "One seed" in text
    text = reading(accuracies(tiny, (0.37, 0.30), (0.36, 0.38)))
    assert "Best here is Transformer, pretrained, with 38.0 %" in text
    assert "costs 7.0 points" in text and "No cell is clearly above reading the root operator" in text


def test_change_is_symmetric_and_knows_its_noise():
    assert change(0.5, 0.6, 2000).startswith("adds 10.0") and change(0.6, 0.5, 2000).startswith("costs 10.0")
    assert "no clear difference" in change(0.5, 0.6, 50)


def test_the_ladder_sorts_rules_and_cells(tiny):
    lines = ladder(accuracies(tiny, (0.50, 0.60), (0.40, 0.30)))[1:]
    values = [float(line.split("%")[0]) for line in lines]
    assert values == sorted(values, reverse=True) and len(lines) == 8
    assert any("LRU, pretrained" in line and "60.0" in line for line in lines)


def test_quick_cells_are_a_fair_comparison():
    cells = quick_cells(steps=None, seed=4)
    assert set(cells) == {(m, r) for m in NAMES for r in ("scratch", "finetune")}
    totals = {c.steps + (c.pretraining().steps if regime == "finetune" else 0) for (_, regime), c in cells.items()}
    assert len(totals) == 1 and {c.seed for c in cells.values()} == {4}
    assert len({json.dumps(c.plan()["optim"]) for c in cells.values()}) == 1
    text = "\n".join(introduction(cells))
    changes = task_changes(next(iter(cells.values())).plan()["task"])
    assert changes and all(change in text for change in changes)
    from lra.networks import sizes

    task = cells["lru", "scratch"].build_task()
    lru, attention = (sizes(cells[m, "scratch"].model, task)["total"] for m in NAMES)
    assert abs(lru - attention) <= 0.1 * lru and f"LRU {lru:,} and Transformer {attention:,}" in text


def test_quick_runs_and_returns_at_once(tmp_path, cache_dir, capsys, monkeypatch, tiny_yaml):
    monkeypatch.setattr("lra.quick.PRESET", tiny_yaml)
    first = run_quick(tmp_path / "q", steps=4, seed=1, cache_dir=cache_dir)
    out = capsys.readouterr().out
    assert "pretrained" in out and "Transformer" in out and "One seed" in out and "root operator" in out
    assert {p.name for p in (tmp_path / "q").iterdir() if p.is_file()} == {"report.md", "report.csv", "report.png"}
    again = run_quick(tmp_path / "q", steps=4, seed=1, cache_dir=cache_dir)
    assert again == first and "starting" not in capsys.readouterr().out


def test_quick_reports_its_own_cells_alone(tmp_path, cache_dir, capsys, monkeypatch, tiny_yaml):
    """Another --steps in the same folder makes other cells; the report of a quick run must not mix them."""
    monkeypatch.setattr("lra.quick.PRESET", tiny_yaml)
    for steps in (4, 6):
        run_quick(tmp_path / "q", steps=steps, cache_dir=cache_dir)
    rows = list(csv.DictReader((tmp_path / "q" / "report.csv").read_text().splitlines()))
    assert len(rows) == 4 and {int(r["steps"]) + int(r["steps_pretrain"]) for r in rows} == {6}


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished cell"):
        load_results(Path(tmp_path))
