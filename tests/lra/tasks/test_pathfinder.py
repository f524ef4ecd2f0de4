"""Pathfinder: compiled against plain Python to the bit, and what an image is against its description."""

import functools

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from linrnn.kernels import KernelUnavailable
from lra.data import origin
from lra.examples import Examples
from lra.tasks import build_task, pathfinder_images, pathfinder_reference
from lra.tasks.base import Ids, Levels, column, flat_column
from lra.tasks.pathfinder import interval_accuracy
from lra.tasks.pathfinder_images import Block, Scene, make, scene
from lra.tasks.pathfinder_stamps import GEOMETRY, SEEDS

SAMPLES = {32: 4000, 128: 160, 256: 200}


def hard(size: int, seed: int = 3, every_direction: bool = False) -> Scene:
    return scene(size, "hard", "length", False, every_direction, seed)


@functools.cache
def sample(size: int) -> Block:
    return make(hard(size), 0, SAMPLES[size])


def distance(block: Block) -> np.ndarray:
    apart = block.marked[:, 0].astype(float) - block.marked[:, 1]
    return np.hypot(apart[:, 0], apart[:, 1])


@pytest.mark.parametrize(
    ("drawn", "first", "count"),
    [
        (hard(32), 0, 6),
        (hard(32, 2**64 - 1, True), 10**6, 6),
        (scene(128, "mid", "easy", True, False, 5), 7, 2),
        (hard(128, every_direction=True), 3, 1),
        (hard(256), 2**31, 3),
        (Scene(32, 6, 300, 1, 30, 40, True, 0), 0, 1),  # until nothing more fits
    ],
)
def test_compiled_images_are_the_plain_ones_to_the_bit(drawn, first, count):
    compiled, plain = make(drawn, first, count), Block.empty(drawn, count)
    assert pathfinder_reference.generate(drawn, first, plain, 10**6) == 0
    for name, values in vars(plain).items():
        np.testing.assert_array_equal(getattr(compiled, name), values, err_msg=name)
    assert plain.images.any(axis=(1, 2)).all()


def test_an_image_depends_on_its_number_and_the_seed_alone():
    whole, part, other = make(hard(32), 0, 63), make(hard(32), 40, 1), make(hard(32, seed=4), 0, 63)
    np.testing.assert_array_equal(whole.images[40], part.images[0])
    assert len(np.unique(whole.images.reshape(63, -1), axis=0)) == 63
    assert not (whole.images == other.images).all(axis=(1, 2)).any()


# lra.md 2.2 measured 0.126 and 66 % at 32 pixels, 86 % at 128 and, of longer chains, 96 % at 256.
@pytest.mark.parametrize(("size", "ink", "zeros"), [(32, 0.126, 0.66), (128, None, 0.86), (256, None, 0.96)])
def test_share_of_ink_and_of_black(size, ink, zeros):
    images = sample(size).images
    assert images.min() == 0 and (images.max(axis=(1, 2)) == 255).all()
    assert abs((images == 0).mean() - zeros) < 0.03
    assert ink is None or abs((images > 64).mean() - ink) < 0.012


@pytest.mark.parametrize("size", SAMPLES)
def test_chains_are_whole_and_as_straight_as_they_must_be(size):
    geometry, block, n = GEOMETRY[size], sample(size), 14
    assert (block.bars[:, : 2 * n] >= 0).all() and block.bars.shape[1] == 2 * n + 4 * (hard(size).distractors)
    for margin in geometry.margins:
        tables = pathfinder_images.stamps(geometry, margin)
        angle = np.concatenate([np.deg2rad(np.arange(SEEDS) - 180), np.arctan2(*tables.candidate.T)])
        chains = block.bars[block.margin == margin][:, : 2 * n].reshape(-1, n, 3)
        head, stamp = chains[..., :2].astype(float), chains[..., 2]
        assert (stamp[:, 0] < SEEDS).all() and (stamp[:, 1:] >= SEEDS).all()
        along = np.stack([np.sin(angle[stamp]), np.cos(angle[stamp])], axis=-1)
        tail = head - geometry.length * along
        tail[:, 0], head[:, 0] = head[:, 0].copy(), head[:, 0] + geometry.length * along[:, 0]
        turn = np.abs(np.angle(np.exp(1j * np.diff(angle[stamp], axis=1))))
        assert turn.max() <= np.pi / 2 / geometry.continuity
        # pivots and heads are whole pixels: either end of a gap of 2 m is off by less than the diagonal of one
        gap = np.hypot(*np.moveaxis(tail[:, 1:] - head[:, :-1], -1, 0))
        assert np.abs(gap - 2 * margin).max() < 2 * np.sqrt(2) and abs(gap.mean() - 2 * margin) < 0.5


@pytest.mark.parametrize("size", SAMPLES)
def test_a_marker_is_on_a_first_bar_and_the_other_on_the_last_of_the_chain_that_the_label_says(size):
    block, n = sample(size), 14
    tips = block.bars[:, [0, n - 1, n, 2 * n - 1], :2].reshape(-1, 2, 2, 2)  # chain, end
    rows = np.arange(len(tips))
    origin = (tips[:, :, 0] == block.marked[:, None, 0]).all(-1).argmax(1)
    np.testing.assert_array_equal(tips[rows, origin, 0], block.marked[:, 0])
    np.testing.assert_array_equal(tips[rows, np.where(block.labels, origin, 1 - origin), 1], block.marked[:, 1])
    assert abs(origin.mean() - 0.5) < 2 / np.sqrt(len(tips))
    # nothing darkens a disc; at 32 a distractor may be twice as bright
    radius = int(GEOMETRY[size].marker_radius) - 1
    for y, x in [(0, 0), (0, radius), (radius, 0), (0, -radius), (-radius, 0)]:
        for end in (0, 1):
            at = np.clip(block.marked[:, end] + (y, x), 0, size - 1)
            assert block.images[rows, at[:, 0], at[:, 1]].min() >= (240 if size > 32 else 255 / 2)


@pytest.mark.parametrize("size", SAMPLES)
def test_every_margin_is_as_frequent_and_so_is_every_label(size):
    block = sample(size)
    bound = 2 / np.sqrt(len(block.labels))  # four standard deviations
    assert abs(block.labels.mean() - 0.5) < bound
    for margin in GEOMETRY[size].margins:
        assert abs((block.margin == margin).mean() - 1 / len(GEOMETRY[size].margins)) < bound
    assert set(np.unique(block.margin)) == set(GEOMETRY[size].margins)


def test_the_two_labels_do_not_differ_in_what_is_easily_measured():
    block = sample(32)
    images, labels = block.images.reshape(len(block.labels), -1).astype(float), block.labels
    middle = np.hypot(*np.moveaxis(block.marked - 15.5, -1, 0))
    features = [distance(block), images.mean(1), (images > 64).mean(1), middle[:, 0], middle[:, 1]]
    cues = np.stack(features, axis=1)
    cues = (cues - cues.mean(0)) / cues.std(0)
    half = len(labels) // 2
    for cue in cues.T:  # the area under the curve of each alone
        ranks = cue.argsort().argsort()
        ones = labels == 1
        area = (ranks[ones].mean() - (ones.sum() - 1) / 2) / (~ones).sum()
        assert abs(area - 0.5) < 0.07  # the markers' distance is no more than 0.04 from it, and the sampling error 0.01
    assert LogisticRegression().fit(cues[:half], labels[:half]).score(cues[half:], labels[half:]) < 0.57


def test_few_distractors_as_in_2019_or_all_of_them():
    found = {every: make(hard(32, every_direction=every), 0, 500).bars[:, 28::4, 2] >= 0 for every in (False, True)}
    assert 0.5 < found[False].sum(1).mean() < 2.5
    assert 4.5 < found[True].sum(1).mean() <= 5


def test_distractors_end_where_less_than_a_hundredth_is_free():
    canvas = pathfinder_reference.Canvas(GEOMETRY[32], hard(32).tables[0])
    canvas.taken[:] = 255
    canvas.taken[20, 10:21] = 76  # eleven of 1,024 pixels
    assert not canvas.crowded()
    canvas.taken[20, 10] = 77
    assert canvas.crowded()


@pytest.mark.parametrize(("equal", "ratio"), [(False, 4 / 3), (True, 1.0)])
def test_distractors_are_brighter_at_32_unless_contrasts_are_equal(equal, ratio):
    block = make(scene(32, "hard", "length", equal, True, 0), 0, 300)
    targets, others = block.bars[:, 1:14, :2], block.bars[:, 29::4, :2]
    rows = np.arange(300)[:, None]
    levels = [block.images[rows, at[..., 0], at[..., 1]] for at in (targets, others)]
    present = block.bars[:, 29::4, 2] >= 0
    measured = levels[1][present].mean() / np.median(levels[0], axis=1).mean()
    assert abs(measured - ratio) < 0.12


@pytest.mark.parametrize(
    ("size", "difficulty", "rule", "numbers"),
    [
        (32, "hard", "length", (14, 5, 4)),
        (32, "mid", "length", (9, 6, 3)),
        (32, "easy", "length", (6, 10, 2)),
        (32, "hard", "easy", (14, 10, 4)),
        (128, "hard", "length", (14, 8, 4)),
        (128, "hard", "easy", (14, 17, 4)),
        (256, "hard", "length", (14, 7, 4)),
        (256, "hard", "easy", (14, 15, 4)),
    ],
)
def test_numbers_of_bars_and_of_distractors(size, difficulty, rule, numbers):
    drawn = scene(size, difficulty, rule, False, False, 0)
    assert (drawn.paddles, drawn.distractors, drawn.distractor_paddles) == numbers
    assert make(drawn, 0, 2).bars.shape[1] == 2 * numbers[0] + numbers[1] * numbers[2]


def test_without_a_compiler_the_images_are_the_same_and_it_is_said_once(monkeypatch):
    expected = make(hard(32), 0, 2)

    def missing():
        raise KernelUnavailable("no library")

    monkeypatch.setattr("linrnn.kernels.cpu.library", missing)
    pathfinder_images.compiled.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"in Python.*no library") as said:
            got = [make(hard(32), 0, 2) for _ in range(2)]
    finally:
        pathfinder_images.compiled.cache_clear()
    assert len(said) == 1
    np.testing.assert_array_equal(got[1].images, expected.images)


def test_a_scene_without_a_solution_ends_and_is_named(monkeypatch):
    monkeypatch.setattr(pathfinder_images, "ATTEMPTS", 1)
    with pytest.raises(RuntimeError, match="no two chains found in 1 attempts"):
        make(hard(32), 0, 20)


def test_splits_do_not_depend_on_the_workers_and_survive_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("lra.tasks.pathfinder.BLOCK_PIXELS", 7 * 1024)
    task = build_task("pathfinder", n_images=63, seed=9)
    drawn, cached = task.generate(1, None), task.splits(tmp_path, workers=3)
    assert {name: len(split) for name, split in drawn.items()} == task.rows == {"train": 50, "val": 6, "test": 7}
    for name, split in drawn.items():
        assert split.to_dict() == cached[name].to_dict()
    block = make(hard(32, seed=9), 0, 63)
    levels = np.concatenate([flat_column(drawn[name], "input_ids") for name in ("train", "val", "test")])
    np.testing.assert_array_equal(levels.reshape(block.images.shape), block.images)
    np.testing.assert_array_equal(column(drawn["test"], "label"), block.labels[-7:])
    np.testing.assert_array_equal(column(drawn["test"], "distance"), np.round(distance(block)[-7:]))
    assert task.source(None) == {} and list(task.strata(drawn["test"])) == ["distance"]
    assert set(task.reference_lines(drawn)) == {"majority", "marker distance"}


def test_columns_too_long_for_arrow_are_kept_in_parts(tmp_path, monkeypatch):
    task = build_task("pathfinder", n_images=40)
    whole = task.splits(tmp_path / "whole")
    monkeypatch.setattr("lra.tasks.pathfinder.MOST_VALUES", 5 * 1024)
    made = task.generate(1, None)
    assert made["train"].data.column("input_ids").num_chunks == 7
    parts = task.splits(tmp_path / "parts")
    for name, split in whole.items():
        np.testing.assert_array_equal(flat_column(made[name], "input_ids"), flat_column(split, "input_ids"))
        read = Examples.from_dataset(parts[name], task).batch(np.arange(len(split)))
        np.testing.assert_array_equal(read.first.inputs.flatten(), flat_column(split, "input_ids"))
    assert origin(task, tmp_path / "whole") == origin(task, tmp_path / "parts")


def test_the_accuracy_of_an_interval_is_that_of_the_best():
    rng = np.random.default_rng(0)
    for flip in (False, True):
        x = rng.integers(0, 20, 400)
        label = ((np.abs(x - 8 + rng.normal(0, 4, 400)) < 4) ^ flip).astype(int)
        rules = [((a <= x) & (x < b)) == (label == inside) for a in range(20) for b in range(21) for inside in (0, 1)]
        assert interval_accuracy(x, label, x, label) == max(rule.mean() for rule in rules)
        assert interval_accuracy(x, label, np.array([8, 99]), np.array([not flip, flip])) == 1


def test_pictures_show_both_labels(tmp_path):
    from PIL import Image

    task = build_task("pathfinder", n_images=100)
    task.picture(task.generate(1, None), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] > 900 and image.size[1] > 300


def test_inputs_are_levels_or_tokens():
    assert build_task("pathx").max_length == 16384 and build_task("pathx256").max_length == 65536
    assert build_task("pathx").inputs == Levels(1, 127.5, 127.5, "ce")
    assert build_task("pathfinder", encoding="tokens").inputs == Ids(258, 256, 257)
    as_tokens, as_pixels = build_task("pathx", encoding="tokens", pretrain_loss="l1"), build_task("pathx")
    assert as_tokens.data_config() == as_pixels.data_config() != build_task("pathx256").data_config()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pathfinder", {"n_images": 9}, "n_images must be at least 10; got 9"),
        ("pathfinder", {"difficulty": "baseline"}, "difficulty must be one of hard, mid, easy; got 'baseline'"),
        ("pathfinder", {"distractors": 5}, "distractors must be one of length, easy; got 5"),
        ("pathfinder", {"equal_contrast": 1}, "equal_contrast must be true or false; got 1"),
        ("pathfinder", {"seed": 2**64}, "seed must be below 2"),
        ("pathfinder", {"encoding": "bytes"}, "encoding must be one of pixels, tokens"),
        ("pathfinder", {"images": "release", "seed": 1}, "seed must be 0 with images: release"),
        ("pathx", {"images": "release", "distractors": "easy"}, "distractors must be 'length' with images: release"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_task(name, **options)


def test_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        build_task("pathfinder").generate(0, None)
