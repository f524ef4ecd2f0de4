"""The shapes of Pathfinder against Pillow's reduction and SciPy's dilation."""

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import grey_dilation

from lra.tasks.pathfinder_stamps import GEOMETRY, SEEDS, _bars, _dilate, pad, stamps

CASES = [(size, margin) for size, geometry in GEOMETRY.items() for margin in geometry.margins]


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_bars_are_pillows_reduction_of_finer_ones(size, margin):
    geometry = GEOMETRY[size]
    tables = stamps(geometry, margin)
    side = 2 * tables.reach + 1
    angle = np.deg2rad(np.array([0, 17, 90, 225]) - 180)
    fine = _bars(tables.reach * geometry.antialias, np.stack([np.sin(angle), np.cos(angle)], axis=1), geometry)
    dilated = _dilate(fine, margin * geometry.antialias)
    for i, degree in enumerate((0, 17, 90, 225)):
        for drawn, table in ((fine[i], tables.ink), (dilated[i], tables.mask)):
            reduced = np.array(Image.fromarray(drawn).resize((side, side), Image.Resampling.LANCZOS)).astype(int)
            assert np.abs(reduced - table[degree, :, :side]).max() <= 1  # Pillow's weights have 22 bits
            assert not table[degree, :, side:].any()


def test_dilation_is_scipys_with_a_disc():
    image = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    for radius in (1, 2, 3, 6):
        y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
        expected = grey_dilation(image, footprint=x**2 + y**2 <= radius**2, mode="constant", cval=0)
        np.testing.assert_array_equal(_dilate(image[None], radius)[0], expected)


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_bars_have_their_length_and_direction(size, margin):
    geometry, tables = GEOMETRY[size], stamps(GEOMETRY[size], margin)
    y, x = np.mgrid[: 2 * tables.reach + 1, :32] - tables.reach
    ink = tables.ink.astype(float)
    middle = np.stack([(ink * axis).sum((1, 2)) for axis in (y, x)], axis=1) / ink.sum((1, 2))[:, None]
    degrees = np.deg2rad(np.arange(SEEDS) - 180)
    angle = np.concatenate([degrees, np.arctan2(*tables.candidate.T) + np.pi])
    expected = geometry.length / 2 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    # pixels of the finer canvas are half as large
    assert np.abs(middle - expected).max() < 0.4
    # a whole canvas of odd width shrinks by a little less than the antialiasing; clipped ripples add to thin bars
    fine, side = 2 * tables.reach * geometry.antialias + 1, 2 * tables.reach + 1
    area = geometry.thickness * geometry.antialias * (geometry.length * geometry.antialias + 1) * (side / fine) ** 2
    assert 0.95 < (ink.sum((1, 2)) / 255).mean() / area < 1.25
    # a candidate is on its circle, to the pixel, and none is twice there
    radius = np.hypot(*tables.candidate.T)
    assert np.abs(radius - geometry.length - margin).max() < np.sqrt(2)
    assert len(np.unique(tables.candidate, axis=0)) == len(tables.candidate) > 5 * (geometry.length + margin)


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_straight_on_weighs_most_and_back_nothing(size, margin):
    tables, continuity = stamps(GEOMETRY[size], margin), GEOMETRY[size].continuity
    degrees = np.arange(SEEDS) - 180
    candidate = np.rad2deg(np.arctan2(*tables.candidate.T))
    turn = np.abs((degrees[:, None] - candidate + 180) % 360 - 180)
    weight = tables.turn[:SEEDS]
    assert (weight[turn * continuity > 90.001] == 0).all() and (weight[turn * continuity < 89] > 0).all()
    for row, turns in zip(weight.astype(int), turn, strict=True):
        assert (np.diff(row[np.argsort(turns)]) <= 0).all()


@pytest.mark.parametrize(("size", "least", "most"), [(32, 25, 45), (128, 280, 340), (256, 360, 360)])
def test_directions_that_the_generator_of_2019_loses(size, least, most):
    seeded = stamps(GEOMETRY[size], GEOMETRY[size].margins[0]).seeded
    assert least <= seeded.sum() <= most
    if size == 32:  # towards the upper left
        lit = np.flatnonzero(seeded) - 180
        assert lit.min() > -165 and lit.max() < -105


def test_every_stamp_fits_into_the_frame():
    for size, margin in CASES:
        tables = stamps(GEOMETRY[size], margin)
        assert pad(GEOMETRY[size]) >= tables.reach
        for table in (tables.ink, tables.mask, tables.dilated, tables.disc[None]):
            inner = table[:, 1:-1, 1 : 2 * tables.reach]
            assert table.shape[1] == 2 * tables.reach + 1 <= 32
            assert (table >= 64).sum() == (inner >= 64).sum()  # only faint ripples reach the edge
