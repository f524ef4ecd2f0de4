"""Real data: data sets of the Hugging Face hub by name, or parquet files of the same schema in a folder of the user's.

What is wrong is said in one line that names the file or data set and the cure. Nothing is written here: a download that
breaks off is completed by the next one, since the hub's client keeps unfinished files apart.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

SPLITS = ("train", "test")
# `train-00000-of-00002.parquet` is the hub's name of a shard
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
# the folder that a data set without configurations has in its repository, as `hf download` copies it
_PLAIN = "plain_text"


class SourceError(ValueError):
    """A source cannot be read; the message names it, what is wrong with it and what to do."""


class RealTask(Protocol):
    """What this module asks of a task on real data."""

    @property
    def name(self) -> str: ...
    @property
    def hub(self) -> str | None: ...
    @property
    def folders(self) -> Sequence[str]:
        """Names under which the source's files may lie in the user's folder, such as `imdb`."""


def read_source(task: RealTask, data_dir: Path | None, columns: dict[str, str]) -> dict[str, Dataset]:
    """Returns the source's rows, in their order: {"train": ..., "test": ...}.

    Args:
        task: whose source; its `hub`, and its `folders` in `data_dir`.
        data_dir: a folder with `train*.parquet` and `test*.parquet`, itself or in a folder called like the task or like
            one of its `folders`; None for the hub.
        columns: name to kind: `text` (returned as string), `label` (any integer; int64) or `image` (an encoded image,
            such as the bytes of a PNG; binary). `img|image` accepts either name and returns the first.

    Raises:
        SourceError: no network, no files, a damaged file, or another schema.
    """
    from lra.tasks.in_memory import in_memory

    if data_dir is None:
        tables = {split: _checked(table, columns, where) for split, (table, where) in _from_hub(task).items()}
    else:
        tables = {split: _read(paths, columns) for split, paths in find_files(task, data_dir).items()}
    return {split: in_memory(table) for split, table in tables.items()}


def describe_source(task: RealTask, data_dir: Path | None, hashes: bool = True) -> dict[str, Any]:
    """Returns where the data come from: {"hub": name}, or the files; see `describe_files`."""
    if data_dir is None:
        return {"hub": task.hub}
    return describe_files([path for paths in find_files(task, data_dir).values() for path in paths], hashes)


def describe_files(paths: Sequence[Path], hashes: bool = True) -> dict[str, Any]:
    """Returns {"files": {name: {"bytes", "sha256"}}}; without `hashes` no file is read, and there are bytes alone."""
    described: dict[str, dict[str, Any]] = {path.name: {"bytes": path.stat().st_size} for path in paths}
    if hashes:
        for path in paths:
            with path.open("rb") as file:
                described[path.name]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return {"files": described}


def count_rows(task: RealTask, found: Mapping[str, int], expected: Mapping[str, int] | None) -> dict[str, int]:
    """Returns how many of the `found` rows each split has: its option n_<split>, or all of them.

    Args:
        expected: all of them, as the benchmark has it; None where no number is known.

    Raises:
        SourceError: a split without a cap has not the rows expected, or one with a cap has fewer, or none.
    """
    caps = {split: getattr(task, f"n_{split}") for split in found}
    other = [s for s, n in found.items() if caps[s] is None and expected is not None and n != expected[s]]
    if other:
        wanted = ", ".join(
            f"{found[split]} rows for {split} instead of {expected[split]}" for split in other if expected
        )
        cure = ", ".join(f"n_{split} (at most {found[split]})" for split in other)
        raise SourceError(
            f"the source of task {task.name!r} gives {wanted}: it is another one, or a part of it is missing; to take "
            f"what is there, which is then not the benchmark, set {cure}"
        )
    for split, n in found.items():
        if n < (caps[split] or 1):
            raise SourceError(f"n_{split} must be at most {n} with this source; got {caps[split]}")
    return {split: caps[split] or n for split, n in found.items()}


def search_folders(task: RealTask, data_dir: Path) -> list[Path]:
    """Returns the folders in which the task's files may lie, the most specific first.

    Raises:
        SourceError: `data_dir` is no folder.
    """
    data_dir = Path(data_dir).expanduser()
    if not data_dir.is_dir():
        raise SourceError(f"data_dir must be a folder; there is none at {data_dir}")
    places = [*(data_dir / name for name in dict.fromkeys((task.name, *task.folders))), data_dir]
    return [folder for place in places for folder in (place, place / _PLAIN) if folder.is_dir()]


def find_files(task: RealTask, data_dir: Path) -> dict[str, list[Path]]:
    """Returns the parquet files of each split, in the order of the shards.

    Raises:
        SourceError: there are none, or a shard is missing.
    """
    for folder in search_folders(task, data_dir):
        found = {split: _split_files(folder, split) for split in SPLITS}
        if all(found.values()):
            return found
        for split in SPLITS:
            if any(found.values()) and not found[split]:
                raise SourceError(f"{folder} holds no {split}*.parquet, which task {task.name!r} needs")
    names = " or ".join(dict.fromkeys((task.name, *task.folders)))
    cure = f"; without --data-dir the data come from the hub ({task.hub})" if task.hub else ""
    raise SourceError(
        f"no train*.parquet and test*.parquet of task {task.name!r} in {data_dir}, nor in a folder {names} there{cure}"
    )


def _split_files(folder: Path, split: str) -> list[Path]:
    # `train-films.parquet` holds a column beside train's, not rows of it
    paths = [path for path in sorted(folder.glob(f"{split}*.parquet")) if not path.stem.endswith("-films")]
    shards = [_SHARD.search(path.stem) for path in paths]
    if any(shards):
        counts = {int(shard[2]) if shard else 0 for shard in shards}
        if len(counts) > 1 or counts != {len(paths)}:
            raise SourceError(
                f"{folder} holds {', '.join(path.name for path in paths)}: not the whole of one set of shards; "
                "copy the missing files there, or remove those that are too many"
            )
    return paths


def _read(paths: Sequence[Path], columns: dict[str, str]) -> pa.Table:
    import pyarrow as pa

    return pa.concat_tables([read_columns(path, columns) for path in paths])


def read_columns(path: Path, columns: dict[str, str]) -> pa.Table:
    """Reads columns of a parquet file; see `read_source`.

    Raises:
        SourceError: it is none, truncated or damaged, or of another schema.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read()
        table.validate(full=True)  # also that strings are UTF-8
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"{path} cannot be read as parquet, it may be truncated or damaged; fetch it again ({_one_line(error)})"
        ) from error
    return _checked(table, columns, path)


def _from_hub(task: RealTask) -> dict[str, tuple[pa.Table, str]]:
    import datasets

    try:
        splits = datasets.load_dataset(task.hub, split=list(SPLITS))
    except Exception as error:  # of the hub's client, of httpx, of the file system: what matters is the cure
        raise SourceError(
            f"the data of task {task.name!r} could not be had from the hub as {task.hub} ({_one_line(error)}); nothing "
            "half-written is left: run again with a network, or give --data-dir DIR, a folder with train*.parquet and "
            "test*.parquet of the same columns"
        ) from error
    return {
        name: (split.with_format("arrow")[:], f"{task.hub} ({name})")
        for name, split in zip(SPLITS, splits, strict=True)
    }


def _checked(table: pa.Table, columns: dict[str, str], where: Path | str) -> pa.Table:
    """Returns the asked columns alone, each in the type of its kind."""
    import pyarrow as pa

    checked = {}
    for names, kind in columns.items():
        allowed = names.split("|")
        name = next((name for name in allowed if name in table.column_names), None)
        if name is None:
            raise SourceError(
                f"{where} lacks the column {' or '.join(allowed)}; its columns are {', '.join(table.column_names)}"
            )
        column = _values(table.column(name), kind)
        if column is None:
            words = {"text": "strings", "label": "integers", "image": "encoded images (bytes)"}[kind]
            raise SourceError(f"column {name} of {where} must hold {words}; it holds {table.schema.field(name).type}")
        if column.null_count:
            raise SourceError(f"column {name} of {where} lacks {column.null_count} of its {len(column)} values")
        checked[allowed[0]] = column
    if table.num_rows == 0:
        raise SourceError(f"{where} has no rows")
    return pa.table(checked)


def _values(column: pa.ChunkedArray, kind: str) -> pa.ChunkedArray | None:
    """The column in the type of its kind; None if it is not of that kind."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held = column.type
    if kind == "text" and (pa.types.is_string(held) or pa.types.is_large_string(held)):
        return column.cast(pa.string())
    if kind == "label" and pa.types.is_integer(held):
        return column.cast(pa.int64())
    if kind == "image":
        # the hub's images are structs of the file's bytes and of its name
        if pa.types.is_struct(held) and held.get_field_index("bytes") >= 0:
            column = pc.struct_field(column, "bytes")
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return column.cast(pa.binary())
    return None


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
