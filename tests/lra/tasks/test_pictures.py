"""Contact sheets: the pixels in the file are the images."""

import numpy as np
import pytest

from lra.tasks.pictures import GAP, LABEL, contact_sheet


@pytest.mark.parametrize(
    ("shape", "factor"), [((7, 8, 8), 12), ((3, 28, 20, 3), 4), ((1, 128, 128), 1), ((2, 300, 200), 1)]
)
def test_every_image_is_in_its_place(shape, factor, tmp_path):
    from matplotlib.image import imread

    levels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    contact_sheet(levels, [f"label {i}" for i in range(len(levels))], tmp_path / "sheet.png", columns=3)
    sheet = np.rint(imread(tmp_path / "sheet.png")[..., :3] * 255).astype(np.uint8)
    height, width = shape[1] * factor, shape[2] * factor
    for i, image in enumerate(levels):
        top, left = i // 3 * (height + LABEL) + LABEL, i % 3 * (width + GAP) + GAP
        shown = sheet[top : top + height, left : left + width]
        pixels = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
        assert np.array_equal(shown, np.kron(pixels, np.ones((factor, factor, 1), np.uint8)))
        above = sheet[top - LABEL : top, left : left + width]
        assert above.min() < 128 < above.max()  # dark text on white
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("levels", "labels", "columns", "message"),
    [
        (np.zeros((2, 4, 4)), ["a", "b"], 2, "levels must be uint8, got float64"),
        (np.zeros((4, 4), np.uint8), ["a"], 2, r"levels must be \(n, height, width\).*got \(4, 4\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), ["a", "b"], 2, r"levels must be .*got \(2, 4, 4, 2\)"),
        (np.zeros((0, 4, 4), np.uint8), [], 2, r"levels must be .*got \(0, 4, 4\)"),
        (np.zeros((2, 4, 4), np.uint8), ["a"], 2, "labels must be one text per image: 2, got 1"),
        (np.zeros((1, 4, 4), np.uint8), ["a"], 0, "columns must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(levels, labels, columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        contact_sheet(levels, labels, tmp_path / "sheet.png", columns)
    assert not list(tmp_path.iterdir())
