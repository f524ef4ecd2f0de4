"""Control tasks against solvers that read the definition off one sequence at a time."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from lra.data import load
from lra.presets import read
from lra.tasks import TASKS, build_task
from lra.tasks.base import IGNORED
from lra.tasks.controls import Control, choose

SMALL = {"n_train": 400, "n_val": 60, "n_test": 91}
CASES = {
    "mqar": ("mqar", {"vocab": 40, "length": 64, "n_pairs": 5}),
    "mqar full": ("mqar", {"vocab": 12, "length": 24, "n_pairs": 6}),
    "mqar filled": ("mqar", {"vocab": 14, "length": 30, "n_pairs": 5, "random_filler": True}),
    "mqar wide": ("mqar", {"vocab": 3000, "length": 64, "n_pairs": 16}),
    "copying": ("selective_copying", {"context": 63, "n_tokens": 7}),
    "copying dense": ("selective_copying", {"context": 16, "n_tokens": 16, "vocab": 5}),
    "induction": ("induction_heads", {"length": 33, "test_lengths": (4, 20, 100)}),
    "S5": ("permutations", {"min_train_length": 3, "max_train_length": 30, "test_lengths": (30, 63)}),
    "S4 swaps": (
        "permutations",
        {"n": 4, "generators": "transpositions", "max_train_length": 44, "test_lengths": (100,)},
    ),
    "S6 neighbours": (
        "permutations",
        {"n": 6, "generators": "adjacent", "max_train_length": 44, "test_lengths": (20,)},
    ),
    "S3 two": ("permutations", {"n": 3, "generators": "two", "max_train_length": 44, "test_lengths": (20,)}),
    "parity": ("parity", {"min_train_length": 8, "max_train_length": 40, "test_lengths": (11, 63)}),
    "modulo 5": ("parity", {"modulus": 5, "min_train_length": 7, "max_train_length": 9, "test_lengths": (6, 63)}),
    "xor": ("delayed_xor", {"length": 63, "distance": 20}),
    "xor local": ("delayed_xor", {"length": 63, "distance": 20, "local": True}),
}


def solve_mqar(task, ids, row):
    first_value = 3 + task.vocab // 2
    pairs, labels = {}, []
    for t, token in enumerate(ids):
        if t < 2 * task.n_pairs and t % 2 == 0:
            assert 3 <= token < first_value <= ids[t + 1] < 3 + task.vocab
            assert token not in pairs and ids[t + 1] not in pairs.values()
            pairs[token] = ids[t + 1]
        asked = t >= 2 * task.n_pairs and token in pairs
        assert not asked or t % 2 == 0
        labels.append(pairs[token] - first_value if asked else IGNORED)
    assert Counter(ids[2 * task.n_pairs :])[2] == (0 if task.random_filler else len(ids) - 3 * task.n_pairs)
    assert sum(label != IGNORED for label in labels) == task.n_pairs
    return labels


def solve_selective_copying(task, ids, row):
    data = [token - 4 for token in ids if token >= 4]
    assert len(data) == task.n_tokens and ids[task.context :] == [3] * task.n_tokens
    return [IGNORED] * task.context + data


def solve_induction_heads(task, ids, row):
    first = ids.index(2)
    assert ids.count(2) == 2 and ids[-1] == 2 and first < len(ids) - 2
    assert row["distance"] == len(ids) - 2 - first
    return ids[first + 1] - 3


def solve_permutations(task, ids, row):
    rank = {arrangement: i for i, arrangement in enumerate(permutations(range(task.n)))}
    arrangement, labels = list(range(task.n)), []
    for token in ids:
        x = task.generator_list()[token - 2]
        arrangement = [arrangement[x[i]] for i in range(task.n)]
        labels.append(rank[tuple(arrangement)])
    return labels


def solve_parity(task, ids, row):
    return [sum(token - 2 for token in ids[: t + 1]) % task.modulus for t in range(len(ids))]


def solve_delayed_xor(task, ids, row):
    marked = [t for t, token in enumerate(ids) if token >= 4]
    first, second = marked
    assert second - first == (1 if task.local else task.distance)
    return (ids[first] - 4) ^ (ids[second] - 4)


SOLVERS = {
    "mqar": solve_mqar,
    "selective_copying": solve_selective_copying,
    "induction_heads": solve_induction_heads,
    "permutations": solve_permutations,
    "parity": solve_parity,
    "delayed_xor": solve_delayed_xor,
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    name, options = CASES[request.param]
    task = build_task(name, **SMALL, **options)
    return task, task.generate()


def asked_labels(task, split):
    labels = split["labels"] if task.dense else [[label] for label in split["label"]]
    return np.array([label for row in labels for label in row if label != IGNORED])


def test_every_label_is_what_a_naive_solver_finds(case):
    task, splits = case
    for split in splits.values():
        for row in split:
            ids = row["input_ids"]
            assert min(ids) >= 2 and max(ids) < task.inputs.vocab_size and len(ids) <= task.max_length
            assert SOLVERS[task.name](task, ids, row) == row["labels" if task.dense else "label"]


def test_splits_are_disjoint_and_of_the_sizes_and_lengths_asked_for(case):
    task, splits = case
    assert {name: len(split) for name, split in splits.items()} == task.rows
    rows = [tuple(ids) for split in splits.values() for ids in split["input_ids"]]
    assert len(set(rows)) == len(rows)
    least, most = task.trained_lengths
    lengths = {name: list(map(len, split["input_ids"])) for name, split in splits.items()}
    assert {least, most} <= set(lengths["train"]) and {*lengths["train"], *lengths["val"]} <= {*range(least, most + 1)}
    tested = Counter(lengths["test"])
    assert set(tested) == set(task.tested_lengths) and max(tested.values()) - min(tested.values()) <= 1
    assert len({str(split.features) for split in splits.values()}) == 1


def test_labels_are_balanced(case):
    task, splits = case
    labels = asked_labels(task, splits["train"])
    assert labels.min() >= 0 and labels.max() < task.n_classes
    # classes are equally likely but for the first states of an automaton; labels of a row are not independent
    share = np.bincount(labels, minlength=task.n_classes) / len(labels)
    rows = len(splits["train"]) if task.dense else len(labels)
    slack = 6 * (1 / task.n_classes / rows) ** 0.5
    if task.name in ("permutations", "parity"):
        slack += 12 / np.mean([len(ids) for ids in splits["train"]["input_ids"]])
    assert np.abs(share - 1 / task.n_classes).max() < slack


def test_reference_lines(case):
    task, splits = case
    lines = task.reference_lines(splits)
    train, test = asked_labels(task, splits["train"]), asked_labels(task, splits["test"])
    assert lines["majority"] == np.mean(test == np.bincount(train).argmax())
    test = splits["test"]
    if task.name == "mqar":
        first_value = 3 + task.vocab // 2
        assert all(row["labels"].count(row["input_ids"][1] - first_value) == 1 for row in test)
        assert lines.pop("one value of the sequence") == 1 / task.n_pairs
        right = []
        for row in test:
            shown = [token - first_value for token in row["input_ids"][1 : 2 * task.n_pairs : 2]]
            asked = [label for label in row["labels"] if label != IGNORED]
            right += [a == b for a, b in zip(shown, asked, strict=True)]
    elif task.name in ("selective_copying", "induction_heads"):
        first = 4 if task.name == "selective_copying" else 3
        right = []
        for row in test:
            counts = [row["input_ids"].count(first + label) for label in range(task.n_classes)]
            labels = [label for label in row.get("labels", [row.get("label")]) if label != IGNORED]
            right += [label == counts.index(max(counts)) for label in labels]
    elif task.name == "delayed_xor":
        counts = {name: np.array([ids.count(5) for ids in splits[name]["input_ids"]]) for name in ("train", "test")}
        rules = [lambda n: n < 2, lambda n: n > 0, lambda n: n == 0, lambda n: n == 2]
        best = max(rules, key=lambda rule: np.mean(rule(counts["train"]) == splits["train"]["label"]))
        right = best(counts["test"]) == test["label"]
        assert 0.6 < np.mean(right) < 0.9
    else:
        right = []
        for row in test:
            ids = row["input_ids"]
            guess = [SOLVERS[task.name](task, ids[max(0, t - 7) : t + 1], row)[-1] for t in range(len(ids))]
            right += np.equal(guess, row["labels"]).tolist()
    assert list(lines.values())[1:] == pytest.approx([np.mean(right)])


def test_data_depend_on_the_seed_and_not_on_workers_or_on_the_form_of_a_list():
    options = {**SMALL, "min_train_length": 5, "max_train_length": 9}
    task = build_task("parity", **options, test_lengths=[20, 30])
    assert task == build_task("parity", **options, test_lengths=(20, 30))
    one, two = task.generate(1), task.generate(workers=2)
    other = build_task("parity", **options, test_lengths=(20, 30), seed=1).generate()
    for name in one:
        assert one[name][:] == two[name][:] != other[name][:]


@pytest.mark.parametrize("name", ["induction_heads", "permutations"])
def test_the_first_test_rows_have_every_length(name):
    lengths = (20, 30, 50)
    splits = build_task(name, n_train=50, n_val=5, n_test=900, test_lengths=lengths).generate()
    first = Counter(map(len, splits["test"]["input_ids"][:300]))
    assert set(first) == set(lengths) and max(first.values()) - min(first.values()) < 5 * 2 * 100**0.5
    assert list(map(len, splits["test"]["input_ids"])) != sorted(map(len, splits["test"]["input_ids"]))


def test_no_stream_of_random_numbers_is_used_twice(monkeypatch):
    seeded = []
    make = np.random.SeedSequence

    def record(entropy, *args):
        seeded.append(make(entropy, *args).generate_state(4).tobytes())
        return make(entropy, *args)

    generator = np.random.default_rng
    monkeypatch.setattr("numpy.random.SeedSequence", record)
    monkeypatch.setattr("numpy.random.default_rng", lambda key: generator(record(key)))
    monkeypatch.setattr("lra.tasks.controls.BLOCK_TOKENS", 50 * 30)
    build_task("induction_heads", n_train=200, n_val=5, n_test=60, length=30, test_lengths=(20, 30)).generate()
    assert len(set(seeded)) == len(seeded) > 6


def test_blocks_are_not_repeated(monkeypatch):
    monkeypatch.setattr("lra.tasks.controls.BLOCK_TOKENS", 63 * 20)
    splits = build_task("delayed_xor", **SMALL, length=63, distance=20).generate()
    assert {name: len(split) for name, split in splits.items()} == {"train": 400, "val": 60, "test": 91}


def test_short_sequences_that_run_out_are_spread_over_training_and_validation():
    task = build_task("parity", n_train=900, n_val=900, n_test=10, min_train_length=2, max_train_length=12)
    splits = task.generate()
    train, val = (np.array([len(ids) for ids in splits[name]["input_ids"]]) for name in ("train", "val"))
    assert abs(train.mean() - val.mean()) < 5 * train.std() * (2 / 900) ** 0.5
    # in the order they were drawn, the first rows would be shorter than the last
    assert abs(train[:450].mean() - train[450:].mean()) < 5 * train.std() * (2 / 450) ** 0.5
    assert sum(train == 2) + sum(val == 2) == 4


def test_too_few_distinct_sequences():
    task = build_task(
        "parity", n_train=30, n_val=1, n_test=1, min_train_length=2, max_train_length=3, test_lengths=(9,)
    )
    with pytest.raises(
        ValueError, match="parity with these options has too few distinct sequences of length 2 to 3: 19"
    ):
        task.generate()


def test_the_cache_returns_what_was_generated(tmp_path):
    task = build_task("mqar", **SMALL, vocab=40, length=32, n_pairs=4)
    made, kept = task.generate(), load(task, tmp_path)
    for name in made:
        assert made[name][:] == kept[name][:]


def test_strata_of_induction_heads():
    task = build_task("induction_heads", **SMALL, test_lengths=(20, 50))
    splits = task.generate()
    distance = task.strata(splits["test"])["distance"]
    assert distance.tolist() == splits["test"]["distance"]
    assert distance.min() < 10 < 40 < distance.max()


def test_choices_are_distinct_uniform_and_in_random_order():
    rng = np.random.default_rng(0)
    for population, k in ((5, 5), (30, 3), (6, 4), (7, 1)):  # by permutations, and by drawing again
        chosen = choose(rng, 5_000, population, k)
        assert chosen.shape == (5_000, k)
        assert all(len(set(row)) == k for row in chosen.tolist())
        for position in range(k):
            counts = np.bincount(chosen[:, position], minlength=population)
            assert len(counts) == population
            mean = 5_000 / population
            assert np.abs(counts - mean).max() < 6 * mean**0.5


def test_queries_follow_the_power_law():
    # the first pair's place has probability i^(a - 1) / sum, i = 1, 2, ...
    task = build_task("mqar", n_train=5_000, n_val=1, n_test=1, vocab=2000, length=24, n_pairs=2, power_a=0.3)
    ids = np.array(task.generate()["train"]["input_ids"])
    first = (ids[:, 4:] == ids[:, :1]).argmax(axis=1) // 2
    p = np.arange(1, 11) ** (0.3 - 1)
    expected = 5_000 * p / p.sum()
    assert (np.abs(np.bincount(first, minlength=10) - expected) < 5 * expected**0.5).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mqar", {"n_train": 0}, "n_train must be at least 1; got 0"),
        ("parity", {"n_val": 0}, "n_val must be at least 1; got 0"),
        ("parity", {"n_test": 3}, "n_test must be at least 6, the number of test_lengths; got 3"),
        ("mqar", {"vocab": 7}, "vocab must be even, 4 to 65000; got 7"),
        ("mqar", {"vocab": 66000}, "vocab must be even, 4 to 65000; got 66000"),
        ("mqar", {"n_pairs": 0}, "n_pairs must be 1 to vocab / 2 = 4096; got 0"),
        ("mqar", {"vocab": 8, "n_pairs": 5}, "n_pairs must be 1 to vocab / 2 = 4; got 5"),
        ("mqar", {"length": 63, "n_pairs": 4}, "length must be even, 4 n_pairs = 16 or more; got 63"),
        ("mqar", {"length": 62}, "length must be even, 4 n_pairs = 64 or more; got 62"),
        ("mqar", {"power_a": 0.0}, "power_a must be positive; got 0.0"),
        ("mqar", {"vocab": 8, "n_pairs": 4, "random_filler": True}, "random_filler must be false if every key"),
        ("mqar", {"pooling": "mean"}, "pooling must be one of none; got 'mean'"),
        ("selective_copying", {"vocab": 3}, "vocab must be 4 to 32000; got 3"),
        ("selective_copying", {"n_tokens": 0}, "n_tokens must be at least 1; got 0"),
        ("selective_copying", {"context": 15}, "context must be n_tokens = 16 or more; got 15"),
        ("induction_heads", {"length": 2}, "length must be at least 3; got 2"),
        (
            "induction_heads",
            {"test_lengths": [2]},
            "test_lengths must be different lengths, each at least 3; got \\(2,",
        ),
        ("induction_heads", {"vocab": 2}, "vocab must be 3 to 65000; got 2"),
        ("permutations", {"test_lengths": []}, "test_lengths must be different lengths, each at least 1; got \\(\\)"),
        ("parity", {"test_lengths": [5, 5]}, "test_lengths must be different lengths, each at least 1"),
        ("parity", {"test_lengths": 5}, "test_lengths must be a list; got 5"),
        ("parity", {"min_train_length": 0}, "min_train_length must be at least 1; got 0"),
        ("parity", {"max_train_length": 39}, "max_train_length must be at least min_train_length = 40; got 39"),
        ("permutations", {"n": 7}, "n must be 2 to 6; got 7"),
        ("permutations", {"generators": "odd"}, "generators must be one of all, transpositions, adjacent, two"),
        ("parity", {"modulus": 1}, "modulus must be 2 to 250; got 1"),
        ("delayed_xor", {"length": 1, "distance": 1}, "length must be at least 2; got 1"),
        ("delayed_xor", {"length": 63, "distance": 63}, "distance must be 1 to length - 1 = 62; got 63"),
        ("delayed_xor", {"distance": 0}, "distance must be 1 to length - 1 = 1023; got 0"),
        ("delayed_xor", {"pooling": "max"}, "pooling must be last or mean: .*; got 'max'"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        build_task(name, **options)


@pytest.mark.parametrize("name", [*SOLVERS, "mqar_cpu", "delayed_xor_cpu"])
def test_presets(name):
    config = read([name])
    assert issubclass(TASKS[config["task"]["name"]], Control)
    assert build_task(**config["task"]).rows
