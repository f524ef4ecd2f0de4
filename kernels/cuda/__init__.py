"""CUDA kernels: sources of this package, compiled for the device at hand and launched on torch's context and streams.

    program = cuda.program("diagonal_scan.cu", ("LINRNN_A=float", ...), device_index)
    program.kernel("scan_forward").launch(grid, block, shared_bytes, cuda.current_stream(device_index), packed)

Importing this package touches neither CUDA nor NVIDIA's bindings; the first program does.
"""

import torch

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda import cache, compiler
from linrnn.kernels.cuda.driver import CudaError, DeviceProperties, Kernel, Program, properties
from linrnn.kernels.cuda.once import Once

__all__ = [
    "CudaError",
    "DeviceProperties",
    "Kernel",
    "KernelUnavailable",
    "Program",
    "current_stream",
    "program",
    "properties",
    "unavailable",
]

PROBE = ("probe.cu", ())  # the smallest program there is


def _load(key: tuple[str, tuple[str, ...], int]) -> Program:
    source, definitions, device_index = key
    found = properties(device_index)
    image = cache.obtain(compiler.read(source), definitions, found.capability, found.driver_version)
    return Program(" ".join((source, *definitions)), image, device_index)


_programs: Once[tuple[str, tuple[str, ...], int], Program] = Once(_load)


def program(source: str, definitions: tuple[str, ...], device_index: int) -> Program:
    """The program made of one source (a file name in this folder) and preprocessor definitions, loaded on a device.

    Compiled if neither the package nor the cache holds it; remembered by the process. Raises KernelUnavailable (no
    driver, no compiler, a device too old), compiler.CompileError and CudaError.
    """
    return _programs[source, definitions, device_index]


def current_stream(device_index: int) -> int:
    """The raw handle of torch's current stream on a device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


OUT_OF_MEMORY = 2  # CUresult
_verdicts: dict[int, str | None] = {}


def unavailable(device_index: int) -> str | None:
    """Why CUDA kernels cannot run on a device, with the cure; None if they can. Never raises; asked once a device."""
    if device_index not in _verdicts:
        verdict, lasting = _probe(device_index)
        if not lasting:
            return verdict
        _verdicts[device_index] = verdict
    return _verdicts[device_index]


def _probe(device_index: int) -> tuple[str | None, bool]:
    """The reason, and whether it will be the same the next time."""
    if torch.version.hip:
        return "this torch is built for AMD GPUs and the CUDA kernels need an NVIDIA one", True
    try:
        capability = properties(device_index).capability
        if capability < compiler.OLDEST:
            shown, needed = ("{}.{}".format(*pair) for pair in (capability, compiler.OLDEST))
            name = properties(device_index).name
            return f"{name} has compute capability {shown} and the CUDA kernels need {needed} or newer", True
        program(*PROBE, device_index).kernel("probe")
    except (KernelUnavailable, CudaError) as error:
        return str(error), getattr(error, "code", None) != OUT_OF_MEMORY
    except Exception as error:
        return f"an unexpected {type(error).__name__}: {error}; see python -m linrnn.kernels.cuda", True
    return None, True
