"""Real data: found, checked and read in order, or refused in one line that says what to do."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lra.tasks.sources import SourceError, describe_source, read_source

COLUMNS = {"text": "text", "label": "label"}
TRAIN = {"text": ["a", "b\nc", "é"], "label": [0, 1, 1]}
TEST = {"text": ["x", "y"], "label": [1, 0]}


@dataclass(frozen=True)
class Reviews:
    name: str = "text"
    hub: str | None = "nobody/reviews"
    folders: tuple[str, ...] = ("imdb",)


TASK = Reviews()


def save(path: Path, columns: dict, **types: pa.DataType) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()}), path)
    return path


def read(folder: Path, columns: dict = COLUMNS) -> dict:
    return {name: split[:] for name, split in read_source(TASK, folder, columns).items()}


def refusal(*args) -> str:
    with pytest.raises(SourceError) as caught:
        read_source(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("folder", [".", "text", "imdb", "imdb/plain_text"])
def test_a_folder_of_files(tmp_path, folder):
    save(tmp_path / folder / "train.parquet", TRAIN)
    save(tmp_path / folder / "train-films.parquet", {"film": ["t", "t", "t"]})  # not rows of train
    save(tmp_path / folder / "test-00000-of-00001.parquet", TEST)
    assert read(tmp_path) == {"train": TRAIN, "test": TEST}


def test_shards_in_order_other_columns_ignored_types_unified(tmp_path):
    save(tmp_path / "train-00001-of-00002.parquet", {"label": [1], "extra": [0], "text": ["é"]}, text=pa.large_string())
    save(tmp_path / "train-00000-of-00002.parquet", {"text": ["a", "b\nc"], "label": [0, 1]}, label=pa.uint8())
    save(tmp_path / "test.parquet", TEST)
    assert read(tmp_path) == {"train": TRAIN, "test": TEST}


@pytest.mark.parametrize("shape", ["struct", "binary"])
def test_images_are_their_files(tmp_path, shape):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if shape == "struct" else pa.binary()
    values = [b"\x89PNG1", b"\x89PNG2"]
    cells = [{"bytes": value, "path": None} for value in values] if shape == "struct" else values
    for split in ("train", "test"):
        save(tmp_path / f"{split}.parquet", {"image": cells, "label": [0, 1]}, image=kind)
    assert read(tmp_path, {"img|image": "image"}) == {split: {"img": values} for split in ("train", "test")}


def test_the_hub(monkeypatch):
    def load_dataset(name: str, split: list[str]) -> list[datasets.Dataset]:
        assert name == "nobody/reviews"
        rows = {"train": {**TRAIN, "more": [1, 2, 3]}, "test": TEST}
        features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["neg", "pos"]))
        return [datasets.Dataset.from_dict(rows[s]).cast_column("label", features["label"]) for s in split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert {name: split[:] for name, split in read_source(TASK, None, COLUMNS).items()} == {
        "train": TRAIN,
        "test": TEST,
    }
    assert describe_source(TASK, None) == {"hub": "nobody/reviews"}
    assert "nobody/reviews (train) lacks the column img" in refusal(TASK, None, {"img": "image"})


def test_the_files_are_described(tmp_path):
    paths = [save(tmp_path / "imdb" / f"{split}.parquet", TEST) for split in ("train", "test")]
    files = describe_source(TASK, tmp_path)["files"]
    assert list(files) == ["train.parquet", "test.parquet"]
    for path in paths:
        content = path.read_bytes()
        assert files[path.name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_no_folder_and_no_files(tmp_path):
    assert str(tmp_path / "none") in refusal(TASK, tmp_path / "none", COLUMNS)
    message = refusal(TASK, tmp_path, COLUMNS)
    assert "train*.parquet" in message and str(tmp_path) in message and "text or imdb" in message
    assert "nobody/reviews" in message and "None" not in refusal(Reviews(hub=None), tmp_path, COLUMNS)
    save(tmp_path / "train.parquet", TRAIN)
    assert "holds no test*.parquet" in refusal(TASK, tmp_path, COLUMNS)


@pytest.mark.parametrize(
    "others", [["train-00001-of-00002.parquet"], ["train-00000-of-00001.parquet", "train.parquet"]]
)
def test_half_a_set_of_shards(tmp_path, others):
    for name in (*others, "test.parquet"):
        save(tmp_path / name, TEST)
    message = refusal(TASK, tmp_path, COLUMNS)
    assert others[0] in message and "shards" in message


def test_text_that_is_no_utf8(tmp_path):
    bad = pa.StringArray.from_buffers(1, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"text": bad, "label": [1]}), tmp_path / "train.parquet")
    save(tmp_path / "test.parquet", TEST)
    message = refusal(TASK, tmp_path, COLUMNS)
    assert "train.parquet cannot be read" in message and "UTF8" in message


def test_a_truncated_and_a_changed_file(tmp_path):
    save(tmp_path / "test.parquet", TEST)
    path = save(tmp_path / "train.parquet", TRAIN)
    whole = path.read_bytes()
    for damaged in (whole[:-20], whole[: len(whole) // 2], b"", b"text,label\na,0\n"):
        path.write_bytes(damaged)
        message = refusal(TASK, tmp_path, COLUMNS)
        assert str(path) in message and "fetch it again" in message


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": ["a"], "stars": [1]}, "lacks the column label; its columns are text, stars"),
        ({"text": ["a"], "label": ["neg"]}, "must hold integers; it holds string"),
        ({"text": [1], "label": [1]}, "must hold strings; it holds int64"),
        ({"text": ["a", None], "label": [1, 0]}, "column text of"),
        ({"text": [], "label": []}, "has no rows"),
    ],
)
def test_another_schema(tmp_path, columns, said):
    path = save(
        tmp_path / "test.parquet", columns, **({} if columns["text"] else {"text": pa.string(), "label": pa.int64()})
    )
    save(tmp_path / "train.parquet", TRAIN)
    message = refusal(TASK, tmp_path, COLUMNS)
    assert str(path) in message and said in message
    assert "encoded images" in refusal(TASK, tmp_path, {"text": "image"})


@pytest.mark.parametrize("error", [ConnectionError("cut\noff"), OSError("No space left on device"), RuntimeError("?")])
def test_an_interrupted_download(monkeypatch, error):
    def load_dataset(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(TASK, None, COLUMNS)
    assert " ".join(str(error).split()) in message and "run again" in message and "nobody/reviews" in message


def test_offline(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_sources import TASK, COLUMNS, read_source\n"
        "read_source(TASK, None, COLUMNS)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], env=env, capture_output=True, text=True, timeout=120
    )
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 1 and "SourceError" in last and "--data-dir" in last and "nobody/reviews" in last
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
