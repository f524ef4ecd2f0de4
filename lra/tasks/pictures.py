"""Contact sheets: labelled images of a task, pixel for pixel in one PNG, to look at before training on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lra.files import write_whole

SHOWN = 96  # pixels that the longer side of an image fills at least: smaller images are enlarged by a whole factor
GAP, LABEL, DPI = 8, 18, 100  # between the images, and above each for its label; pixels


def contact_sheet(levels: np.ndarray, labels: Sequence[str], path: Path, columns: int = 10) -> None:
    """Writes a PNG with the images row by row, each below its label, enlarged by a whole number and never smoothed.

    Args:
        levels: (n, height, width) gray or (n, height, width, 3) red, green and blue; uint8, 0 is black.
        labels: n texts.
        path: the PNG, written whole or not at all.
        columns: images in a row.

    Raises:
        ValueError: no image, another shape or dtype, or another number of labels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    _check(levels, labels, columns)
    n, height, width = levels.shape[:3]
    factor = max(1, -(-SHOWN // max(height, width)))
    height, width = height * factor, width * factor
    columns = min(columns, n)
    rows = -(-n // columns)

    sheet = np.full((rows * (height + LABEL) + GAP, columns * (width + GAP) + GAP, 3), 255, np.uint8)
    figure = Figure(figsize=(sheet.shape[1] / DPI, sheet.shape[0] / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    for i, (image, label) in enumerate(zip(levels, labels, strict=True)):
        top, left = i // columns * (height + LABEL) + LABEL, i % columns * (width + GAP) + GAP
        sheet[top : top + height, left : left + width] = enlarge(image, factor)
        x, y = (left + width / 2) / sheet.shape[1], 1 - (top - 3) / sheet.shape[0]
        figure.text(x, y, label, fontsize=8, ha="center", va="baseline")
    figure.figimage(sheet, origin="upper")
    write_whole(path, lambda p: figure.savefig(p, dpi=DPI, format="png"))


def enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    """(height, width) or (height, width, 3) -> (height * factor, width * factor, 3), each pixel a square."""
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=-1)
    return colour.repeat(factor, axis=0).repeat(factor, axis=1)


def _check(levels: np.ndarray, labels: Sequence[str], columns: int) -> None:
    if levels.dtype != np.uint8:
        raise ValueError(f"levels must be uint8, got {levels.dtype}")
    if not (levels.ndim == 3 or (levels.ndim == 4 and levels.shape[3] == 3)) or 0 in levels.shape:
        raise ValueError(f"levels must be (n, height, width) or (n, height, width, 3), got {levels.shape}")
    if len(labels) != len(levels):
        raise ValueError(f"labels must be one text per image: {len(levels)}, got {len(labels)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
