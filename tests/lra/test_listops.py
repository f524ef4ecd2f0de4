"""ListOps against a plain recursive generator and evaluator, written from the definition."""

import random
import statistics
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from lra.config import cell_from_dict
from lra.presets import read
from lra.tasks import TASKS, ListOps, build_task
from lra.tasks.listops import TOKENS
from lra.tasks.listops_reference import truncated_value
from lra.tasks.listops_trees import draw_block

OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")


def small(**options):
    config = {"n_train": 300, "n_val": 50, "n_test": 80, "max_depth": 4, "max_args": 5, "p_operator": 0.4}
    return ListOps(**{**config, "min_length": 8, "max_tree_length": 60, **options})


@pytest.fixture(scope="module")
def splits():
    return small().generate(workers=2)


def parse(text):
    """Reads `[MAX 2 9 X` as ("[MAX", 2, 9)."""
    words = iter(text.split())

    def node(word):
        if word not in OPERATORS:
            return int(word)
        arguments = []
        while (following := next(words)) != "X":
            arguments.append(node(following))
        return (word, *arguments)

    tree = node(next(words))
    assert next(words, None) is None
    return tree


def evaluate(tree, levels=99, guess=None):
    if isinstance(tree, int):
        return tree
    operator, *arguments = tree
    if levels == 0:
        return guess[operator]
    values = [evaluate(argument, levels - 1, guess) for argument in arguments]
    rules = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(statistics.median(v)), "[SM": lambda v: sum(v) % 10}
    return rules[operator](values)


def size(tree):
    return 1 if isinstance(tree, int) else 2 + sum(map(size, tree[1:]))


def depth(tree):
    return 0 if isinstance(tree, int) else 1 + max(map(depth, tree[1:]))


def operators(tree):
    return [] if isinstance(tree, int) else [tree, *(o for argument in tree[1:] for o in operators(argument))]


def draw_tree(rng, task, level=1):
    if level < task.max_depth and rng.random() < task.p_operator:
        n = rng.randint(task.min_args, task.max_args)
        return (rng.choice(OPERATORS), *(draw_tree(rng, task, level + 1) for _ in range(n)))
    return rng.randint(0, 9)


def rows_of(trees):
    stop = np.cumsum(trees.length)
    return [trees.tokens[end - n : end].tolist() for end, n in zip(stop, trees.length, strict=True)]


@pytest.mark.parametrize(
    "task",
    [small(), small(min_args=1, max_args=1, min_length=1), small(max_depth=2, min_length=1), ListOps(seed=3)],
    ids=["small", "unary", "flat", "full"],
)
def test_every_tree_is_what_its_columns_say(task):
    trees = draw_block(task, 0)
    assert len(trees.length) > 50
    rows = rows_of(trees)
    for i, row in enumerate(rows[:300]):
        tree = parse(ListOps.decode(row))
        assert trees.label[i] == evaluate(tree)
        assert trees.length[i] == len(row) == size(tree)
        assert task.min_length < len(row) < task.max_tree_length
        assert TOKENS[trees.operator[i]] == tree[0]
        assert trees.depth[i] == depth(tree) < task.max_depth
        assert all(task.min_args <= len(o) - 1 <= task.max_args for o in operators(tree))


def test_splits(splits):
    assert {name: len(split) for name, split in splits.items()} == {"train": 300, "val": 50, "test": 80}
    rows = [tuple(row) for split in splits.values() for row in split["input_ids"]]
    assert len(set(rows)) == 430
    for split in splits.values():
        for row in split.select(range(50)):
            assert row["label"] == evaluate(parse(ListOps.decode(row["input_ids"])))
            assert row["length"] == len(row["input_ids"])
            assert row["operator"] == row["input_ids"][0]


def test_splits_have_the_same_lengths_when_duplicates_are_common():
    # all the shortest trees are taken at once, so trees drawn late are longer: the splits must not show it
    task = small(n_train=3000, n_val=10, n_test=3000, max_depth=3, max_args=3, min_length=1, max_tree_length=9)
    splits = task.generate(1)
    train, test = (np.array(splits[name][:]["length"]) for name in ("train", "test"))
    assert abs(train.mean() - test.mean()) < 4 * train.std() * (2 / 3000) ** 0.5


def test_same_trees_for_any_number_of_workers():
    task = small(n_train=6000)
    one, three = task.generate(1), task.generate(3)
    for name in one:
        assert one[name][:] == three[name][:]


def test_other_seed_other_trees(splits):
    assert small(seed=1).generate(1)["train"][:] != splits["train"][:]


@pytest.mark.parametrize(("task", "kept"), [(small(), 4000), (ListOps(), 500)], ids=["small", "full"])
def test_distribution_is_that_of_the_plain_generator(task, kept):
    rng = random.Random(0)
    plain, drawn = [], 0
    while len(plain) < kept:
        tree = draw_tree(rng, task)
        drawn += not isinstance(tree, int)
        if task.min_length < size(tree) < task.max_tree_length:
            plain.append(tree)

    blocks = [draw_block(task, b) for b in range(2 if kept > 1000 else 6)]
    ours = [parse(ListOps.decode(row)) for block in blocks for row in rows_of(block)][: 2 * kept]
    attempts = len(blocks) * min(2**20 // task.max_tree_length, 4096)
    accepted = sum(len(block.length) for block in blocks)
    p = kept / drawn
    assert abs(accepted / attempts - p) < 4 * (p * (1 - p) * (1 / drawn + 1 / attempts)) ** 0.5

    for statistic in (size, depth, evaluate, lambda t: len(operators(t)), lambda t: sum(map(len, operators(t)))):
        a, b = np.array([statistic(t) for t in plain], float), np.array([statistic(t) for t in ours], float)
        assert abs(a.mean() - b.mean()) < 4 * (a.var() / len(a) + b.var() / len(b)) ** 0.5 + 1e-9

    # trees, not nodes, are independent: one node each, the root and a random operator
    for pick in (lambda t: t, lambda t: rng.choice(operators(t))):
        for feature in (lambda o: o[0], len, lambda o: evaluate(o), lambda o: isinstance(o[-1], tuple)):
            a, b = Counter(feature(pick(t)) for t in plain), Counter(feature(pick(t)) for t in ours)
            for key in a.keys() | b.keys():
                p = (a[key] + b[key]) / (len(plain) + len(ours))
                error = (p * (1 - p) * (1 / len(plain) + 1 / len(ours))) ** 0.5
                assert abs(a[key] / len(plain) - b[key] / len(ours)) < 4.5 * error + 1e-9, key


def test_reference_lines(splits):
    lines = small().reference_lines(splits)
    train, test = (
        [(parse(ListOps.decode(row["input_ids"])), row["label"]) for row in splits[name]] for name in ("train", "test")
    )
    assert lines["majority"] == np.mean([y == Counter(y for _, y in train).most_common(1)[0][0] for _, y in test])
    guess = {}
    for operator in OPERATORS:
        count = Counter(y for tree, y in train if tree[0] == operator)
        guess[operator] = min(count, key=lambda y: (-count[y], y))
    for k, name in enumerate(["root operator", "exact to depth 1", "exact to depth 2", "exact to depth 3"]):
        assert lines[name] == np.mean([evaluate(tree, k, guess) == y for tree, y in test])
    assert lines["exact to depth 3"] == 1.0  # these trees have no deeper operators

    right = []
    for tree, y in test:
        digits = [argument for argument in tree[1:] if isinstance(argument, int)]
        right.append((evaluate((tree[0], *digits)) if digits else guess[tree[0]]) == y)
    assert lines["root operator and digits"] == np.mean(right)
    assert lines["majority"] < lines["root operator"]


def test_reference_lines_follow_a_selection(splits):
    chosen = {"train": splits["train"], "test": splits["test"].select([7])}
    assert set(small().reference_lines(chosen).values()) <= {0.0, 1.0}


def test_an_operator_without_training_trees_gets_the_majority(splits):
    minimum = ListOps.encode("[MIN")[0]
    train = splits["train"].filter(lambda row: row["operator"] != minimum)
    only = splits["test"].filter(lambda row: row["operator"] == minimum)
    lines = small().reference_lines({"train": train, "test": only})
    assert lines["root operator"] == lines["majority"]


def test_truncated_value_without_truncation_is_the_value():
    trees = draw_block(ListOps(), 0)
    for row, label in zip(rows_of(trees)[:40], trees.label, strict=False):
        assert truncated_value(row, 9, [0] * 4) == label


def test_text():
    text = "( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) ] )"
    ids = ListOps.encode(text)
    assert ListOps.decode(ids) == "[MAX 2 [MIN 4 7 X X"
    assert ListOps.encode(ListOps.decode(ids)) == ids
    assert {ListOps.inputs.pad_id, ListOps.inputs.mask_id}.isdisjoint(ids) and max(ids) < ListOps.inputs.vocab_size
    with pytest.raises(ValueError, match=r"unknown token '\[AVG' in text"):
        ListOps.encode("[AVG 2 9 ]")
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.16, got 17"):
        ListOps.decode([3, 17])
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.16, got -1"):
        ListOps.decode([-1])


def test_defaults_are_the_benchmark():
    task = build_task("listops")
    assert (task.n_train, task.n_val, task.n_test, task.max_length) == (96_000, 2_000, 2_000, 1_999)
    assert (task.n_classes, task.inputs.vocab_size, task.mask_rate, task.pooling) == (10, 17, 0.1, "mean")
    assert TASKS["listops"] is type(task) and task.name == "listops"


@pytest.mark.parametrize("preset", ["listops", "listops_quick"])
def test_presets(preset):
    cell = cell_from_dict(read([preset]))
    task = cell.build_task()
    assert (task == ListOps()) == (preset == "listops")
    assert 0 < (cell.budget.labels or task.n_train) <= task.n_train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_train": 0}, "n_train must be at least 1; got 0"),
        ({"n_val": 0}, "n_val must be at least 1; got 0"),
        ({"n_test": -1}, "n_test must be at least 1; got -1"),
        ({"max_depth": 1}, "max_depth must be at least 2; got 1"),
        ({"min_args": 0}, "min_args must be at least 1; got 0"),
        ({"max_args": 1}, "max_args must be at least min_args=2, got 1"),
        ({"min_length": 0}, "min_length must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"p_operator": 1.5}, r"p_operator must be in \[0, 1\]; got 1.5"),
        ({"mask_rate": -0.1}, r"mask_rate must be in \[0, 1\]; got -0.1"),
        ({"pooling": "cls"}, "pooling must be one of mean, max, last; got 'cls'"),
        ({"max_tree_length": 501}, "max_tree_length must be greater than 501, got 501"),
        ({"min_length": 1, "max_tree_length": 4}, "max_tree_length must be greater than 4, got 4"),
        ({"max_depth": 3}, "min_length=500 is out of reach: with max_depth=3 and max_args=10 a tree has at most 122"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ListOps(**options)


def test_the_tightest_options_work():
    # the longest tree of max_depth 3 has 122 tokens, the shortest of min_args 2 has 4
    assert ListOps(max_depth=3, min_length=121).min_length == 121
    task = ListOps(n_train=10, n_val=1, n_test=1, min_length=1, max_tree_length=5)
    assert set(task.generate(1)["train"]["length"]) == {4}


def test_bad_types():
    with pytest.raises(ValueError, match=r"n_train must be an integer; got 1000.0"):
        ListOps(n_train=1e3)
    with pytest.raises(ValueError, match="seed must be an integer; got True"):
        ListOps(seed=True)


def test_build_task_refuses_the_unknown():
    with pytest.raises(ValueError, match="unknown task 'listopz'; the tasks are: listops"):
        build_task("listopz")
    with pytest.raises(ValueError, match=r"unknown option 'depth' of task 'listops'; the options are: .*n_train, "):
        build_task("listops", depth=3)


def test_asking_for_more_trees_than_exist():
    options = {"n_val": 1, "n_test": 1, "max_depth": 2, "max_args": 2, "min_length": 1, "max_tree_length": 5}
    assert len(ListOps(n_train=398, **options).generate(1)["train"]) == 398  # 4 operators on 10 x 10 digits
    with pytest.raises(ValueError, match="n_train \\+ n_val \\+ n_test = 401, but only 400 distinct trees were found"):
        ListOps(n_train=399, **options).generate(1)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        small().generate(0)


def test_importing_the_tasks_is_light():
    heavy = "{'torch', 'datasets', 'pyarrow', 'lightning'} & set(sys.modules)"
    code = f"import sys, lra.tasks, lra.data; lra.tasks.build_task('listops'); assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
