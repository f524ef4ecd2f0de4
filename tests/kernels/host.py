"""The CUDA sources on the CPU: what `linrnn.kernels.cuda` offers to launchers, over host_shim/ and g++.

Four modes, each of which finds what the others cannot:

- "fibers": a thread is a fiber that runs from barrier to barrier, in an order shuffled by the seed; shared memory holds
  NaN before each block and stands between red zones; asynchronous copies happen early or late, by the seed.
- "races": fibers, with every access of memory checked against the rules of CUDA (host_shim/races.h).
- "address": fibers under AddressSanitizer and UndefinedBehaviorSanitizer.
- "threads": real threads under ThreadSanitizer, one block after another.

The last two need their sanitizer's library loaded before Python: `sanitized_environment`.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import linrnn.kernels
from linrnn.kernels import cuda
from linrnn.kernels.cuda import DeviceProperties, diagonal_scan, diagonal_step, selective_scan, softmax_scan

MODES = ("fibers", "races", "address", "threads")
SHIM = Path(__file__).parent / "host_shim"
SOURCES = next(Path(folder, "cuda") for folder in linrnn.kernels.__path__ if Path(folder, "cuda").is_dir())

_OPTIONS = ("-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique")
# the flags of the kernels, those of the shim's own sources, and these sources
_BUILDS = {
    "fibers": ((), (), ("runtime.cpp",)),
    # instrumented as for ThreadSanitizer, whose part races.cpp then plays
    "races": (("-fsanitize=thread",), ("-DSHIM_RACES",), ("runtime.cpp", "races.cpp")),
    # -O0: at -O1 its checks take the compiler ten times as long
    "address": (*((("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),) * 2), ("runtime.cpp",)),
    "threads": (("-fsanitize=thread",), ("-fsanitize=thread", "-DSHIM_THREADS"), ("runtime.cpp",)),
}
_BOUNDS = re.compile(r"shim_launch_bounds\((.*?)\);;")
_KERNEL = re.compile(r'extern "C" __attribute__\(\(noipa\)\) void\s+(?:shim_launch_bounds\((.*?)\);;\s*)?(\w+)\s*\(')

_EXPORT = """
extern "C" __attribute__((visibility("default"))) const char* launch_{name}(
    unsigned grid, unsigned block, unsigned shared_bytes, const void* args, size_t bytes, unsigned seed,
    unsigned os_threads) {{
  const shim::Entry entry = [](const void* packed) {{ shim::call({name}, packed); }};
  return shim::launch("{name}", entry, args, bytes, shim::args_bytes({name}), grid, block, {most_threads}, shared_bytes,
                      seed, os_threads);
}}
"""

# A small machine, so that small shapes take every path.
SMALL = DeviceProperties("host shim", (9, 0), 4, 1 << 20, 48 << 10, (13, 0))


class CompileError(RuntimeError):
    """g++ refuses the source; the message is its log."""


class HostKernel:
    """A kernel of a HostProgram; launched as a kernel of linrnn.kernels.cuda is."""

    def __init__(self, host: "HostCuda", library: Path, call, name: str) -> None:
        self.host, self.library, self.call, self.name = host, library, call, name

    def launch(self, grid: int, block: int, shared_bytes: int, stream: int, packed: bytes) -> None:
        """Runs to the end. Raises RuntimeError, with source lines, for whatever the mode finds, and for a launch that
        a device of `host.device` would refuse."""
        limit = self.host.device.shared_bytes_per_block
        for name, value, low, high in (
            ("grid", grid, 1, 2**31 - 1),
            ("block", block, 1, 1024),
            ("shared_bytes", shared_bytes, 0, limit),
        ):
            if not low <= value <= high:
                raise RuntimeError(f"kernel {self.name}: {name} must be in [{low}, {high}], got {value}")
        seed = next(self.host.seeds) % 2**31
        os_threads = self.host.os_threads if self.host.mode in ("fibers", "address") else 1
        self.host.launches.append((self.name, grid, block, shared_bytes))
        error = self.call(grid, block, shared_bytes, bytes(packed), len(packed), seed, os_threads)
        if error:
            text = re.sub(r"<pc 0x([0-9a-f]+)>", lambda m: f"({_source_line(self.library, m[1])})", error.decode())
            raise RuntimeError(f"{text} (seed {seed})")


class HostProgram:
    """A compiled source; its kernels by name."""

    def __init__(self, host: "HostCuda", library: Path, names: list[str]) -> None:
        self.host, self.library, self.names = host, library, names
        self.loaded = ctypes.CDLL(str(library))

    def kernel(self, name: str) -> HostKernel:
        if name not in self.names:
            raise RuntimeError(f"no kernel {name} in {self.library.stem}; there are {', '.join(self.names)}")
        call = getattr(self.loaded, f"launch_{name}")
        unsigned = ctypes.c_uint
        call.argtypes = (unsigned, unsigned, unsigned, ctypes.c_char_p, ctypes.c_size_t, unsigned, unsigned)
        call.restype = ctypes.c_char_p
        return HostKernel(self.host, self.library, call, name)


class HostCuda:
    """`program`, `properties` and `current_stream` of linrnn.kernels.cuda, on the CPU.

    Args:
        mode: one of MODES.
        folder: where libraries are built and found again.
        sources: the folder of the kernels; a changed copy for tests by mutation.
        device: what `properties` answers.
    """

    def __init__(self, mode: str, folder: Path, sources: Path = SOURCES, device: DeviceProperties = SMALL) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode}")
        self.mode, self.folder, self.sources = mode, folder, sources
        self.device = device
        self.os_threads = 2
        self.programs: dict[tuple[str, tuple[str, ...]], HostProgram] = {}
        self.seed(0)
        self.launches: list[tuple[str, int, int, int]] = []  # name, grid, block, shared bytes

    def seed(self, seed: int) -> None:
        """The next launch takes this seed, those after it the following ones."""
        self.seeds: Iterator[int] = itertools.count(seed)

    def program(self, source: str, definitions: tuple[str, ...], device_index: int = 0) -> HostProgram:
        """Compiles `source` (a name in the folder of sources) unless that has been done."""
        key = source, tuple(definitions)
        if key not in self.programs:
            self.programs[key] = HostProgram(self, *build(self.sources / source, key[1], self.mode, self.folder))
        return self.programs[key]

    def properties(self, device_index: int) -> DeviceProperties:
        return self.device

    def current_stream(self, device_index: int) -> int:
        return 0

    def unavailable(self, device_index: int) -> None:
        return None

    @contextlib.contextmanager
    def installed(self) -> Iterator["HostCuda"]:
        """Puts itself in the place of the functions of linrnn.kernels.cuda."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("program", "properties", "current_stream", "unavailable"):
                patch.setattr(cuda, name, getattr(self, name))
            _forget_kernels()
            yield self
        _forget_kernels()


def _forget_kernels() -> None:
    """The launchers remember kernels, and so the host or the driver that they are of."""
    diagonal_scan._layout.cache_clear()
    diagonal_step._kernel.cache_clear()
    selective_scan._layout.cache_clear()
    softmax_scan._layout.cache_clear()


def build(source: Path, definitions: tuple[str, ...], mode: str, folder: Path) -> tuple[Path, list[str]]:
    """The shared library of a source and the names of its kernels. Raises CompileError."""
    definitions = ("LINRNN_HOST_SHIM", *definitions)
    flags = (*_OPTIONS, "-include", str(SHIM / "shim.h"), *(f"-D{definition}" for definition in definitions))
    return _build(_run("-E", "-x", "c++", *flags, str(source)), source.stem, mode, folder)


@functools.cache
def _build(text: str, stem: str, mode: str, folder: Path) -> tuple[Path, list[str]]:
    kernels = {name: most_threads or "1024" for most_threads, name in _KERNEL.findall(text)}
    if not kernels:
        raise RuntimeError(f"no kernel declared by LINRNN_KERNEL in {stem}")
    kernel_flags, *_ = _BUILDS[mode]
    library = folder / f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}-{mode}.so"
    if not library.exists():
        text = _BOUNDS.sub("", text) + "".join(
            _EXPORT.format(name=name, most_threads=most) for name, most in kernels.items()
        )
        flags = (*_OPTIONS, "-shared", *kernel_flags, "-x", "c++-cpp-output")
        objects = map(str, _runtime(mode, folder))
        if mode == "races":  # linked without the compiler's own runtime
            _run("-c", *flags, "-", "-o", f"{library}.o", stdin=text)
            _run(*_OPTIONS, "-shared", f"{library}.o", *objects, "-o", str(library))
        else:
            _run(*flags, "-", "-x", "none", *objects, "-o", str(library), stdin=text)
    return library, list(kernels)


@functools.cache
def _runtime(mode: str, folder: Path) -> list[Path]:
    """The shim's own sources, compiled once."""
    _, flags, names = _BUILDS[mode]
    objects = [folder / f"{Path(name).stem}-{mode}.o" for name in names]
    for name, to in zip(names, objects, strict=True):
        _run("-c", *_OPTIONS, *flags, str(SHIM / name), "-o", str(to))
    return objects


def _run(*args: str, stdin: str = "") -> str:
    done = subprocess.run(["g++", *args], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"g++ {' '.join(args)} failed:\n{done.stderr}")
    return done.stdout


def _source_line(library: Path, offset: str) -> str:
    """file:line of an address in the library, through the inlined calls up to the kernel."""
    if not shutil.which("addr2line"):
        return f"{library.name}+0x{offset}"
    command = ["addr2line", "-i", "-s", "-e", str(library), f"0x{offset}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    return " in ".join(line.split(" ")[0] for line in lines if line)


def sanitized_environment(mode: str) -> dict[str, str]:
    """The environment for a Python that runs the "address" or the "threads" mode."""
    name = {"address": "libasan.so", "threads": "libtsan.so"}[mode]
    return {
        **os.environ,
        "LINRNN_HOST_MODE": mode,
        "LD_PRELOAD": _run(f"-print-file-name={name}").strip(),
        # Python frees not everything at exit; a finding ends the process
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }


def skip_without_compiler() -> None:
    if not shutil.which("g++"):
        pytest.skip("the host shim needs g++")
    if os.uname().sysname != "Linux":
        pytest.skip("the host shim needs Linux")
