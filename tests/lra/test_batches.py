"""The batch stream: a function of (seed, step), every row once an epoch, little padding, exact contents."""

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lra.batches import BatchPlan, BatchStream, Tokens, describe, evaluation_batches, stream_seed

PAD = 9


def make_tokens(n: int, longest: int = 12, seed: int = 0) -> tuple[Tokens, list[list[int]]]:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, 9, rng.integers(1, longest + 1)).tolist() for _ in range(n)]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "label": list(range(n))})
    return Tokens.from_dataset(dataset, PAD), rows


def test_batches_hold_their_rows():
    tokens, rows = make_tokens(20)
    picked = np.array([3, 0, 19, 7])
    batch = tokens.batch(picked)
    assert batch.ids.shape[1] == max(len(rows[i]) for i in picked)
    assert batch.labels.tolist() == picked.tolist()
    for ids, mask, i in zip(batch.ids, batch.mask, picked, strict=True):
        assert ids[mask].tolist() == rows[i]
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert (ids[~mask] == PAD).all()


def test_reads_selected_and_limited_rows():
    _, rows = make_tokens(20)
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "label": list(range(20))}).select([5, 2, 11])
    tokens = Tokens.from_dataset(dataset, PAD, limit=2)
    assert len(tokens) == 2 and tokens.labels.tolist() == [5, 2]
    assert [tokens.batch(np.array([i])).ids[0].tolist() for i in range(2)] == [rows[5], rows[2]]
    assert describe(tokens)["tokens"] == len(rows[5]) + len(rows[2])


@given(n=st.integers(1, 200), batch_size=st.integers(1, 40), seed=st.integers(0, 5))
def test_every_epoch_is_a_permutation(n, batch_size, seed):
    plan = BatchPlan(np.arange(n) % 7 + 1, batch_size, seed)
    for epoch in range(3):
        first = epoch * plan.batches_per_epoch
        seen = np.concatenate([plan.rows(first + i) for i in range(plan.batches_per_epoch)])
        assert len(set(seen.tolist())) == len(seen) == plan.batches_per_epoch * min(batch_size, n)
        assert len(seen) > n - min(batch_size, n)


def test_batch_t_depends_on_seed_and_t_alone():
    tokens, _ = make_tokens(50)
    stream, other = BatchStream(tokens, 8, seed=1), BatchStream(tokens, 8, seed=2)
    whole = [b for b, _ in zip(stream, range(30), strict=False)]
    for start in (0, 5, 6, 17):
        later = BatchStream(tokens, 8, seed=1)
        later.start = start
        for batch, same in zip(later, whole[start:], strict=False):
            assert all(torch.equal(a, b) for a, b in zip(batch, same, strict=True))
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
    tokens, _ = make_tokens(100)
    seen = []
    for rows, batch in evaluation_batches(tokens, max_tokens=40):
        assert batch.ids.numel() <= 40 or len(rows) == 1
        seen += rows.tolist()
    assert sorted(seen) == list(range(100))


def test_streams_and_steps_have_their_own_seeds():
    seeds = {stream_seed(s, name, t) for s in range(5) for name in ("noise", "dropout") for t in range(50)}
    assert len(seeds) == 500 and all(0 <= s < 2**63 for s in seeds)


def test_an_empty_split_is_refused():
    with pytest.raises(ValueError, match="empty split"):
        BatchPlan(np.array([]), 4, 0)
