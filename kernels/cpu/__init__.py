"""Finds and loads the CPU library, and gives it torch's own thread pool."""

import ctypes
import functools
from pathlib import Path

import torch

from linrnn.kernels import KernelUnavailable

ABI_VERSION = 6
CURE = "install a C++ compiler and reinstall linrnn (pip install --force-reinstall --no-deps --no-cache-dir linrnn)"


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Raises KernelUnavailable where it is missing or cannot be loaded."""
    import linrnn.kernels

    # An editable install keeps the sources and the built libraries in two folders of one package path.
    names = ("linrnn_cpu_avx2", "linrnn_cpu") if "AVX" in torch.backends.cpu.get_cpu_capability() else ("linrnn_cpu",)
    found = [
        Path(folder, name + suffix)
        for name in names
        for folder in linrnn.kernels.__path__
        for suffix in (".so", ".dll", ".dylib")
        if Path(folder, name + suffix).is_file()
    ]
    if not found:
        raise KernelUnavailable(f"linrnn was installed without its compiled CPU kernels; {CURE}")
    try:
        lib = ctypes.CDLL(str(found[0]))
        version = lib.linrnn_abi_version()
    except (OSError, AttributeError) as error:
        raise KernelUnavailable(f"{found[0]} cannot be loaded ({error}); {CURE}") from error
    if version != ABI_VERSION:
        raise KernelUnavailable(f"{found[0]} is of another version (ABI {version}, expected {ABI_VERSION}); {CURE}")
    runtime = _openmp()
    if runtime is not None:
        entries = (runtime.GOMP_parallel, runtime.omp_get_num_threads, runtime.omp_get_thread_num)
        lib.linrnn_use_runtime(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries))
    return lib


def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that torch runs on; None where it has no GOMP entry points (the kernels then run serially)."""
    candidates: list[str | None] = [None]  # the symbols torch has already loaded into the process
    for pattern in ("libgomp*", "libomp*", "libiomp*"):
        candidates += [str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob(pattern))]
    for name in candidates:
        try:
            runtime = ctypes.CDLL(name)
            if hasattr(runtime, "GOMP_parallel") and hasattr(runtime, "omp_get_num_threads"):
                return runtime
        except (OSError, TypeError):  # TypeError: Windows has no handle for the process itself
            continue
    return None
