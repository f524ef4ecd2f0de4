"""Keeps compiled programs on disk, so that only the first call on a machine waits for the compiler.

An entry is named by what went into it: a digest of all source text, definitions and options, the architecture, and the
version of NVRTC. Its file is the machine code followed by a checksum. Nothing here needs the folder to be writable, or
to exist: the cache saves time, or it does not.
"""

import hashlib
import json
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda import compiler
from linrnn.kernels.cuda.compiler import Source
from linrnn.kernels.cuda.once import Once

PREBUILT = Path(__file__).parent / "prebuilt"
LIMIT = 256 * 2**20
MAGIC = b"linrnn01"
STALE = 3600.0  # seconds after which a temporary file has lost its writer

_log = logging.getLogger("linrnn")


def folder() -> Path | None:
    """Where entries are kept: $LINRNN_CACHE_DIR, or else `linrnn` in the user's cache folder; None without a home."""
    own = os.environ.get("LINRNN_CACHE_DIR")
    if own:
        return Path(own)
    base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    if base:
        return Path(base, "linrnn")
    try:
        return Path.home() / ".cache" / "linrnn"
    except RuntimeError:
        return None


def digest(source: Source, definitions: tuple[str, ...]) -> str:
    """Names what is compiled: all the text, the definitions and the options."""
    parts = (source.name, source.text, source.headers, definitions, compiler.OPTIONS)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def entry(source: Source, definitions: tuple[str, ...], architecture: str, version: tuple[int, int]) -> str:
    """The file name of one compiled program."""
    return f"{source.stem}.{architecture}.{digest(source, definitions)}.nvrtc{version[0]}.{version[1]}"


def obtain(
    source: Source, definitions: tuple[str, ...], capability: tuple[int, int], driver: tuple[int, int] | None = None
) -> bytes:
    """The machine code (or PTX) of a program for a device: shipped with the package, cached, or compiled and cached.

    `driver` is the CUDA version of the driver, which loads no machine code of a later major one. Raises
    KernelUnavailable where nothing is found and there is no compiler, and CompileError.
    """
    native = f"sm_{capability[0]}{capability[1]}"
    shipped = _any_version(PREBUILT, source, definitions, native, driver)
    if shipped is not None:
        return shipped
    try:
        version, architecture = compiler.version(), compiler.target(capability)
    except KernelUnavailable:
        cached = _any_version(folder(), source, definitions, native, driver)
        if cached is None:
            raise
        return cached
    name = entry(source, definitions, architecture, version)
    return load(folder(), name) or _compiled[source, definitions, architecture, name]


def _compile(key: tuple[Source, tuple[str, ...], str, str]) -> bytes:
    source, definitions, architecture, name = key
    image, _ = compiler.compile_source(source, definitions, architecture)
    store(folder(), name, image)
    return image


# Kept in memory too: where the disk keeps nothing, a process still compiles once.
_compiled: Once[tuple[Source, tuple[str, ...], str, str], bytes] = Once(_compile)


def load(where: Path | None, name: str) -> bytes | None:
    """An entry, marked as just used; None if it is absent, unreadable or damaged."""
    if where is None:
        return None
    path = where / name
    try:
        data = path.read_bytes()
    except OSError:
        return None
    image, end = data[:-40], data[-40:]
    if end != MAGIC + hashlib.sha256(image).digest():
        _log.debug("%s is damaged and will be compiled again", path)
        return None
    try:
        os.utime(path)
    except OSError:
        pass  # a folder that others own: its entries simply look old
    return image


def store(where: Path | None, name: str, image: bytes) -> Path | None:
    """Writes an entry whole or not at all; None, and a note in the log, where the folder cannot take it."""
    if where is None:
        return None
    temporary = None
    try:
        where.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(prefix=f"{name}.", suffix=".tmp", dir=where)
        with os.fdopen(handle, "wb") as file:
            file.write(image + MAGIC + hashlib.sha256(image).digest())
        os.replace(temporary, where / name)
    except OSError as error:
        _log.debug("compiled CUDA kernels are not kept: %s cannot be written (%s)", where / name, error)
        if temporary is not None:
            _remove(Path(temporary))
        return None
    try:
        prune(where)
    except OSError as error:
        _log.debug("%s cannot be tidied (%s)", where, error)
    return where / name


def prune(where: Path) -> None:
    """Removes the least recently used entries beyond LIMIT bytes, and what writers that died left behind."""
    for path in where.glob("*.nvrtc*.tmp"):
        used = _stat(path)
        if used is not None and time.time() - used[0] > STALE:
            _remove(path)
    found = sorted(((used, path) for used, path in entries(where)), reverse=True)
    total = 0
    for (_, size), path in found:
        total += size
        if total > LIMIT:
            _remove(path)


def entries(where: Path | None) -> list[tuple[tuple[float, int], Path]]:
    """(time of last use, bytes) and path of every entry; nothing if the folder cannot be read."""
    if where is None:
        return []
    paths = [path for path in where.glob("*.nvrtc*") if re.fullmatch(r".+\.nvrtc\d+\.\d+", path.name)]
    found = ((_stat(path), path) for path in paths)
    return [(used, path) for used, path in found if used is not None]


def _any_version(
    where: Path | None, source: Source, definitions: tuple[str, ...], architecture: str, driver: tuple[int, int] | None
) -> bytes | None:
    """The entry of the latest NVRTC whose machine code the driver takes."""
    if where is None:
        return None
    stem = entry(source, definitions, architecture, (0, 0)).removesuffix("0.0")
    found = []
    for _, path in entries(where):
        match = re.fullmatch(re.escape(stem) + r"(\d+)\.(\d+)", path.name)
        if match and (driver is None or int(match[1]) <= driver[0]):
            found.append((int(match[1]), int(match[2]), path.name))
    for *_, name in sorted(found, reverse=True):
        image = load(where, name)
        if image is not None:
            return image
    return None


def _stat(path: Path) -> tuple[float, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None  # another process removed it
    return found.st_mtime, found.st_size


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        _log.debug("%s cannot be removed", path)
