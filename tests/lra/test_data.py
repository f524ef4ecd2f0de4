"""The cache of data sets: made once, whole or absent, checked on every load."""

import hashlib
import json
import subprocess
import sys
import threading
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lra.data import CacheError, _values_sha256, data_folder, data_key, default_cache_dir, load, origin
from lra.tasks import TASKS, ListOps, build_task
from lra.tasks.in_memory import in_memory

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


FEW = {"n_train": 12, "n_val": 4, "n_test": 8}
GENERATED = {
    "listops": {**FEW, "max_depth": 3, "max_args": 4, "min_length": 4, "max_tree_length": 30},
    "digits": FEW,
    "pathfinder": {"n_images": 10},
    "pathx": {"n_images": 10},
    "pathx256": {"n_images": 10},
    "mqar": {**FEW, "vocab": 12, "length": 16, "n_pairs": 3},
    "selective_copying": {**FEW, "context": 20, "n_tokens": 3},
    "induction_heads": {**FEW, "length": 9, "test_lengths": (8, 20)},
    "permutations": {**FEW, "min_train_length": 5, "max_train_length": 9, "test_lengths": (5, 20)},
    "parity": {**FEW, "min_train_length": 9, "max_train_length": 12, "test_lengths": (12, 20)},
    "delayed_xor": {**FEW, "length": 30, "distance": 4},
}
FROM_FILES = {"image", "scifar", "smnist", "psmnist", "text", "retrieval", "retrieval_imdb"}


def test_every_task_is_here_or_reads_files():
    assert set(TASKS) == {*GENERATED, *FROM_FILES}


@pytest.mark.parametrize("name", GENERATED)
def test_every_generated_task_comes_back_from_the_cache(name, tmp_path):
    task = build_task(name, **GENERATED[name])
    made, cached = load(task, tmp_path), load(task, tmp_path)
    assert contents(made) == contents(cached) == contents(task.generate(1, None))
    assert origin(task, tmp_path)["fingerprint"]
    config = task.data_config()
    assert config == json.loads(json.dumps(config)), "a manifest gives back what JSON has: lists, no tuples"
    assert data_key(task) == data_key(build_task(name, **{k: v for k, v in config.items() if k in GENERATED[name]}))


def test_fingerprints_tell_where_rows_end_and_not_how_they_are_stored():
    def rows(*parts):
        chunks = [pa.array(part, pa.list_(pa.uint8())) for part in parts]
        return _values_sha256(in_memory(pa.table({"input_ids": pa.chunked_array(chunks)})))

    assert rows([[1, 2], [3]]) != rows([[1], [2, 3]]) != rows([[1, 2, 3], []])
    assert rows([[1, 2], [3]]) == rows([[1, 2]], [[3]]) == rows([], [[1, 2], [3]])


def reviews(folder, n, word="it"):
    folder.mkdir(exist_ok=True)
    table = pa.table({"text": [f"{word} {i}" for i in range(n)], "label": [i % 2 for i in range(n)]})
    for split in ("train", "test"):
        pq.write_table(table, folder / f"{split}.parquet")
    return folder


def test_cached_data_of_another_source_are_said_to_be(tmp_path, monkeypatch):
    task = build_task("text", n_train=9, n_val=1, n_test=5)
    first, second = reviews(tmp_path / "first", 40), reviews(tmp_path / "second", 50)
    cache = tmp_path / "cache"
    made = contents(load(task, cache, data_dir=first))
    (tmp_path / "nothing").mkdir()

    def no_hash(*args):
        raise AssertionError("a folder of gigabytes must not be read to compare")

    with monkeypatch.context() as patch:
        patch.setattr("lra.tasks.sources.hashlib.file_digest", no_hash)
        patch.setattr("lra.data._sha256", lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        for quiet in (None, first, tmp_path / "nothing"):
            load(task, cache, data_dir=quiet)
        with pytest.warns(UserWarning, match=r"train\.parquet \([\d,]+ bytes\).*lra data text --force") as warned:
            assert contents(load(task, cache, data_dir=second)) == made
        sizes = [f"{(folder / 'train.parquet').stat().st_size:,} bytes" for folder in (first, second)]
        assert len(warned) == 1 and sizes[0] != sizes[1] and all(size in str(warned[0].message) for size in sizes)
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a cache that is only read is compared as well
    with pytest.warns(UserWarning, match="were made of"):
        load(task, cache, data_dir=second)


def test_forced_data_are_of_the_folder_given(tmp_path):
    task = build_task("text", n_train=9, n_val=1, n_test=5)
    first, second = reviews(tmp_path / "first", 40), reviews(tmp_path / "second", 40, "another")
    old = contents(load(task, tmp_path / "cache", data_dir=first))
    assert contents(load(task, tmp_path / "cache", data_dir=second, force=True)) != old
    load(task, tmp_path / "cache", data_dir=second)


def test_data_cached_before_sources_were_recorded_are_not_compared(tmp_path):
    task = build_task("text", n_train=9, n_val=1, n_test=5)
    load(task, tmp_path / "cache", data_dir=reviews(tmp_path / "first", 40))
    path = data_folder(task, tmp_path / "cache") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["source"]
    path.write_text(json.dumps(manifest))
    load(task, tmp_path / "cache", data_dir=reviews(tmp_path / "second", 50))


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
