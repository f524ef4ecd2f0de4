"""Two texts, one question: papers from the user's files, and reviews of one film or of two."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lra.tasks import build_task
from lra.tasks.imdb_pairs import draw_pairs, held_out
from lra.tasks.retrieval import Retrieval
from lra.tasks.retrieval_imdb import RetrievalIMDB
from lra.tasks.sources import SourceError
from lra.tasks.text_encoding import decode

ENCODINGS = ("bytes", "characters")


# Retrieval: the papers


def papers(folder: Path, **lines: list[str]) -> dict[str, list[str]]:
    """Files of a few pairs; `"` and `\\n` written out are part of the texts, as is a space at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for name in ("train", "eval", "test"):
        made[name] = lines.get(name) or [f'{i % 2}.0\tP{i}\tQ{i}\t"{name} {i}\t\\n"two" é ' for i in range(9)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("\n".join(made[name]) + "\n", encoding="utf-8")
    return made


ALL = {"n_train": 9, "n_val": 9, "n_test": 9}  # of the pairs above, which are not the benchmark's


def generate(task, folder: Path | None) -> dict:
    return {split: data[:] for split, data in task.generate(None, folder).items()}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("folder", [".", "tsv_data", "lra_release/lra_release/tsv_data"])
def test_every_pair_of_papers(tmp_path, encoding, folder):
    lines = papers(tmp_path / folder)
    splits = generate(Retrieval(encoding=encoding, **ALL), tmp_path)
    for origin, (split, name) in enumerate({"train": "train", "val": "eval", "test": "test"}.items()):
        data = splits[split]
        assert sorted(data["index"]) == list(range(9)) and data["origin"] == [origin] * 9
        assert data["index"] != list(range(9))
        for i, label, first, second in zip(
            *(data[c] for c in ("index", "label", "input_ids", "input_ids_2")), strict=True
        ):
            texts = [decode(ids, encoding) for ids in (first, second)]
            assert [f"{label}.0", *texts] == [lines[name][i].split("\t")[j] for j in (0, 3, 4)]


def test_papers_are_cut_and_capped(tmp_path):
    papers(tmp_path)
    whole = generate(Retrieval(seed=3, **ALL), tmp_path)
    some = generate(Retrieval(seed=3, max_tokens=4, n_train=5, n_val=1, n_test=9), tmp_path)
    for split, n in {"train": 5, "val": 1, "test": 9}.items():
        assert some[split]["index"] == whole[split]["index"][:n]
        for side in ("input_ids", "input_ids_2"):
            assert some[split][side] == [ids[:4] for ids in whole[split][side][:n]]
    assert whole["train"]["index"] != generate(Retrieval(**ALL), tmp_path)["train"]["index"]
    with pytest.raises(ValueError, match="n_test must be at most 9 with this source; got 10"):
        generate(Retrieval(**{**ALL, "n_test": 10}), tmp_path)


@pytest.mark.parametrize(("split", "n"), [("train", 147_086), ("val", 18_090), ("test", 17_437)])
def test_the_benchmarks_numbers_of_pairs_are_expected(tmp_path, split, n):
    papers(tmp_path)
    uncapped = {name: cap for name, cap in ALL.items() if name != f"n_{split}"}
    said = rf"'retrieval' gives 9 rows for {split} instead of {n}: .* set n_{split} \(at most 9\)$"
    with pytest.raises(SourceError, match=said):
        generate(Retrieval(**uncapped), tmp_path)
    assert Retrieval(n_val=4).rows == {"train": 147_086, "val": 4, "test": 17_437}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1.0\ta\tb\tonly one text", "line 2 of .*new_aan_pairs.eval.tsv must hold 5 fields .*; it holds 4"),
        ("1.0\ta\tb\tone\ttwo\tthree", "it holds 6"),
        ("0.5\ta\tb\tone\ttwo", "label of line 2 of .* must be 0.0 or 1.0; it is b'0.5'"),
        ("label\ta\tb\tone\ttwo", "it is b'label'"),
    ],
)
def test_lines_that_are_no_pairs(tmp_path, line, said):
    papers(tmp_path, eval=["0.0\ta\tb\tc\td", line])
    with pytest.raises(SourceError, match=said):
        generate(Retrieval(**ALL), tmp_path)


def test_lines_that_are_no_text(tmp_path):
    papers(tmp_path)
    (tmp_path / "new_aan_pairs.test.tsv").write_bytes(b"1.0\ta\tb\t\xff\td\n")
    with pytest.raises(SourceError, match=r"line 1 of .*test\.tsv is not UTF-8"):
        generate(Retrieval(**ALL), tmp_path)


def test_no_papers(tmp_path):
    for folder, said in ((None, "it needs --data-dir DIR"), (tmp_path, f"{tmp_path} lacks some of them")):
        with pytest.raises(SourceError, match=r"lra_release\.gz") as error:
            generate(Retrieval(), folder)
        assert said in str(error.value) and "retrieval_imdb" in str(error.value) and "\n" not in str(error.value)


# RetrievalIMDB: the pairs


@st.composite
def films_and_labels(draw):
    films = draw(st.lists(st.integers(0, 12), min_size=30, max_size=80))
    return np.array(films), np.array(draw(st.lists(st.integers(0, 1), min_size=len(films), max_size=len(films))))


@settings(deadline=None, max_examples=40)
@given(films_and_labels(), st.integers(1, 5), st.integers(0, 9))
def test_one_text_alone_and_the_labels_say_nothing(reviews, rounds, seed):
    film, label = reviews
    try:
        first, second, same = draw_pairs(film, label, rounds, seed)
    except ValueError as error:
        assert "pairs" in str(error)
        assume(False)
    assert np.array_equal(film[first] == film[second], same == 1)
    assert len({tuple(sorted(pair)) for pair in zip(first, second, strict=True)}) == len(same)
    sides = np.stack([first, second])
    stands = [np.bincount(sides[:, same == kind].ravel(), minlength=len(film)) for kind in (0, 1)]
    assert np.array_equal(*stands) and stands[0].max() <= rounds
    labels = [np.bincount(label[sides[:, same == kind]].sum(axis=0), minlength=3) for kind in (0, 1)]
    assert np.array_equal(*labels)


@pytest.mark.parametrize("size", [2, 3, 6, 7])
def test_a_tournament_in_which_everybody_meets(size):
    film = np.repeat(np.arange(40), size)
    label = np.zeros(len(film), int)
    first, _, same = draw_pairs(film, label, 99, 0)
    pairs = Counter(film[first[same == 1]])
    assert set(pairs.values()) == {size * (size - 1) // 2} and len(pairs) == 40
    one_round = draw_pairs(film, label, 1, 0)
    assert (one_round[2] == 1).sum() == 40 * (size // 2)


def test_the_order_of_a_pair_is_random():
    film = np.arange(4000) // 4
    label = np.arange(4000) % 2
    first, second, same = draw_pairs(film, label, 3, 0)
    for kind in (0, 1):
        mixed = (same == kind) & (label[first] != label[second])
        assert mixed.sum() > 1000
        assert abs(label[first[mixed]].mean() - 0.5) < 5 * 0.5 / np.sqrt(mixed.sum())
    assert abs(same[:1000].mean() - 0.5) < 5 * 0.5 / np.sqrt(1000)


def test_pairs_that_cannot_be_drawn():
    with pytest.raises(ValueError, match="one film has too many of the reviews"):
        draw_pairs(np.zeros(10, int), np.zeros(10, int), 2, 0)
    with pytest.raises(ValueError, match="no two reviews"):
        draw_pairs(np.arange(10), np.zeros(10, int), 2, 0)


def test_whole_films_are_held_out():
    film = np.random.default_rng(0).integers(0, 50, 1000)
    held = held_out(film, 0)
    assert not set(film[held]) & set(film[~held])
    assert 100 <= held.sum() < 100 + np.bincount(film).max()
    assert not np.array_equal(held, held_out(film, 1))


# RetrievalIMDB: the task


def reviews(folder: Path) -> dict[str, tuple[list[str], list[str], list[int]]]:
    """Reviews of 80 films a split, one of them in both; some texts stand twice."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for split in ("train", "test"):
        films = [f"tt{split if i // 6 else 'both'}{i // 6}" for i in range(480)]
        texts = [f"{split}: of {film}, the {i}th" for i, film in enumerate(films)]
        texts[17], texts[40] = texts[50], "in both splits"
        labels = [i % 2 for i in range(480)]
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / f"{split}.parquet")
        pq.write_table(pa.table({"film": films}), folder / f"{split}-films.parquet")
        made[split] = texts, films, labels
    return made


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_films_and_texts_are_in_one_split(tmp_path, encoding):
    source = reviews(tmp_path / "imdb")
    splits = generate(RetrievalIMDB(encoding=encoding), tmp_path)
    films, texts = {}, {}
    for split, data in splits.items():
        origin = "test" if split == "test" else "train"
        assert set(data["origin"]) == {int(origin == "test")}
        text, film, _ = source[origin]
        for side, index in (("input_ids", "index"), ("input_ids_2", "index_2")):
            assert [decode(ids, encoding) for ids in data[side]] == [text[i] for i in data[index]]
        pairs = list(zip(data["index"], data["index_2"], strict=True))
        assert data["label"] == [int(film[i] == film[j]) for i, j in pairs]
        assert sum(data["label"]) * 2 == len(pairs) > 0
        films[split] = {film[i] for pair in pairs for i in pair}
        texts[split] = {text[i] for pair in pairs for i in pair}
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not films[one] & films[two] and not texts[one] & texts[two]
    assert len(films["val"]) >= 2 and "ttboth0" not in films["test"]
    stands = Counter(splits["train"]["index"] + splits["train"]["index_2"])
    assert max(stands.values()) == 2 * 4
    assert max(Counter(splits["test"]["index"] + splits["test"]["index_2"]).values()) == 2


def test_the_seed_and_the_caps(tmp_path):
    reviews(tmp_path)
    whole, again, other = (generate(RetrievalIMDB(seed=seed), tmp_path) for seed in (0, 0, 1))
    assert whole == again != other
    some = generate(RetrievalIMDB(n_train=5, n_val=2, n_test=3, max_tokens=6), tmp_path)
    for split, n in {"train": 5, "val": 2, "test": 3}.items():
        assert [some[split][c] for c in ("index", "index_2", "label")] == [
            whole[split][c][:n] for c in ("index", "index_2", "label")
        ]
        assert some[split]["input_ids_2"] == [ids[:6] for ids in whole[split]["input_ids_2"][:n]]
    fewer = generate(RetrievalIMDB(rounds=1), tmp_path)
    assert len(fewer["train"]["label"]) < len(whole["train"]["label"]) and fewer["test"] == whole["test"]


def test_the_cache(tmp_path):
    reviews(tmp_path / "source")
    task = RetrievalIMDB()
    task.splits(tmp_path / "cache", data_dir=tmp_path / "source")
    cached = task.splits(tmp_path / "cache")
    assert {split: data[:] for split, data in cached.items()} == generate(task, tmp_path / "source")
    assert cached["val"].features["input_ids_2"].feature.dtype == "uint8"
    files = task.source(tmp_path / "source")["files"]
    assert list(files) == ["train.parquet", "test.parquet", "train-films.parquet", "test-films.parquet"]


def test_no_films(tmp_path):
    with pytest.raises(SourceError, match=r"needs --data-dir DIR.*train-films\.parquet.*hub's copy"):
        RetrievalIMDB().generate(None, None)
    reviews(tmp_path)
    films = tmp_path / "test-films.parquet"
    pq.write_table(pa.table({"film": ["tt1"] * 479}), films)
    with pytest.raises(SourceError, match=f"{films} must have a row for each of the 480 reviews; it has 479"):
        RetrievalIMDB().generate(None, tmp_path)
    pq.write_table(pa.table({"movie": ["tt1"] * 480}), films)
    with pytest.raises(SourceError, match="lacks the column film; its columns are movie"):
        RetrievalIMDB().generate(None, tmp_path)
    films.unlink()
    with pytest.raises(SourceError, match=f"there is no {films}"):
        RetrievalIMDB().generate(None, tmp_path)


@pytest.mark.parametrize("task", ["retrieval", "retrieval_imdb"])
@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [("encoding", "words", "bytes, characters"), ("max_tokens", 1, "at least 2"), ("n_val", 0, "at least 1, or null")],
)
def test_bad_options(task, option, value, allowed):
    with pytest.raises(ValueError, match=rf"{option} must be .*{allowed}.*; got {value!r}"):
        build_task(task, **{option: value})


def test_bad_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 1; got 0"):
        RetrievalIMDB(rounds=0)
