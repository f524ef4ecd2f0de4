"""`lra quick`: four fair cells, a reading that follows the numbers, a report of its own cells alone."""

import csv
import json

from lra.quick import NAMES, change, introduction, ladder, quick_cells, reading, run_quick
from lra.results import task_changes

from .fake_results import result


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
    names = {p.name for p in (tmp_path / "q").iterdir() if p.is_file()}
    assert {"report.md", "report.html", "report.csv", "report.png"} <= names
    again = run_quick(tmp_path / "q", steps=4, seed=1, cache_dir=cache_dir)
    assert again == first and "starting" not in capsys.readouterr().out


def test_quick_reports_its_own_cells_alone(tmp_path, cache_dir, capsys, monkeypatch, tiny_yaml):
    """Another --steps in the same folder makes other cells; the report of a quick run must not mix them."""
    monkeypatch.setattr("lra.quick.PRESET", tiny_yaml)
    for steps in (4, 6):
        run_quick(tmp_path / "q", steps=steps, cache_dir=cache_dir)
    rows = list(csv.DictReader((tmp_path / "q" / "report.csv").read_text().splitlines()))
    assert len(rows) == 4 and {int(r["steps"]) + int(r["steps_pretrain"]) for r in rows} == {6}
