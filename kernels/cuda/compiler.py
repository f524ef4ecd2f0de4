"""Compiles CUDA C++ at run time with NVRTC, the compiler library that torch's CUDA wheels bring along.

A source is one file of this package with the files that it includes. Nothing outside the package is read, so neither a
CUDA toolkit nor CUDA's headers are needed, and no GPU or driver either.
"""

import functools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from linrnn.kernels import KernelUnavailable

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
OLDEST = (7, 0)

_INCLUDE = re.compile(r'^([ \t]*#[ \t]*include[ \t]*)"([^"\n]+)"', re.MULTILINE)


class CompileError(RuntimeError):
    """NVRTC rejected a source; the message holds its log."""


@dataclass(frozen=True)
class Source:
    """A CUDA source and, by name, the headers it includes; every include names a header as it is named here."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]

    @property
    def stem(self) -> str:
        return Path(self.name).stem


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: registers a thread, and bytes of static shared memory a block, of stack (local memory) a
    thread, and of spilled registers stored and loaded."""

    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def read(source: str | Path, folder: Path = FOLDER) -> Source:
    """Reads `source`, a file in `folder` (or an absolute path), and every file that it includes with quotes.

    Includes are rewritten to the path from the folder above `folder`, one name a file, so that `#pragma once` works
    and equal names in two folders stay apart. Raises FileNotFoundError, naming the including file.
    """
    main = (folder / source).resolve()
    root = folder.resolve().parent
    texts: dict[str, str] = {}

    def name_of(path: Path) -> str:
        return Path(os.path.relpath(path, root)).as_posix()

    def visit(path: Path) -> None:
        texts[name_of(path)] = ""  # seen: two headers may include each other

        def canonical(match: re.Match[str]) -> str:
            target = (path.parent / match[2]).resolve()
            if not target.is_file():
                raise FileNotFoundError(f"{name_of(path)} includes {match[2]!r}, but there is no file {target}")
            if name_of(target) not in texts:
                visit(target)
            return f'{match[1]}"{name_of(target)}"'

        texts[name_of(path)] = _INCLUDE.sub(canonical, path.read_text("utf-8"))

    if not main.is_file():
        raise FileNotFoundError(f"there is no CUDA source {main}")
    visit(main)
    text = texts.pop(name_of(main))
    return Source(name_of(main), text, tuple(sorted(texts.items())))


@functools.cache
def nvrtc() -> ModuleType:
    """NVIDIA's bindings with the compiler library loaded. Raises KernelUnavailable, naming what to install."""
    try:
        from cuda.bindings import nvrtc as bindings
    except Exception as error:
        raise KernelUnavailable(f"cuda.bindings cannot be imported ({_first_line(error)}); {install()}") from error
    try:
        _checked(bindings, bindings.nvrtcVersion())
    except Exception as error:
        reason = f"the compiler library NVRTC cannot be loaded ({_first_line(error)})"
        raise KernelUnavailable(f"{reason}; {install()}") from error
    return bindings


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's version, such as (13, 0). Raises KernelUnavailable."""
    major, minor = _checked(nvrtc(), nvrtc().nvrtcVersion())
    return major, minor


@functools.cache
def supported() -> tuple[int, ...]:
    """The architectures that this NVRTC compiles for, such as (75, 80, ..., 121). Raises KernelUnavailable."""
    (architectures,) = _checked(nvrtc(), nvrtc().nvrtcGetSupportedArchs())
    return tuple(sorted(architectures))


def install(major: int | None = None) -> str:
    """The cure for a missing compiler: the packages of CUDA `major`, or else of the one that torch is built for."""
    if major is None:
        major = int((torch.version.cuda or "13").split(".")[0])
    if major >= 13:
        return f"pip install 'nvidia-cuda-nvrtc>={major},<{major + 1}' 'cuda-bindings>={major},<{major + 1}'"
    return f"pip install nvidia-cuda-nvrtc-cu{major} 'cuda-bindings>=12.9,<13'"


def target(capability: tuple[int, int]) -> str:
    """What to compile for on a device of this compute capability: `sm_XY` (machine code), or `compute_XY` (PTX for the
    driver to assemble) where the device is newer than this NVRTC knows.

    Raises KernelUnavailable for a device that is too old, for the kernels or for this NVRTC.
    """
    number = 10 * capability[0] + capability[1]
    shown = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        raise KernelUnavailable(f"{shown} is too old: the kernels need {OLDEST[0]}.{OLDEST[1]} or newer")
    if number in supported():
        return f"sm_{number}"
    older = [known for known in supported() if known < number]
    if not older:
        reason = f"NVRTC {version()[0]}.{version()[1]} no longer compiles for {shown}"
        raise KernelUnavailable(f"{reason}; {install(12)} (with a torch built for CUDA 12)")
    return f"compute_{older[-1]}"


def compile_source(
    source: Source, definitions: tuple[str, ...], architecture: str, options: tuple[str, ...] = OPTIONS
) -> tuple[bytes, str]:
    """The machine code (for `sm_90`) or PTX (for `compute_90`), and the compiler's log.

    `definitions` are preprocessor macros, such as "LINRNN_A=float". Raises CompileError, and KernelUnavailable where
    there is no NVRTC.
    """
    bindings = nvrtc()
    names = [name.encode() for name, _ in source.headers]
    texts = [text.encode() for _, text in source.headers]
    (program,) = _checked(
        bindings,
        bindings.nvrtcCreateProgram(source.text.encode(), source.name.encode(), len(names), texts, names),
    )
    try:
        flags = [*options, f"--gpu-architecture={architecture}", *(f"-D{definition}" for definition in definitions)]
        (code,) = bindings.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])
        log = _text(bindings, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
        if code != bindings.nvrtcResult.NVRTC_SUCCESS:
            shown = " ".join((source.name, *flags))
            raise CompileError(f"NVRTC {version()[0]}.{version()[1]} cannot compile {shown} ({code.name}):\n{log}")
        return _text(bindings, program, "CUBIN" if architecture.startswith("sm_") else "PTX"), log
    finally:
        bindings.nvrtcDestroyProgram(program)


def resources(log: str) -> dict[str, Resources]:
    """What each kernel takes, by its name, read off the log of `compile_source` for an `sm_XY` architecture."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if frame is None or registers is None:
            raise ValueError(f"this is not a log of ptxas -v: {part[:500]!r}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stores, loads = map(int, frame.groups())
        name = part.split("'")[0]
        found[name] = Resources(int(registers[1]), int(shared[1]) if shared else 0, stack, stores, loads)
    return found


def _text(bindings: ModuleType, program: object, what: str) -> bytes:
    (size,) = _checked(bindings, getattr(bindings, f"nvrtcGet{what}Size")(program))
    text = bytearray(size)
    _checked(bindings, getattr(bindings, f"nvrtcGet{what}")(program, text))
    return bytes(text)


def _checked(bindings: ModuleType, result: tuple) -> tuple:
    """What an NVRTC call returned, without its status."""
    code, *rest = result
    if code != bindings.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"NVRTC failed: {getattr(code, 'name', code)}")
    return tuple(rest)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
