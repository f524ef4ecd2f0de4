"""Images as sequences against the images they come from, read again one by one."""

import io
import sys

import numpy as np
import pytest

from lra.data import data_folder
from lra.presets import read
from lra.tasks import TASKS, Ids, Levels, build_task
from lra.tasks.base import SPLITS, column, flat_column
from lra.tasks.decoding import decode_image
from lra.tasks.digits import Digits
from lra.tasks.images import Image, PSMnist, SCifar, SMnist

NAMES = ("image", "scifar", "smnist", "psmnist", "digits")
N_TRAIN, N_TEST = 63, 21
ALL = {"n_train": N_TRAIN - N_TRAIN // 10, "n_val": N_TRAIN // 10, "n_test": N_TEST}  # of a source of another size


def png(levels, mode=None):
    from PIL import Image as Pillow

    file = io.BytesIO()
    Pillow.fromarray(levels).convert(mode or ("RGB" if levels.ndim == 3 else "L")).save(file, "PNG")
    return file.getvalue()


def write(folder, images, labels, name="img"):
    """Writes parquet files in the hub's schema; `images` and `labels` hold a list for train and one for test."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        files = [{"bytes": file, "path": None} for file in images[split]]
        pq.write_table(pa.table({name: files, "label": labels[split]}), folder / f"{split}.parquet")
    return folder


def source(folder, shape, name="img"):
    """Random images of a shape in a folder, and the same as arrays."""
    rng = np.random.default_rng(0)
    n = {"train": N_TRAIN, "test": N_TEST}
    images = {split: rng.integers(0, 256, (n[split], *shape), dtype=np.uint8) for split in n}
    labels = {split: rng.integers(0, 10, n[split]) for split in n}
    write(folder, {split: [png(image) for image in images[split]] for split in n}, labels, name)
    return folder, images, labels


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    return source(tmp_path_factory.mktemp("colour"), (32, 32, 3))


@pytest.fixture(scope="module")
def gray(tmp_path_factory):
    return source(tmp_path_factory.mktemp("gray"), (32, 32), "image")  # CIFAR's column is img on the hub


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    return source(tmp_path_factory.mktemp("mnist"), (28, 28), "image")


def levels_of(split):
    return flat_column(split, "input_ids").reshape(len(split), -1)


def rows_of(split, images, labels):
    """The source's images and labels of a split, by what the split says of its rows."""
    origin = "test" if column(split, "origin").all() else "train"
    return images[origin][column(split, "index")], labels[origin][column(split, "index")]


def same(one, other):
    return all(np.array_equal(flat_column(one[s], "input_ids"), flat_column(other[s], "input_ids")) for s in SPLITS)


def test_splits_hold_the_images_that_their_index_names(colour, monkeypatch):
    monkeypatch.setattr("lra.tasks.decoding._CHUNK", 10)  # several, and a last one that is not full
    folder, images, labels = colour
    splits = SCifar(**ALL).generate(workers=2, data_dir=folder)
    for split in splits.values():
        pixels, label = rows_of(split, images, labels)
        assert np.array_equal(levels_of(split).reshape(-1, 32, 32, 3), pixels)
        assert np.array_equal(column(split, "label"), label)
    index = {s: set(column(splits[s], "index")) for s in SPLITS}
    assert [len(splits[s]) for s in SPLITS] == [N_TRAIN - N_TRAIN // 10, N_TRAIN // 10, N_TEST]
    assert index["train"] | index["val"] == set(range(N_TRAIN)) and index["test"] == set(range(N_TEST))
    assert [set(column(splits[s], "origin")) for s in SPLITS] == [{0}, {0}, {1}]


def test_gray_of_a_colour_image_is_its_weighted_sum(colour):
    folder, images, labels = colour
    for split in Image(**ALL).generate(1, folder).values():
        pixels, _ = rows_of(split, images, labels)
        exact = pixels.reshape(len(split), -1, 3) @ np.array([0.299, 0.587, 0.114])
        # rounded by Pillow with weights of 16 bits: each off by at most 2^-17
        assert np.abs(levels_of(split) - exact).max() <= 0.5 + 3 * 255 * 2**-17


def test_gray_images_are_taken_as_they_are(gray):
    folder, images, labels = gray
    for split in Image(**ALL).generate(1, folder).values():
        assert np.array_equal(levels_of(split), rows_of(split, images, labels)[0].reshape(len(split), -1))


def test_splits_depend_on_the_seed_alone_and_a_cap_takes_the_first_rows(mnist):
    folder, *_ = mnist
    whole = SMnist(seed=3, **ALL).generate(1, folder)
    assert same(whole, SMnist(seed=3, **ALL).generate(3, folder))
    assert not same(whole, SMnist(seed=4, **ALL).generate(1, folder))
    capped = SMnist(seed=3, n_train=20, n_val=2, n_test=7).generate(1, folder)
    assert [len(capped[s]) for s in SPLITS] == [20, 2, 7]
    for s in SPLITS:
        assert np.array_equal(levels_of(capped[s]), levels_of(whole[s])[: len(capped[s])])


@pytest.mark.parametrize("kind", ["random", "bit_reversal"])
def test_permuted_mnist_is_mnist_in_another_order(mnist, kind):
    folder, *_ = mnist
    task = PSMnist(permutation=kind, **ALL)
    assert sorted(task.order()) == list(range(784)) and not np.array_equal(task.order(), np.arange(784))
    straight, permuted = SMnist(**ALL).generate(1, folder), task.generate(1, folder)
    for s in SPLITS:
        back = np.empty_like(levels_of(permuted[s]))
        back[:, task.order()] = levels_of(permuted[s])
        assert np.array_equal(back, levels_of(straight[s]))
    seeded = np.array_equal(task.order(), PSMnist(permutation=kind, seed=1).order())
    assert seeded == (kind == "bit_reversal")


def test_bit_reversal_is_that_of_the_next_power_of_two():
    order = [0]
    while len(order) < 784:  # the order of twice the length: the even numbers in this order, then the odd ones
        order = [2 * i for i in order] + [2 * i + 1 for i in order]
    assert list(PSMnist(permutation="bit_reversal").order()) == [i for i in order if i < 784]


def test_digits_are_the_table_of_scikit_learn():
    from sklearn.datasets import load_digits

    table, labels = load_digits(return_X_y=True)
    splits = Digits().generate(1, None)
    assert {s: len(splits[s]) for s in SPLITS} == Digits().rows == {"train": 1200, "val": 297, "test": 300}
    found = np.concatenate([column(splits[s], "index") + 1497 * column(splits[s], "origin") for s in SPLITS])
    assert np.array_equal(np.sort(found), np.arange(1797))
    assert np.array_equal(np.concatenate([levels_of(splits[s]) for s in SPLITS]), table[found])
    assert np.array_equal(np.concatenate([column(splits[s], "label") for s in SPLITS]), labels[found])
    assert {i >= 1497 for i in found[-300:]} == {True}
    source_levels = table[:1497]
    inputs = Digits().inputs
    assert abs(source_levels.mean() - inputs.mean) < 0.01 and abs(source_levels.std() - inputs.std) < 0.01


@pytest.mark.parametrize(
    ("task", "pixels", "length", "tokens", "token_length"),
    [
        (Image, Levels(1, 122.6, 61.0, "l1"), 1024, Ids(258, 256, 257), 1024),
        (SCifar, Levels(3, 120.7, 64.15, "l1"), 1024, Ids(258, 256, 257), 3072),
        (SMnist, Levels(1, 33.3, 78.6, "l1"), 784, Ids(258, 256, 257), 784),
        (Digits, Levels(1, 4.88, 6.0, "l1"), 64, Ids(19, 17, 18), 64),
    ],
)
def test_encodings_read_the_same_data(task, pixels, length, tokens, token_length, tmp_path):
    assert (task().inputs, task().max_length, task().encoding) == (pixels, length, "pixels")
    assert task(pretrain_loss="ce").inputs.loss == "ce"
    as_tokens = task(encoding="tokens")
    assert (as_tokens.inputs, as_tokens.max_length, as_tokens.encoding) == (tokens, token_length, "tokens")
    folders = {data_folder(t, tmp_path) for t in (task(), as_tokens, task(pretrain_loss="ce"), task(mask_rate=0.2))}
    assert len(folders) == 1 and data_folder(task(seed=1), tmp_path) not in folders


def test_the_cache_returns_what_was_generated(tmp_path):
    task = Digits(n_train=50)
    made, cached = task.splits(tmp_path), Digits(n_train=50, encoding="tokens").splits(tmp_path)
    assert same(made, cached) and len(made["train"]) == 50
    label = column(made["train"], "label")
    majority = np.mean(column(made["test"], "label") == np.bincount(label).argmax())
    assert task.reference_lines(made) == {"majority": pytest.approx(majority)}


def test_the_picture_has_a_column_for_each_class(tmp_path):
    from matplotlib.image import imread

    from lra.tasks.pictures import GAP, LABEL

    task = Digits()
    splits = task.generate(1, None)
    task.picture(splits, tmp_path / "digits.png")
    sheet = np.rint(imread(tmp_path / "digits.png")[..., 0] * 255).astype(int)
    levels, label = levels_of(splits["train"]).reshape(-1, 8, 8), column(splits["train"], "label")
    for c in range(10):
        for i, row in enumerate(np.flatnonzero(label == c)[:4]):
            top, left = i * (96 + LABEL) + LABEL, c * (96 + GAP) + GAP
            assert np.array_equal(sheet[top : top + 96 : 12, left : left + 96 : 12], levels[row].astype(int) * 15)


def test_a_class_without_images_has_no_column(tmp_path):
    task = Digits(n_train=5)
    splits = task.generate(1, None)
    assert len(set(column(splits["train"], "label"))) < 10
    task.picture(splits, tmp_path / "few.png")
    assert (tmp_path / "few.png").stat().st_size > 0


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_a_preset(name):
    assert TASKS[name].name == name and build_task(name).summary
    config = read([name])
    assert config["task"]["name"] == name and config["budget"]["steps"] and config["model"]["d_model"]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Image, {"n_train": 45_001}, "n_train must be from 1 to 45000, or null for all 45000; got 45001"),
        (SMnist, {"n_val": 0}, "n_val must be from 1 to 6000.*got 0"),
        (Digits, {"n_test": 301}, "n_test must be from 1 to 300.*got 301"),
        (Image, {"encoding": "bytes"}, "encoding must be one of pixels, tokens; got 'bytes'"),
        (Image, {"pretrain_loss": "l2"}, "pretrain_loss must be one of l1, ce; got 'l2'"),
        (PSMnist, {"permutation": "reverse"}, "permutation must be one of random, bit_reversal; got 'reverse'"),
        (Image, {"n_train": 4.5}, "n_train must be an integer or null; got 4.5"),
    ],
)
def test_bad_options_are_named(task, options, message):
    with pytest.raises(ValueError, match=message):
        task(**options)


SQUARE = np.full((32, 32, 3), 7, np.uint8)


@pytest.mark.parametrize(
    ("task", "file", "message"),
    [
        (Image, png(SQUARE)[:60], "row 1 of the train images cannot be decoded, fetch the data again"),
        (Image, b"no image", "row 1 of the train images cannot be decoded"),
        (Image, png(SQUARE[:30]), "row 1 .*must be an image of 32 x 32 pixels; it is one of 32 x 30"),
        (Image, png(SQUARE, "P"), "row 1 .*must be 8-bit gray or RGB; its mode is P"),
        (SCifar, png(SQUARE[..., 0]), "task 'scifar': row 1 .*must be 8-bit RGB; its mode is L"),
    ],
    ids=["truncated", "no image", "size", "palette", "gray"],
)
def test_a_bad_image_is_named(task, file, message, tmp_path):
    files = [png(SQUARE)] * 20
    write(tmp_path, {"train": [files[0], file, *files], "test": files}, {"train": [0] * 22, "test": [0] * 20})
    with pytest.raises(ValueError, match=message):
        task().generate(2, tmp_path)


@pytest.mark.parametrize(
    ("n", "label", "options", "message"),
    [
        (20, 10, {}, r"labels must lie in 0\.\.9; that of row 0 of the train images is 10"),
        (20, -1, {}, r"labels must lie in 0\.\.9; that of row 0 of the train images is -1"),
        (20, 0, {}, r"gives 18 rows for train instead of 45000, 2 rows for val.*set n_train \(at most 18\), n_val"),
        (20, 0, {"n_train": 9, "n_test": 9}, r"'image' gives 2 rows for val instead of 5000.*set n_val \(at most 2\)"),
        (9, 0, {"n_train": 1, "n_val": 1, "n_test": 1}, "n_val must be at most 0 with this source; got 1"),
        (20, 0, {"n_train": 19, "n_val": 1, "n_test": 1}, "n_train must be at most 18 with this source; got 19"),
        (20, 0, {"n_train": 1, "n_val": 1, "n_test": 21}, "n_test must be at most 20 with this source; got 21"),
    ],
)
def test_a_bad_source_is_named(n, label, options, message, tmp_path):
    write(tmp_path, {s: [png(SQUARE)] * n for s in ("train", "test")}, {s: [label] * n for s in ("train", "test")})
    with pytest.raises(ValueError, match=message):
        Image(**options).generate(1, tmp_path)


def test_workers_are_checked():
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        Digits().generate(0, None)


def test_scikit_learn_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"scikit-learn, which is not installed: pip install 'linrnn\[lra\]'"):
        Digits().generate(1, None)


def test_levels_of_one_file_are_in_raster_order_with_the_channels_side_by_side():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert np.array_equal(decode_image(png(image), (2, 3, 3), "it"), np.arange(18))
