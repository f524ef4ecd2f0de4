"""Text: encodings that keep every byte or character, and a validation split whose texts are nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lra.tasks import build_task
from lra.tasks.sources import SourceError
from lra.tasks.text import Text
from lra.tasks.text_encoding import Tokens, decode, encode
from lra.tasks.vocabularies import CHARACTERS, END, INPUTS, UNKNOWN

texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=6)


def rows(tokens: Tokens) -> list[list[int]]:
    return tokens.column().to_pylist()


@settings(deadline=None)
@given(texts, st.integers(2, 12))
def test_bytes_one_by_one(texts, n):
    expected = [[byte + 1 for byte in (text or " ").encode()[:n]] for text in texts]
    assert rows(encode(texts, "bytes", n)) == expected


@settings(deadline=None)
@given(texts, st.integers(2, 12))
def test_characters_one_by_one(texts, n):
    ids = {c: i for i, c in enumerate(CHARACTERS, start=4)}
    expected = [[*(ids.get(c, UNKNOWN) for c in (text or " ")[: n - 1]), END] for text in texts]
    assert rows(encode(texts, "characters", n)) == expected


@pytest.mark.parametrize("encoding", ["bytes", "characters"])
def test_decode_inverts_encode(encoding):
    for text in ("It was great.<br /><br />Déjà vu", " ", CHARACTERS):
        assert decode(encode([text], encoding, 1000).tokens.tolist(), encoding) == text
    assert decode(encode(["日"], "characters", 9).tokens, "characters") == "\ufffd"
    assert decode(encode(["a日"], "bytes", 2).tokens, "bytes") == "a\ufffd"  # cut within a character
    for bad in (0, INPUTS[encoding].vocab_size):
        with pytest.raises(ValueError, match=rf"ids must lie in \d+\.\.\d+; got {bad}"):
            decode([bad], encoding)


def test_the_vocabularies():
    assert INPUTS["characters"].vocab_size == 135 and len(set(CHARACTERS)) == 131
    for encoding, inputs in INPUTS.items():
        every = encode(["".join(map(chr, range(1, 0x3000)))], encoding, 10**6).tokens
        assert every.max() < inputs.vocab_size
        assert not np.isin([inputs.pad_id, inputs.mask_id], every).any()
        assert Text(encoding=encoding).inputs == inputs


def reviews(folder: Path, n: int = 50) -> dict[str, list[str]]:
    """n reviews, half of them negative, in a folder as the hub has them; a fifth of those for training stand twice."""
    made = {}
    for split in ("train", "test"):
        texts = [f"{split} review {i % (n - n // 5)}" for i in range(n)]
        labels = [int(i >= n // 2) for i in range(n)]
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet")
        made[split] = texts
    return made


ALL = {"n_train": 45, "n_val": 5, "n_test": 50}  # of 50 reviews a split, which are not the benchmark's


def generate(task: Text, folder: Path) -> dict:
    return {split: data[:] for split, data in task.generate(None, folder).items()}


@pytest.mark.parametrize("encoding", ["bytes", "characters"])
def test_every_review_once_and_validation_apart(tmp_path, encoding):
    source = reviews(tmp_path / "imdb")
    task = Text(encoding=encoding, **ALL)
    splits = generate(task, tmp_path)
    assert [len(splits[s]["label"]) for s in ("train", "val", "test")] == [45, 5, 50]
    assert sorted(splits["train"]["index"] + splits["val"]["index"]) == sorted(splits["test"]["index"]) == [*range(50)]
    seen = {}
    for split, data in splits.items():
        origin = "test" if split == "test" else "train"
        assert set(data["origin"]) == {int(origin == "test")}
        seen[split] = [decode(ids, encoding) for ids in data["input_ids"]]
        assert seen[split] == [source[origin][i] for i in data["index"]]
        assert data["label"] == [int(i >= 25) for i in data["index"]]
        assert data["index"] != sorted(data["index"])  # the source lists the negative reviews first
    assert not set(seen["train"]) & set(seen["val"])
    assert len(set(seen["train"])) < len(seen["train"])


def test_the_seed_decides_the_split_and_a_cap_takes_its_first_rows(tmp_path):
    reviews(tmp_path)
    whole, again, other = (generate(Text(seed=seed, **ALL), tmp_path) for seed in (0, 0, 1))
    assert whole == again and whole["val"]["index"] != other["val"]["index"]
    capped = generate(Text(n_train=7, n_val=2, n_test=3, max_tokens=5), tmp_path)
    for split, n in {"train": 7, "val": 2, "test": 3}.items():
        assert capped[split]["index"] == whole[split]["index"][:n]
        assert capped[split]["input_ids"] == [ids[:5] for ids in whole[split]["input_ids"][:n]]
    with pytest.raises(ValueError, match="n_train must be at most 45 with this source; got 46"):
        Text(**{**ALL, "n_train": 46}).generate(None, tmp_path)


@pytest.mark.parametrize(
    ("caps", "said"),
    [
        (
            {},
            "gives 45 rows for train instead of 22500, 5 rows for val instead of 2500, 50 rows for test instead of "
            r"25000: .* set n_train \(at most 45\), n_val \(at most 5\), n_test \(at most 50\)$",
        ),
        ({"n_train": 9, "n_test": 9}, r"gives 5 rows for val instead of 2500: .* set n_val \(at most 5\)$"),
        ({"n_train": 9, "n_val": 3}, r"gives 50 rows for test instead of 25000: .*"),
    ],
)
def test_reviews_in_other_numbers_are_not_taken_for_the_benchmarks(caps, said, tmp_path):
    reviews(tmp_path / "imdb")
    with pytest.raises(SourceError, match=f"^the source of task 'text' {said}") as error:
        Text(**caps).splits(tmp_path / "cache", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def test_more_reviews_than_the_benchmarks_are_refused(tmp_path, monkeypatch):
    reviews(tmp_path)
    monkeypatch.setattr(Text, "benchmark_rows", {"train": 45, "val": 5, "test": 49})
    with pytest.raises(SourceError, match="gives 50 rows for test instead of 49"):
        Text().generate(None, tmp_path)
    monkeypatch.setattr(Text, "benchmark_rows", {"train": 45, "val": 5, "test": 50})
    assert {split: len(data["label"]) for split, data in generate(Text(), tmp_path).items()} == Text.benchmark_rows


def test_the_cache(tmp_path):
    reviews(tmp_path / "source")
    task = Text(encoding="characters", **ALL)
    made = task.splits(tmp_path / "cache", data_dir=tmp_path / "source")
    cached = task.splits(tmp_path / "cache")  # no source is needed any more
    assert (
        {s: d[:] for s, d in made.items()}
        == {s: d[:] for s, d in cached.items()}
        == generate(task, tmp_path / "source")
    )
    assert cached["train"].features["input_ids"].feature.dtype == "uint8"
    assert list(task.source(tmp_path / "source")["files"]) == ["train.parquet", "test.parquet"]
    assert task.source(None) == {"hub": "stanfordnlp/imdb"}
    assert replace(task, mask_rate=0.5).data_config() == task.data_config() != Text().data_config()


def test_labels_that_are_none(tmp_path):
    reviews(tmp_path)
    pq.write_table(pa.table({"text": ["a", "b"], "label": [0, -1]}), tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="labels must be 0 or 1; that of row 1 of the test reviews is -1"):
        Text().generate(None, tmp_path)
    with pytest.raises(SourceError, match=r"no train\*\.parquet"):
        Text().generate(None, tmp_path.parent / "..")


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("encoding", "words", "bytes, characters"),
        ("max_tokens", 1, "at least 2"),
        ("n_train", 22_501, "from 1 to 22500, or null"),
        ("n_val", 0, "from 1 to 2500"),
        ("n_test", 30_000, "from 1 to 25000"),
    ],
)
def test_bad_options(option, value, allowed):
    with pytest.raises(ValueError, match=rf"{option} must be .*{allowed}.*; got {value!r}"):
        build_task("text", **{option: value})


def test_the_rows_are_known_before_the_data():
    assert build_task("text").rows == {"train": 22_500, "val": 2_500, "test": 25_000}
    assert Text(n_val=20).rows == {"train": 22_500, "val": 20, "test": 25_000}
    assert Text(max_tokens=1000).max_length == 1000
