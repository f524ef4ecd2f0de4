"""Cells from the outside: what they leave behind, what they refuse, what they share."""

import csv
import json
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from lra.cell import run_cell
from lra.checkpoints import BEST, LAST
from lra.config import cell_from_dict
from lra.data import data_folder, origin
from lra.evaluate import accuracies, evaluate, grouped, overall
from lra.examples import Examples, Ragged
from lra.folders import finished
from lra.interrupt import TIME_UP, Interrupted, until
from lra.networks import build_net, head_free, load_weights, matched, sizes
from lra.presets import merge
from lra.tasks.base import IGNORED
from lra.tasks.controls import label_accuracy
from lra.trainee import lr_factor


@pytest.fixture
def run(cache_dir, tmp_path):
    def go(cell, runs_dir=tmp_path / "runs", say=lambda line: None):
        return run_cell(cell, runs_dir, cache_dir=cache_dir, accelerator="cpu", say=say), Path(runs_dir) / cell.key

    return go


def test_a_cell_leaves_its_whole_record(tiny, run):
    cell = tiny(regime="finetune")
    result, folder = run(cell)
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == sorted(
        ["config.yaml", "metrics.csv", LAST, BEST, "result.json"]
    )
    assert json.loads((folder / "result.json").read_text()) == result
    assert cell_from_dict(yaml_of(folder / "config.yaml")).key == cell.key

    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12] and cell.steps == 12
    best = max(result["curve"], key=lambda row: row["val_accuracy"])
    assert result["val"]["accuracy"] == best["val_accuracy"] and result["best_step"] == best["step"]
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in result["curve"]]
    assert result["pretrain"]["steps"] + result["steps"] == 20
    assert result["tokens"] > 0 and result["flops"] > result["parameters"]["blocks"] * result["tokens"]
    assert 0 < result["loader_seconds"] < result["seconds"] and result["data"]["fingerprint"]
    assert set(result["test"]["groups"]) == {"length", "depth to evaluate"}
    for group in result["test"]["groups"].values():
        assert sum(b["n"] for b in group) == result["data"]["test"]["rows"] == 40
    assert set(result["test"]["shuffled"]) == {"in order", "1", "8"}
    assert set(result["test"]["windows"]) == {"whole", "8"}
    assert {"majority", "root operator", "exact to depth 1"} <= set(result["reference_lines"])
    assert set(result["versions"]) >= {"python", "torch", "lightning", "linrnn"} and result["threads"] >= 1


def yaml_of(path):
    import yaml

    return yaml.safe_load(path.read_text())


def test_a_computed_cell_returns_at_once(tiny, run, monkeypatch):
    cell = tiny()
    result, _ = run(cell)
    monkeypatch.setattr("lra.cell._compute", lambda *a: pytest.fail("computed again"))
    assert run(cell)[0] == result


def test_the_kept_weights_are_the_best_ones(tiny, run, cache_dir):
    """Scoring best.safetensors again gives the best validation row and the test accuracy of the record."""
    from lra.data import load
    from lra.objectives import classification

    cell = tiny(optim={"lr": 0.03})
    result, folder = run(cell)
    scores = [row["val_accuracy"] for row in result["curve"]]
    assert min(scores) < max(scores) == result["val"]["accuracy"], "a curve that goes up and down, and its top"
    assert result["best_step"] == result["curve"][scores.index(max(scores))]["step"], "the earliest of equals"
    task = cell.build_task()
    net = build_net(cell.model, task, seed=99)
    load_weights(net, folder / BEST, heads=True)
    splits = load(task, cache_dir)
    val, test = (Examples.from_dataset(splits[name], task) for name in ("val", "test"))
    net.train()
    scored = evaluate(net, lambda n, b, g: classification(n, b), val, cell.seed, "accuracy")
    assert net.training, "an evaluation leaves the mode as it was, or dropout would end with the first one"
    assert scored["accuracy"] == result["val"]["accuracy"]
    assert scored["loss"] == pytest.approx(result["val"]["loss"], rel=1e-6)
    assert accuracies(net, test).mean() == result["test"]["accuracy"]


def test_finetuning_starts_from_the_pretrained_body(tiny, run, monkeypatch):
    cell = tiny(regime="finetune")
    _, before = run(cell.pretraining())
    pretrained = head_free(load_file(before / BEST))
    seen = {}

    def spy(net, *args, **kwargs):
        seen.update({name: tensor.clone() for name, tensor in net.state_dict().items()})
        raise KeyboardInterrupt

    monkeypatch.setattr("lra.train.fit", spy)
    with pytest.raises(KeyboardInterrupt):
        run(cell)
    assert pretrained and all(torch.equal(seen[name], tensor) for name, tensor in pretrained.items())
    assert "body.head.weight" in seen and "body.head.weight" not in pretrained


def test_pretraining_reads_training_inputs_alone(tiny, run, monkeypatch):
    """Neither labels nor the test split reach a pretrain cell; the classifier sees the first `labels` rows."""
    real, read = Examples.from_dataset.__func__, []

    def spy(dataset, task, limit=None):
        read.append((len(dataset), limit))
        return real(Examples, dataset, task, limit)

    monkeypatch.setattr(Examples, "from_dataset", spy)
    result, _ = run(tiny(regime="pretrain", budget={"labels": 16}))
    assert read == [(60, 60), (30, None)] and "test" not in result and "reference_lines" not in result
    read.clear()
    result, _ = run(tiny(budget={"labels": 16}))
    assert read == [(60, 16), (30, None), (40, None), (40, 2000)] and result["data"]["train"]["rows"] == 16
    read.clear()
    result, _ = run(tiny(regime="finetune", budget={"labels": 16, "data": 0.5}))
    assert [limit for rows, limit in read if rows == 60] == [30, 16], "a share of the rows bounds pretraining too"


@pytest.mark.parametrize("change", [{"mixer": "attention"}, {"bidirectional": False}, {"pooling": "cls"}])
def test_other_models_pretrain_and_finetune(tiny, run, change):
    result, _ = run(tiny(regime="finetune", model=change))
    assert 0 <= result["test"]["accuracy"] <= 1
    assert result["pooling"] == {"bidirectional": "last", "pooling": "cls"}.get(next(iter(change)), "mean")


def test_a_checkpoint_of_another_model_is_refused(tiny, run, tmp_path):
    cell = tiny(regime="finetune")
    _, pretrained = run(cell.pretraining())
    other = build_net(replace(cell.model, d_model=32), cell.build_task(), denoise="masked", seed=0)
    save_file(other.state_dict(), pretrained / BEST)
    with pytest.raises(ValueError, match=r"best.safetensors is a checkpoint of another model: body.*\(32, .*there"):
        run(cell)
    (pretrained / BEST).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"best.safetensors cannot be read"):
        run(cell)


def test_a_foreign_or_damaged_last_checkpoint_is_refused(tiny, run):
    cell, other = tiny(), tiny(optim={"lr": 0.5}, model={"d_model": 32})
    _, theirs = run(cell)
    ours = theirs.parents[2] / other.key
    ours.mkdir(parents=True)
    shutil.copy(theirs / LAST, ours / LAST)
    with pytest.raises(ValueError, match=r"another run \(model.d_model is 16 there, 32 here; lr is 0.001 there, 0.5"):
        run(other)
    (ours / LAST).write_bytes((theirs / LAST).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"last.ckpt is damaged"):
        run(other)


def test_a_damaged_result_is_named(tiny, run):
    _, folder = run(tiny())
    (folder / "result.json").write_text('{"key": ')
    with pytest.raises(ValueError, match=r"result.json is damaged.*delete it"):
        finished(folder)


def test_a_divergent_run_says_so(tiny, run):
    with pytest.raises(
        FloatingPointError, match=r"training loss is (nan|inf) .*lower the learning rate \(now 1e\+30\)"
    ):
        run(tiny(optim={"lr": 1e30}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "lstm"}, "unknown model.mixer 'lstm'; allowed: .*attention, .*lru"),
        ({"mixer_kwargs": {"r_mean": 1}}, "r_mean"),
        ({"mixer": "nystrom", "bidirectional": False}, "nystrom with its defaults sees both sides"),
        ({"mixer_kwargs": {"bidirectional": True}, "bidirectional": False}, "bidirectional': True} sees both sides"),
        ({"mixer": "attention", "d_model": 18, "mixer_kwargs": {"n_heads": 4}}, "n_heads"),
    ],
)
def test_a_bad_model_is_refused_before_any_data_is_made(tiny, run, monkeypatch, change, message):
    monkeypatch.setattr("lra.cell._data", lambda *a: pytest.fail("made data"))
    with pytest.raises(ValueError, match=message):
        run(tiny(model=change))


@pytest.mark.parametrize("stage", ["result", "checkpoint"])
def test_other_data_are_refused(tiny, run, cache_dir, tmp_path, stage):
    """A finished result, of this cell or of its pretraining, and a checkpoint belong to the data they were made of."""
    cell = tiny(regime="finetune", seed=4, budget={"steps": 4, "evaluations": 1})
    _, folder = run(cell)
    other = tmp_path / "other"
    assert run_cell(cell, tmp_path / "runs", cache_dir=other)["key"] == cell.key, "nothing cached: as it stands"
    assert not other.exists()
    of_cell = data_folder(cell.build_task(), cache_dir)
    shutil.copytree(of_cell, other / of_cell.relative_to(cache_dir))
    manifest = other / of_cell.relative_to(cache_dir) / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["values"]["train"] = "0" * 64
    manifest.write_text(json.dumps(changed))
    old, new = (origin(cell.build_task(), where)["fingerprint"] for where in (cache_dir, other))
    if stage == "checkpoint":
        for path in (folder, folder.parents[2] / cell.pretraining().key):
            (path / "result.json").unlink()
        message = rf"last\.ckpt is a checkpoint of another run \(data fingerprint is '{old}' there, '{new}' here\)"
    else:
        message = rf"result\.json was computed from other data .*fingerprint {old} there, {new} here"
    with pytest.raises(ValueError, match=message) as error:
        run_cell(cell, tmp_path / "runs", cache_dir=other, accelerator="cpu", say=lambda line: None)
    assert "\n" not in str(error.value)
    if stage == "result":
        (folder / "result.json").unlink()
        with pytest.raises(ValueError, match=message):
            run_cell(cell, tmp_path / "runs", cache_dir=other, accelerator="cpu", say=lambda line: None)


def test_a_slice_does_not_wait_beyond_its_end(tiny, run, tmp_path):
    cell = tiny()
    folder = tmp_path / "runs" / cell.key
    folder.mkdir(parents=True)
    said = []
    with FileLock(folder / ".lock"), until(time.monotonic()), pytest.raises(Interrupted, match="another") as stop:
        run(cell, say=said.append)
    assert stop.value.signum == TIME_UP and "waiting" in said[0]


def test_what_a_killed_process_left_is_removed(tiny, run, tmp_path):
    cell = tiny()
    folder = tmp_path / "runs" / cell.key
    folder.mkdir(parents=True)
    (folder / ".last.ckpt.12345.tmp").write_text("half")
    run(cell)
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_before_any_data_is_made(tiny, cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("lra.cell._data", lambda *a: pytest.fail("made data"))
    with pytest.raises(ValueError, match="torch sees no GPU"):
        run_cell(tiny(), tmp_path, cache_dir=cache_dir, accelerator="gpu")


@pytest.mark.gpu
def test_a_gpu_trains_and_resumes(tiny, cache_dir, tmp_path, monkeypatch):
    """On a GPU the pieces fit together; bits are promised on the CPU."""
    cell = tiny(regime="finetune")
    with monkeypatch.context() as patch:
        patch.setattr("lra.cell.write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell, tmp_path, cache_dir=cache_dir, accelerator="gpu")
    result = run_cell(cell, tmp_path, cache_dir=cache_dir, accelerator="gpu")
    assert result["device"] != "cpu" and result["curve"][-1]["step"] == cell.steps


def test_initialisation_is_a_function_of_the_seed(tiny):
    cell = tiny()
    nets = [build_net(cell.model, cell.build_task(), denoise="masked", seed=s).state_dict() for s in (1, 1, 2)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert any(not torch.equal(nets[0][name], nets[2][name]) for name in nets[0])


@pytest.mark.parametrize("mixer", ["griffin", "mamba2"])
def test_matching_finds_widths_between_multiples_of_eight(tiny, mixer):
    cell = tiny(model={"d_model": 64, "n_layers": 2})
    task, other = cell.build_task(), replace(cell.model, mixer=mixer)
    target = sizes(cell.model, task)["total"]
    assert abs(sizes(matched(other, task, target), task)["total"] / target - 1) <= 0.1
    with pytest.raises(ValueError, match=f"no width of {mixer} has 10 parameters within 10%; tried: "):
        matched(other, task, 10)


def test_matched_models_are_within_ten_percent(tiny):
    cell = tiny(model={"d_model": 64, "n_layers": 2})
    target = sizes(replace(cell.model, ffn_expand=3.0), cell.build_task())["total"]
    other = matched(replace(cell.model, mixer="attention"), cell.build_task(), target)
    assert abs(sizes(other, cell.build_task())["total"] - target) <= 0.1 * target


def test_learning_rate_rises_then_stays_or_falls(tiny):
    cell = tiny(optim={"warmup": 0.2})
    factors = [lr_factor(cell, t) for t in range(20)]
    assert factors[:4] == [0.2, 0.4, 0.6, 0.8] and factors[4] == 1 and 0 < factors[19] < 0.02
    assert all(a > b for a, b in pairwise(factors[4:]))
    constant = tiny(optim={"warmup": 0.2, "schedule": "constant"})
    assert [lr_factor(constant, t) for t in range(20)] == [*factors[:4], *[1.0] * 16]


def test_groups_hold_everything_once():
    rng = np.random.default_rng(0)
    lengths, right = rng.integers(1, 30, 200), (rng.random(200) < 0.3).astype(float)
    ones = np.ones(200)
    rows = grouped(right, lengths, ones)
    assert len(rows) == 4 and sum(r["n"] for r in rows) == 200
    assert sum(r["n"] * r["accuracy"] for r in rows) == pytest.approx(right.sum())
    assert all(a["max"] < b["min"] for a, b in pairwise(rows))
    for r in rows:
        inside = (lengths >= r["min"]) & (lengths <= r["max"])
        assert r["accuracy"] == pytest.approx(right[inside].mean())
    assert grouped(right, np.full(200, 7), ones) == [
        {"min": 7, "max": 7, "n": 200, "accuracy": pytest.approx(right.mean())}
    ]
    few = grouped(right, lengths % 6, ones)
    assert [(r["min"], r["max"]) for r in few] == [(v, v) for v in range(6)], "few values have a group each"


def test_labels_count_alike_whatever_row_they_stand_in():
    """A row of a dense task with two labels counts twice one with a single label; one without any, not at all."""
    labels = np.array([3, IGNORED, 1, IGNORED, 2], np.int64)
    rows = Ragged(torch.from_numpy(labels), np.array([0, 3, 4, 5]))
    examples = Examples([rows], rows, pad=0)
    assert examples.counts.tolist() == [2, 0, 1] and examples.asked == 2
    right = np.array([0.5, np.nan, 0.0])
    assert overall(right, examples.counts) == 1 / 3
    assert [b["accuracy"] for b in grouped(right, np.array([5, 5, 9]), examples.counts)] == [0.5, 0]
    assert [b["min"] for b in grouped(right, np.array([5, 7, 9]), examples.counts)] == [5, 9]
    asked = np.array([[3, IGNORED, 1], [2, IGNORED, IGNORED], [IGNORED] * 3])
    assert label_accuracy(np.array([[3, 0, 0], [0] * 3, [0] * 3]), asked) == 1 / 3


def test_merge_is_deep_and_leaves_its_inputs_alone():
    base, over = {"a": {"x": 1, "y": {"z": 1}}, "b": 1}, {"a": {"y": {"w": 2}}, "b": {"c": 3}}
    assert merge(base, over) == {"a": {"x": 1, "y": {"z": 1, "w": 2}}, "b": {"c": 3}}
    assert base == {"a": {"x": 1, "y": {"z": 1}}, "b": 1}
