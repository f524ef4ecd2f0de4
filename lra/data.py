"""The cache of data sets: made once, checked on every load, shared by concurrent runs.

A data set is a folder `<cache>/<task>/<key>` of Arrow files in the format of `datasets`, one folder per split, with a
manifest.json: the configuration, rows and a SHA-256 of the values per split (the same on every machine, whatever the
versions of the file format), and the SHA-256 of every file. The key is a hash of the configuration, so a changed option
is another data set. The folder appears by renaming a finished temporary one: it is complete or absent, whatever
interrupts the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.tasks.base import SPLITS, chunks

if TYPE_CHECKING:
    from datasets import Dataset

    from lra.tasks import Task

MANIFEST = "manifest.json"


class CacheError(RuntimeError):
    """A cached data set is damaged; the message names the file and the cure."""


def default_cache_dir() -> Path:
    """Returns $LRA_CACHE, or `lra` in $XDG_CACHE_HOME or in ~/.cache."""
    if given := os.environ.get("LRA_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lra"


def data_key(task: Task) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of what decides the task's data."""
    canonical = json.dumps(task.data_config(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def data_folder(task: Task, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the folder in which the task's data set is, or would be."""
    return Path(cache_dir or default_cache_dir()).expanduser() / task.name / data_key(task)


def load(
    task: Task,
    cache_dir: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    force: bool = False,
    data_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Dataset]:
    """Returns the splits train, val and test of a task, memory-mapped, making them first if they are not cached.

    Args:
        task: what to load.
        cache_dir: folder of all data sets; None for `default_cache_dir()`.
        workers: threads that generate; None for one per core. The data do not depend on it.
        force: make them even if cached, replacing what is there.
        data_dir: folder of the source files of a task on real data; None for the hub. What is cached comes first, and
            if it was made of other files than those in the folder, by their names and sizes, there is a warning.

    Raises:
        CacheError: the cached files are not those that were written.
        ValueError: the task cannot be made as configured, or its source is missing or of another form.
    """
    from filelock import FileLock

    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    source = None if data_dir is None else Path(data_dir).expanduser()
    if source is not None and not source.is_dir():
        raise ValueError(f"data_dir: no folder {str(source)!r}")

    folder = data_folder(task, cache_dir)
    if folder.exists() and not force and not os.access(folder.parent, os.W_OK):
        _compare_source(task, folder, source)
        return _read(task, folder)  # nobody here can write to a shared, read-only cache, so nothing is to be locked
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if force or not folder.exists():
            _write(task, folder, workers, source)
        else:
            _compare_source(task, folder, source)
        return _read(task, folder)


def _write(task: Task, folder: Path, workers: int | None, source: Path | None) -> None:
    """Generates into a temporary folder beside `folder`, then puts it in place. Call it under the lock."""
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed
        shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        made = temporary / "new"
        splits = task.generate(workers, source)
        _check_columns(task, splits)
        for name in SPLITS:
            _save(splits[name], made / name)
        files = [path for path in sorted(made.rglob("*")) if path.is_file()]
        manifest = {
            "config": task.data_config(),
            "source": task.source(source),
            "rows": {name: len(splits[name]) for name in SPLITS},
            "values": {name: _values_sha256(splits[name]) for name in SPLITS},
            "files": {path.relative_to(made).as_posix(): _sha256(path) for path in files},
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(temporary / "old")
        made.rename(folder)
    finally:
        shutil.rmtree(temporary)


def _check_columns(task: Task, splits: Mapping[str, Dataset]) -> None:
    """Refuses to store what no cell could read."""
    wanted = {"input_ids", "labels" if task.dense else "label", *(["input_ids_2"] if task.two_inputs else [])}
    for name in SPLITS:
        if missing := sorted(wanted - set(splits[name].column_names)):
            raise ValueError(f"task {task.name!r}: split {name} lacks the columns {', '.join(missing)}")
        if not len(splits[name]):
            raise ValueError(f"task {task.name!r}: split {name} is empty")


def _save(split: Dataset, folder: Path) -> None:
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()  # writing takes a fraction of a second
    try:
        split.save_to_disk(folder)
    finally:
        if bars:
            datasets.enable_progress_bars()


def origin(task: Task, cache_dir: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Returns what a cached data set is: `fingerprint`, a hash of its values, and `source`, where they come from."""
    manifest = _manifest(task, data_folder(task, cache_dir))
    values = json.dumps(manifest["values"], sort_keys=True)
    return {"fingerprint": hashlib.sha256(values.encode()).hexdigest()[:16], "source": manifest.get("source", {})}


def _compare_source(task: Task, folder: Path, data_dir: Path | None) -> None:
    """Warns if a cached data set was not made of what the user's folder holds; hashes are not compared."""
    from lra.tasks.sources import SourceError

    recorded = _manifest(task, folder).get("source")
    if data_dir is None or recorded is None:
        return
    try:
        found = task.source(data_dir, hashes=False)
    except SourceError:
        return  # the folder does not hold this task's files, but perhaps another's
    one, other = _source_name(recorded), _source_name(found)
    if one != other:
        warnings.warn(
            f"the cached data of task {task.name!r} in {folder} were made of {one}, and are used; data_dir {data_dir} "
            f"holds {other}: to make them of that, run `lra data {task.name} --force` with the same options",
            stacklevel=3,
        )


def _source_name(source: Mapping[str, Any]) -> str:
    """What a source is, without hashes and what is derived from them, in the order of names."""
    files = [f"{name} ({file['bytes']:,} bytes)" for name, file in sorted(source.get("files", {}).items())]
    named = [f"{key} {source[key]}" for key in sorted(source) if isinstance(source[key], str)]
    return ", ".join(named + files) or "no source"


def _read(task: Task, folder: Path) -> dict[str, Dataset]:
    import datasets

    manifest = _manifest(task, folder)
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise _damaged(task, folder, name, "is missing")
        if _sha256(folder / name) != expected:
            raise _damaged(task, folder, name, "has changed since it was written (its SHA-256 differs)")
    return {name: datasets.load_from_disk(folder / name) for name in SPLITS}


def _manifest(task: Task, folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise _damaged(task, folder, MANIFEST, "is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["config"] != task.data_config():
            raise _damaged(task, folder, MANIFEST, "describes another data set")
        parts = {f"{name}/state.json" for name in SPLITS}
        if not parts <= set(manifest["files"]) or "values" not in manifest:
            raise _damaged(task, folder, MANIFEST, "lacks a part")
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(task, folder, MANIFEST, "cannot be read as a manifest") from error
    return manifest


def _damaged(task: Task, folder: Path, name: str, what: str) -> CacheError:
    return CacheError(
        f"{folder / name} {what}; to make the data again, run `lra data {task.name} --force` "
        f"with the same options of the task, or delete {folder}"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _values_sha256(split: Dataset) -> str:
    """Hashes the columns in the order of their names: name, type and values; of lists the lengths and what they hold.

    It is the same however the rows are cut into Arrow arrays.
    """
    import pyarrow as pa

    digest = hashlib.sha256()
    for name in sorted(split.column_names):
        lengths: list[Any] = []  # of the lists at each depth
        for i, part in enumerate(chunks(split, name)):
            if i == 0:
                digest.update(f"{name}: {part.type}\n".encode())
            depth = 0
            while pa.types.is_list(part.type):
                if depth == len(lengths):
                    lengths.append(hashlib.sha256())
                lengths[depth].update(part.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                part, depth = part.flatten(), depth + 1
            digest.update(part.to_numpy(zero_copy_only=False).tobytes())
        for of_depth in lengths:
            digest.update(of_depth.digest())
    return digest.hexdigest()
