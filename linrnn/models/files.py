"""Files that are whole or not there, and the folder of a checkpoint, whose files belong together."""

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def write_checkpoint(folder: Path, config: str, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes a config and weights in place of those in the folder, which is made if missing.

    All is written under temporary names first. Where config or files change, a folder without weights, which every
    reader refuses, lies between the old checkpoint and the new one: whatever interrupts leaves no mixture of them.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    shards = split(tensors, max_shard_bytes)
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    with ExitStack() as stack:
        temporaries = {file: stack.enter_context(temporary(folder / file)) for file in files}
        for path, shard in zip(temporaries.values(), shards, strict=True):
            with permissions_kept(path):
                save_file(shard, path, metadata={"format": "pt"})
        texts = {CONFIG: config}
        if n > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            total = sum(tensor.nbytes for tensor in tensors.values())
            texts[INDEX] = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        for file, text in texts.items():
            temporaries[file] = stack.enter_context(temporary(folder / file))
            temporaries[file].write_bytes(text.encode())
        for path in temporaries.values():
            synchronize(path)

        there = {path.name for path in folder.iterdir() if WEIGHT_FILES.fullmatch(path.name)}
        same_config = (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() == config.encode()
        if not (same_config and there <= {WEIGHTS} and n == 1):  # else one rename is all that happens
            for file in (INDEX, WEIGHTS):
                (folder / file).unlink(missing_ok=True)
            synchronize(folder)
        for file in there - {*temporaries, INDEX, WEIGHTS}:
            (folder / file).unlink()
        last = WEIGHTS if n == 1 else INDEX  # which makes it a checkpoint
        for file in [file for file in temporaries if file != last] + [last]:
            if file == last:
                synchronize(folder)
            os.replace(temporaries[file], folder / file)
        synchronize(folder)


def split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """Splits tensors, in order, into parts of at most max_bytes, or of a single tensor."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > max_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    return parts


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` that no other process or thread has, removed at the end if it is still there.

    Raises:
        OSError: what is written there cannot be; it names `path`.
    """
    name = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield name
    except OSError as error:
        if error.filename not in (None, str(name)):
            raise
        raise type(error)(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        name.unlink(missing_ok=True)


@contextmanager
def permissions_kept(path: Path) -> Iterator[None]:
    """Has a file that is made within readable for whom the umask lets: safetensors lets only its owner."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def synchronize(path: Path) -> None:
    """Has a file, or the names in a folder, on the disk before anything that comes after; Windows has no folders to."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it: a reader sees the old file or the new one.

    Raises:
        OSError: it cannot be written; it names `path`, where what was before stays.
    """
    with temporary(path) as name:
        name.write_bytes(data)
        synchronize(name)
        os.replace(name, path)
        synchronize(path.parent)


def unreadable(path: Path, error: Exception) -> str:
    """Says what a file is that safetensors does not take."""
    with path.open("rb") as file:
        head = file.read(24)
    # the header of a safetensors file, JSON, begins behind its length, 8 bytes that may look like those of a pickle
    if head.startswith(b"PK\x03\x04") or (head.startswith(b"\x80") and head[8:9] != b"{"):
        return f"{path}: expected a safetensors file, got a pickle, which could run any code"
    if head.startswith(b"version https://git-lfs"):
        return f"{path}: expected a safetensors file, got a pointer to one; fetch the file itself with `git lfs pull`"
    return f"{path}: damaged or not a safetensors file ({error})"
