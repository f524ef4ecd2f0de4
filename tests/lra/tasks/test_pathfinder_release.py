"""The Long Range Arena's own Pathfinder images, as its archive lays them out, in miniature."""

import numpy as np
import pytest
from PIL import Image

from lra.tasks import build_task
from lra.tasks.base import column, flat_column

LABELS = [0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]


@pytest.fixture
def release(tmp_path):
    """Twelve images in the batches 0, 2 and 10; image i is of level 20 i but for one pixel."""
    folder = tmp_path / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for batch, rows in {0: range(5), 2: range(5, 8), 10: range(8, 12)}.items():
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        lines = []
        for k, i in enumerate(rows):
            pixels = np.full((32, 32), 20 * i, np.uint8)
            pixels[i, 3] = 255
            Image.fromarray(pixels).save(folder / "imgs" / str(batch) / f"sample_{k}.png")
            lines.append(f"imgs/{batch} sample_{k}.png {k} {LABELS[i]} 1.0 14 4 2 0.5 1 1")
        (folder / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    return folder


def task(**options):
    return build_task("pathfinder", images="release", **{"n_images": len(LABELS), **options})


def test_the_release_is_read_in_the_order_of_its_metadata(release):
    splits = task().generate(2, release.parents[2])
    assert {name: len(split) for name, split in splits.items()} == {"train": 9, "val": 1, "test": 2}
    assert [label for name in splits for label in splits[name]["label"]] == LABELS
    assert [i for name in splits for i in splits[name]["index"]] == list(range(12))
    test = flat_column(splits["test"], "input_ids").reshape(2, 32, 32)
    assert test[0, 0, 0] == 200 and test[1, 11, 3] == 255
    assert task().rows is None and task().strata(splits["test"]) == {}
    assert set(task().reference_lines(splits)) == {"majority"}
    source = task().source(release.parents[2])
    assert list(source["files"]) == ["0.npy", "2.npy", "10.npy"] and source["empty"] == []


def test_an_empty_image_is_left_out_and_counted(release):
    (release / "imgs" / "2" / "sample_1.png").write_bytes(b"")
    splits = task(n_images=10).generate(1, release.parents[1])
    assert [len(split) for split in splits.values()] == [8, 1, 1]
    assert [i for name in splits for i in splits[name]["index"]] == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]
    assert column(splits["test"], "label")[0] == LABELS[10]
    assert task().source(release.parents[1])["empty"] == ["imgs/2/sample_1.png"]
    assert sum(map(len, task().generate(1, release.parents[1]).values())) == 11, "the one left out is no missing part"
    for path in (release / "imgs" / "0").glob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds 6 images; at least 10 are needed"):
        task().generate(1, release.parents[1])


def test_a_source_without_hashes_reads_no_file(release, monkeypatch):
    whole = task().source(release.parents[2])
    monkeypatch.setattr("pathlib.Path.open", None)
    quick = task().source(release.parents[2], hashes=False)
    assert quick["release"] == whole["release"]
    assert {name: file["bytes"] for name, file in whole["files"].items()} == {
        name: file["bytes"] for name, file in quick["files"].items()
    }


@pytest.mark.parametrize("name", ["pathfinder", "pathx", "pathx256"])
def test_the_benchmark_has_200_000_images_of_every_size(name):
    assert build_task(name, n_images=200_000).rows == build_task(name).benchmark_rows


def test_a_release_is_not_read_in_place_of_drawn_images_unasked(release, tmp_path):
    drawn = build_task("pathfinder", n_images=10)
    with pytest.raises(ValueError, match="holds the Long Range Arena's images: read them with images: release"):
        drawn.generate(1, release.parents[1])
    (tmp_path / "other").mkdir()
    assert len(drawn.generate(1, tmp_path / "other")["train"]) == 8


def damage(release, what):
    image, metadata = release / "imgs" / "0" / "sample_2.png", release / "metadata" / "0.npy"
    if what == "missing":
        image.unlink()
    elif what == "cut":
        image.write_bytes(image.read_bytes()[:60])
    elif what == "size":
        Image.new("L", (31, 32)).save(image)
    elif what == "line":
        metadata.write_text(metadata.read_text() + "imgs/0 sample_5.png 5 2\n")
    elif what == "few":
        (release / "metadata" / "10.npy").unlink()
    elif what == "none":
        for file in (release / "metadata").iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "sample_2.png is named in the metadata and is missing"),
        ("cut", "sample_2.png cannot be decoded"),
        ("size", "sample_2.png must be an image of 32 x 32 pixels; it is one of 31 x 32"),
        ("line", r"line 6 of .*0\.npy must be: folder, file, number, label 0 or 1, .*sample_5"),
        ("few", "names 8 images and n_images is 12: a part of the release is missing; .* lower n_images"),
        ("none", "holds no metadata, such as 0.npy"),
    ],
)
def test_a_damaged_release_is_refused_in_one_line(release, what, message):
    damage(release, what)
    with pytest.raises(ValueError, match=message) as refused:
        task().generate(1, release.parents[1])
    assert "\n" not in str(refused.value)


def test_no_release_is_refused_with_what_to_do(release, tmp_path):
    with pytest.raises(ValueError, match="no data_dir is given; unpack lra_release"):
        task().generate(1, None)
    with pytest.raises(ValueError, match="there is no pathfinder32/curv_contour_length_9/metadata in"):
        task(difficulty="mid").generate(1, tmp_path)
    with pytest.raises(ValueError, match="pathfinder128/curv_contour_length_14"):
        build_task("pathx", images="release").source(tmp_path)
