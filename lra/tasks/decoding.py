"""Encoded images, such as PNG files in a column, to arrays of levels, by threads."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 500  # images decoded by a thread at a time


def decode_images(
    source: Mapping[str, Dataset], shape: tuple[int, int, int], n_classes: int, workers: int | None, name: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Decodes every split: a binary column of image files and an integer `label` to levels and labels.

    Args:
        source: splits of two columns, the image first.
        shape: height, width and channels of every image: 1 (a colour image becomes gray, 0.299 R + 0.587 G + 0.114 B,
            rounded) or 3 (a gray image is refused).
        n_classes: labels lie below it.
        workers: threads; None for one per core.
        name: of the task, for the progress bar.

    Returns:
        For each split levels (n, height * width * channels) uint8, channels fastest, and labels (n,) int64.

    Raises:
        ValueError: a row that is no image, of another size or kind, or of an unknown class; it is named.
    """
    from tqdm.auto import tqdm

    total = sum(len(split) for split in source.values())
    decoded = {}
    with (
        tqdm(total=total, desc=f"{name} images", unit="image", disable=None, leave=False) as progress,
        ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool,
    ):
        for split, rows in source.items():
            table = rows.with_format("arrow")[:]
            files, labels = table.column(0), table.column("label").to_numpy()
            levels = np.empty((len(files), shape[0] * shape[1] * shape[2]), np.uint8)

            def decode(start: int, files=files, levels=levels, split=split) -> int:
                chunk = files.slice(start, _CHUNK).to_pylist()
                for i, file in enumerate(chunk, start):
                    levels[i] = decode_image(file, shape, f"task {name!r}: row {i} of the {split} images")
                return len(chunk)

            jobs = [pool.submit(decode, start) for start in range(0, len(files), _CHUNK)]
            try:
                for job in as_completed(jobs):
                    progress.update(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)  # Ctrl-C and a bad image end the work at once
                raise
            decoded[split] = levels, _labels(labels, n_classes, split)
    return decoded


def decode_image(file: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """Decodes one image file to its levels, (height * width * channels,) uint8."""
    from PIL import Image, UnidentifiedImageError

    height, width, channels = shape
    try:
        with Image.open(io.BytesIO(file)) as image:
            if image.size != (width, height):
                size = f"{image.size[0]} x {image.size[1]}"
                raise ValueError(f"{where} must be an image of {width} x {height} pixels; it is one of {size}")
            if image.mode not in ("L", "RGB") or (channels == 3 and image.mode != "RGB"):
                allowed = "8-bit gray or RGB" if channels == 1 else "8-bit RGB"
                raise ValueError(
                    f"{where} must be {allowed}; its mode is {image.mode}: name another source by --data-dir"
                )
            return np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(-1)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # what Pillow raises for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be decoded, fetch the data again ({reason})") from error


def _labels(labels: np.ndarray, n_classes: int, split: str) -> np.ndarray:
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        raise ValueError(
            f"labels must lie in 0..{n_classes - 1}; that of row {wrong[0]} of the {split} images is {labels[wrong[0]]}"
        )
    return labels
