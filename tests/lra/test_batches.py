"""The batch stream: a function of (seed, step), every row once an epoch, little padding, exact contents."""

from dataclasses import dataclass
from typing import ClassVar

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lra.batches import BatchPlan, BatchStream, evaluation_batches, stream_seed
from lra.examples import Examples, describe, histogram
from lra.tasks import Ids, Levels, Task
from lra.tasks.base import IGNORED

PAD = 9


@dataclass(frozen=True, kw_only=True)
class Words(Task):
    name: ClassVar[str] = "words"
    inputs: ClassVar[Ids] = Ids(10, pad_id=PAD, mask_id=8)


class Pairs(Words):
    two_inputs: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Tags(Words):
    pooling: str = "none"
    dense: ClassVar[bool] = True


class Colours(Words):
    inputs: ClassVar[Levels] = Levels(3, 100.0, 50.0, "l1")


def make_rows(n: int, longest: int = 12, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 9, rng.integers(1, longest + 1)).tolist() for _ in range(n)]


def make_examples(n: int) -> tuple[Examples, list[list[int]]]:
    rows = make_rows(n)
    return Examples.from_dataset(
        datasets.Dataset.from_dict({"input_ids": rows, "label": list(range(n))}), Words()
    ), rows


def test_batches_hold_their_rows():
    examples, rows = make_examples(20)
    picked = np.array([3, 0, 19, 7])
    ids, mask = (batch := examples.batch(picked)).first
    assert ids.shape[1] == max(len(rows[i]) for i in picked)
    assert batch.labels.tolist() == picked.tolist() and batch.second is None
    for row, real, i in zip(ids, mask, picked, strict=True):
        assert row[real].tolist() == rows[i]
        assert real.tolist() == sorted(real.tolist(), reverse=True)
        assert (row[~real] == PAD).all()
    short = [i for i, row in enumerate(rows) if len(row) <= 5]
    assert examples.batch(np.array(short[:2]), multiple=5).first.inputs.shape[1] == 5
    assert examples.batch(picked, multiple=8).first.inputs.shape[1] == 12, "never beyond the longest row there is"


def test_two_inputs_are_padded_on_their_own():
    a, b = make_rows(5, seed=1), make_rows(5, longest=30, seed=2)
    split = datasets.Dataset.from_dict({"input_ids": a, "input_ids_2": b, "label": [0] * 5})
    examples = Examples.from_dataset(split, Pairs())
    batch = examples.batch(np.array([4, 1]))
    for side, rows in zip(batch.sides, (a, b), strict=True):
        assert [x[m].tolist() for x, m in zip(side.inputs, side.real, strict=True)] == [rows[4], rows[1]]
    assert examples.lengths.tolist() == [len(x) + len(y) for x, y in zip(a, b, strict=True)]
    assert sum(histogram(examples, np.array([1, 0, 0, 0, 2])).values()) == 6


def test_labels_of_positions_are_padded_with_ignored():
    rows = make_rows(6)
    split = datasets.Dataset.from_dict({"input_ids": rows, "labels": [[t % 3 for t in row] for row in rows]})
    batch = Examples.from_dataset(split, Tags()).batch(np.arange(6))
    expected = torch.where(batch.first.real, batch.first.inputs % 3, IGNORED)
    assert torch.equal(batch.labels, expected) and batch.labels.dtype == torch.int64
    assert batch.asked == max(map(len, rows)), "as many as the row with most labels has"


def test_rows_of_one_length_need_no_mask():
    levels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    split = datasets.Dataset.from_dict({"input_ids": levels.reshape(4, 18).tolist(), "label": [0] * 4})
    examples = Examples.from_dataset(split.cast_column("input_ids", datasets.List(datasets.Value("uint8"))), Colours())
    batch = examples.batch(np.array([2, 0]))
    assert batch.first.mask is None and batch.first.real.all()
    assert torch.equal(batch.first.inputs, torch.from_numpy(levels[[2, 0]])) and examples.lengths.tolist() == [6] * 4
    assert examples.batch(np.array([2, 0]), multiple=4).first.mask is None, "nor do they where lengths are rounded up"


def test_the_shares_of_several_processes_are_one_batch():
    examples, _ = make_examples(20)
    rows = np.array([3, 0, 19, 7, 8, 1])
    whole = examples.batch(rows)
    for rank in range(3):
        part = examples.batch(rows, rank, 3)
        assert torch.equal(part.first.inputs, whole.first.inputs[rank::3]) and part.share == (rank, 3)
        assert torch.equal(part.labels, whole.labels[rank::3])


def test_reads_selected_and_limited_rows():
    rows = make_rows(20)
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "label": list(range(20))}).select([5, 2, 11])
    examples = Examples.from_dataset(dataset, Words(), limit=2)
    assert len(examples) == 2 and examples.labels.tolist() == [5, 2]
    assert [examples.batch(np.array([i])).first.inputs[0].tolist() for i in range(2)] == [rows[5], rows[2]]
    assert describe(examples)["tokens"] == len(rows[5]) + len(rows[2])


@pytest.mark.parametrize(("stored", "read"), [("uint8", "uint8"), ("uint16", "int32"), ("int32", "int32")])
def test_rows_in_many_batches_of_a_file_are_copied_once(stored, read, tmp_path, monkeypatch):
    rows = make_rows(2_500)  # saved in batches of 1,000 rows
    features = datasets.Features({"input_ids": datasets.List(datasets.Value(stored)), "label": datasets.Value("uint8")})
    datasets.Dataset.from_dict({"input_ids": rows, "label": [1] * 2_500}, features).save_to_disk(tmp_path / "rows")
    copied = []
    join = np.concatenate
    monkeypatch.setattr("numpy.concatenate", lambda *a, **k: copied.append(join(*a, **k)) or copied[-1])
    side = Examples.from_dataset(datasets.load_from_disk(tmp_path / "rows"), Words()).sides[0]
    assert str(side.flat.dtype) == f"torch.{read}" and side.flat.tolist() == [i for row in rows for i in row]
    assert any(np.shares_memory(side.flat.numpy(), array) for array in copied)
    assert sum(array.nbytes for array in copied if array.dtype == read and len(array) == len(side.flat)) == (
        side.flat.nbytes
    )


@pytest.mark.parametrize("block", [1, 4])
def test_shuffling_moves_whole_blocks_within_a_row(block):
    examples, rows = make_examples(30)
    moved = examples.shuffled(block, np.random.default_rng(0))
    changed = 0
    for i, row in enumerate(rows):
        new, n = moved.batch(np.array([i])).first.inputs[0].tolist(), len(row) // block
        cut = [row[j * block : (j + 1) * block] for j in range(n)]
        assert sorted(new[j * block : (j + 1) * block] for j in range(n)) == sorted(cut)
        assert new[n * block :] == row[n * block :]
        changed += new != row
    assert changed > 5 and moved.lengths.tolist() == examples.lengths.tolist()


@given(n=st.integers(1, 200), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, batch_size, seed):
    plan = BatchPlan(np.arange(n) % 7 + 1, batch_size, seed)
    for epoch in range(3):
        first = epoch * plan.batches_per_epoch
        seen = np.concatenate([plan.rows(first + i) for i in range(plan.batches_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == plan.batches_per_epoch * min(batch_size, n)
        assert len(seen) > n - min(batch_size, n)


@pytest.mark.parametrize("steps", [0, 3, 6, 17])
def test_uses_counts_the_rows_of_the_batches(steps):
    plan = BatchPlan(np.arange(50) % 7 + 1, 8, 0)
    counted = np.zeros(50, dtype=int)
    for step in range(steps):
        counted[plan.rows(step)] += 1
    assert plan.uses(steps).tolist() == counted.tolist()


def test_batch_t_depends_on_seed_and_t_alone():
    examples, _ = make_examples(50)
    stream, other = BatchStream(examples, 8, seed=1), BatchStream(examples, 8, seed=2)
    whole = [b for b, _ in zip(stream, range(30), strict=False)]
    for start in (0, 5, 6, 17):
        later = BatchStream(examples, 8, seed=1)
        later.start = start
        for batch, same in zip(later, whole[start:], strict=False):
            assert torch.equal(batch.first.inputs, same.first.inputs) and torch.equal(batch.labels, same.labels)
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(whole, other, strict=False))
    assert whole[0].labels.tolist() != whole[6].labels.tolist(), "epochs must not repeat the order"


def test_bucketing_saves_padding_and_keeps_batches_mixed():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    plan = BatchPlan(lengths, 16, seed=0)
    batches = [lengths[plan.rows(i)] for i in range(plan.batches_per_epoch)]
    padded = sum(len(b) * b.max() for b in batches)
    assert lengths.sum() / padded > 0.9
    means = np.array([b.mean() for b in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2, "neighbouring batches have unrelated lengths"


def test_evaluation_sees_every_row_once_within_the_token_limit():
    examples, _ = make_examples(100)
    seen = []
    for rows, batch in evaluation_batches(examples, max_tokens=40):
        assert batch.first.inputs.numel() <= 40 or len(rows) == 1
        seen += rows.tolist()
    assert sorted(seen) == list(range(100))


def test_streams_and_steps_have_their_own_seeds():
    seeds = {stream_seed(s, name, t) for s in range(5) for name in ("noise", "dropout") for t in range(50)}
    assert len(seeds) == 500 and all(0 <= s < 2**63 for s in seeds)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="empty split"):
        BatchPlan(np.array([]), 4, 0)
