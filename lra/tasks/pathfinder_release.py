"""The images of the Long Range Arena's release, read from the folder in which the user has unpacked it.

A difficulty is a folder such as `pathfinder32/curv_contour_length_14` with `imgs/<batch>/sample_<i>.png` and
`metadata/<batch>.npy`. Despite its name a metadata file is text, one line per image: folder, file, number,
label and settings.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lra.tasks.decoding import decode_image
from lra.tasks.sources import SourceError, describe_files

if TYPE_CHECKING:
    from lra.tasks.pathfinder import Pathfinder

FOLDERS = {"hard": "curv_contour_length_14", "mid": "curv_contour_length_9", "easy": "curv_baseline"}
_PLACES = ("", "lra_release", "lra_release/lra_release")  # the archive unpacks into a folder in a folder
_CHUNK = 200  # images decoded by a thread at a time


def find_release(task: Pathfinder, data_dir: Path) -> Path | None:
    """Returns the folder of the task's size and difficulty; None where there is none."""
    inner = Path(f"pathfinder{task.size}", FOLDERS[task.difficulty])
    found = (Path(data_dir).expanduser() / place / inner for place in _PLACES)
    return next((folder for folder in found if (folder / "metadata").is_dir()), None)


def read_release(
    task: Pathfinder, data_dir: Path | None, workers: int
) -> tuple[np.ndarray[Any, Any], dict[str, np.ndarray[Any, Any]]]:
    """Returns levels (n, size^2) uint8, and label and index (its line in all metadata), in the order of the metadata.

    Files of no bytes, of which the release has one, are left out, and then there may be one image fewer.

    Raises:
        ValueError: no release, a line of metadata that is none, a missing or damaged image, or too few images.
    """
    from tqdm.auto import tqdm

    folder = _folder(task, data_dir)
    named = _rows(folder)
    rows = [(index, *row) for index, row in enumerate(named) if _bytes(row[0])][: task.n_images]
    if len(named) < task.n_images:
        raise SourceError(
            f"{folder} names {len(named)} images and n_images is {task.n_images}: a part of the release is missing; to "
            "take what is there, which is then not the benchmark, lower n_images"
        )
    if len(rows) < 10:
        raise SourceError(f"{folder} holds {len(rows)} images; at least 10 are needed")
    levels = np.empty((len(rows), task.size**2), np.uint8)

    def decode(start: int) -> int:
        chunk = rows[start : start + _CHUNK]
        for i, (_, path, _) in enumerate(chunk, start):
            levels[i] = decode_image(path.read_bytes(), (task.size, task.size, 1), str(path))
        return len(chunk)

    with (
        tqdm(total=len(rows), desc=f"{task.name} images", unit="image", disable=None, leave=False) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        jobs = [pool.submit(decode, start) for start in range(0, len(rows), _CHUNK)]
        try:
            for job in jobs:
                progress.update(job.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C and a bad image end the work at once
            raise
    columns: dict[str, np.ndarray[Any, Any]] = {
        "label": np.array([label for _, _, label in rows], np.uint8),
        "index": np.array([index for index, _, _ in rows], np.int32),
    }
    return levels, columns


def describe_release(task: Pathfinder, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
    """Returns the release's metadata files with their SHA-256, and which images are left out for being empty.

    Without `hashes` no file is read or looked for, and the empty images are not told.
    """
    folder = _folder(task, data_dir)
    described = {
        "release": folder.relative_to(folder.parents[1]).as_posix(),
        **describe_files(_metadata(folder), hashes),
    }
    if hashes:
        described["empty"] = [path.relative_to(folder).as_posix() for path, _ in _rows(folder) if not _bytes(path)]
    return described


def _folder(task: Pathfinder, data_dir: Path | None) -> Path:
    folder = None if data_dir is None else find_release(task, data_dir)
    if folder is None:
        wanted = f"pathfinder{task.size}/{FOLDERS[task.difficulty]}/metadata"
        where = "no data_dir is given" if data_dir is None else f"there is no {wanted} in {data_dir}"
        cure = "unpack lra_release.gz of the Long Range Arena and name the folder with --data-dir"
        raise SourceError(f"images: release needs the release's files, and {where}; {cure}, or take images: generated")
    return folder


def _metadata(folder: Path) -> list[Path]:
    files = [path for path in (folder / "metadata").glob("*.npy") if path.stem.isdecimal()]
    if not files:
        raise SourceError(f"{folder / 'metadata'} holds no metadata, such as 0.npy; unpack lra_release.gz again")
    return sorted(files, key=lambda path: int(path.stem))


def _rows(folder: Path) -> list[tuple[Path, int]]:
    """Every image that the metadata name, with its label."""
    rows = []
    for file in _metadata(folder):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            words = line.split()
            if len(words) < 4 or words[3] not in ("0", "1"):
                raise SourceError(
                    f"line {number} of {file} must be: folder, file, number, label 0 or 1, ...; got {line!r}"
                )
            rows.append((folder / words[0] / words[1], int(words[3])))
    return rows


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise SourceError(f"{path} is named in the metadata and is missing; unpack lra_release.gz again") from error
