"""The cache of data sets: made once, whole or absent, checked on every load."""

import json
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from lra.data import CacheError, data_folder, default_cache_dir, load
from lra.tasks import ListOps

TASK = ListOps(n_train=40, n_val=8, n_test=8, max_depth=3, max_args=4, min_length=4, max_tree_length=30)


def contents(splits):
    return {name: split[:] for name, split in splits.items()}


def leftovers(cache):
    return sorted(path.name for path in (cache / TASK.name).iterdir() if not path.name.endswith(".lock"))


@pytest.fixture
def calls(monkeypatch):
    """Counts the generations."""
    made = []
    generate = ListOps.generate
    monkeypatch.setattr(ListOps, "generate", lambda self, *args: made.append(self) or generate(self, *args))
    return made


def test_made_once(tmp_path, calls):
    first = load(TASK, tmp_path)
    assert contents(first) == contents(TASK.generate(1))
    assert contents(load(TASK, tmp_path)) == contents(first) == contents(TASK.splits(tmp_path))
    assert len(calls) == 2  # the first load and the line that compares
    assert leftovers(tmp_path) == [data_folder(TASK, tmp_path).name]


def test_the_columns_keep_their_types(tmp_path):
    features = load(TASK, tmp_path)["train"].features
    assert features["input_ids"].feature.dtype == features["label"].dtype == "uint8"
    assert features == TASK.generate(1)["train"].features


def test_the_manifest_does_not_depend_on_workers(tmp_path):
    manifests = []
    for workers in (1, 3):
        load(TASK, tmp_path / str(workers), workers)
        manifests.append(json.loads((data_folder(TASK, tmp_path / str(workers)) / "manifest.json").read_text()))
    assert manifests[0] == manifests[1]
    assert manifests[0]["rows"] == {"train": 40, "val": 8, "test": 8}
    assert manifests[0]["config"] == TASK.data_config()
    assert len(set(manifests[0]["values"].values())) == 3


def test_only_what_decides_the_data_is_in_the_key(tmp_path):
    assert data_folder(replace(TASK, mask_rate=0.5, pooling="max"), tmp_path) == data_folder(TASK, tmp_path)
    others = [replace(TASK, **change) for change in ({"seed": 1}, {"n_train": 41}, {"p_operator": 0.3})]
    assert len({data_folder(task, tmp_path) for task in (TASK, *others)}) == 4


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LRA_CACHE", str(tmp_path / "a"))
    assert default_cache_dir() == tmp_path / "a"
    assert data_folder(TASK).parent == tmp_path / "a" / "listops"
    monkeypatch.delenv("LRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache_dir() == tmp_path / "b" / "lra"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_cache_dir() == tmp_path / "c" / ".cache" / "lra"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("train/data-00000-of-00001.arrow", flip, "has changed since it was written"),
        ("val/data-00000-of-00001.arrow", truncate, "has changed since it was written"),
        ("test/data-00000-of-00001.arrow", lambda path: path.unlink(), "is missing"),
        ("train/state.json", lambda path: path.write_text("{}"), "has changed since it was written"),
        ("train/dataset_info.json", lambda path: path.unlink(), "is missing"),
        ("manifest.json", lambda path: path.unlink(), "is missing"),
        ("manifest.json", truncate, "cannot be read as a manifest"),
        ("manifest.json", lambda path: path.write_text("[]"), "cannot be read as a manifest"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read as a manifest"),
        ("manifest.json", lambda path: path.write_text('{"config": {}, "files": {}}'), "describes another data set"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, damage, message):
    good = contents(load(TASK, tmp_path))
    path = data_folder(TASK, tmp_path) / name
    damage(path)
    with pytest.raises(CacheError) as error:
        load(TASK, tmp_path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "run `lra data listops --force`" in str(error.value) and f"delete {data_folder(TASK, tmp_path)}" in str(
        error.value
    )
    assert contents(load(TASK, tmp_path, force=True)) == good == contents(load(TASK, tmp_path))


def test_a_manifest_without_checksums_is_refused(tmp_path):
    load(TASK, tmp_path)
    path = data_folder(TASK, tmp_path) / "manifest.json"
    path.write_text(json.dumps({"config": TASK.data_config(), "files": {}}))
    with pytest.raises(CacheError, match=r"manifest\.json lacks a part"):
        load(TASK, tmp_path)


def test_force_leaves_open_data_readable(tmp_path, calls):
    before = load(TASK, tmp_path)
    after = load(TASK, tmp_path, force=True)
    assert len(calls) == 2
    assert contents(before) == contents(after)
    assert leftovers(tmp_path) == [data_folder(TASK, tmp_path).name]


@pytest.mark.parametrize("place", ["lra.tasks.listops.ListOps.generate", "datasets.Dataset.save_to_disk"])
def test_an_interrupted_generation_leaves_nothing(tmp_path, monkeypatch, place):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(TASK, tmp_path)
    assert leftovers(tmp_path) == []
    good = contents(load(TASK, tmp_path))

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(TASK, tmp_path, force=True)
    assert contents(load(TASK, tmp_path)) == good


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = data_folder(TASK, tmp_path)
    (folder.parent / f"{folder.name}.tmp-killed" / "new" / "train").mkdir(parents=True)
    load(TASK, tmp_path)
    assert leftovers(tmp_path) == [folder.name]


def test_threads_make_it_once(tmp_path, calls):
    results = []
    threads = [threading.Thread(target=lambda: results.append(contents(load(TASK, tmp_path)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(results) == 4 and all(result == results[0] for result in results)


def test_processes_do_not_disturb_each_other(tmp_path):
    code = f"from lra.tasks import ListOps; from lra.data import load; load({TASK!r}, {str(tmp_path)!r}, force=True)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    load(TASK, tmp_path)
    assert leftovers(tmp_path) == [data_folder(TASK, tmp_path).name]


def test_a_read_only_cache_is_read(tmp_path, monkeypatch):
    good = contents(load(TASK, tmp_path))
    lock = data_folder(TASK, tmp_path).with_name(data_folder(TASK, tmp_path).name + ".lock")
    lock.unlink()
    monkeypatch.setattr("os.access", lambda path, mode: False)  # as root every folder is writable
    assert contents(load(TASK, tmp_path)) == good
    assert not lock.exists()


def test_impossible_tasks_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"only \d+ distinct trees were found"):
        load(replace(TASK, max_depth=2, max_args=2, min_length=1, max_tree_length=5, n_train=500), tmp_path)
    assert leftovers(tmp_path) == []
