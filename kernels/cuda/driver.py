"""Loads compiled programs into torch's CUDA context and launches their kernels, through the driver's C interface.

torch runs on the device's primary context, and so do these modules. They are never unloaded: a kernel may still be
running, or be part of a captured graph, when its last Python reference goes.
"""

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import NamedTuple

import torch

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda.once import Once

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

_POINTER = c_void_p  # handles and addresses alike
_PROTOTYPES: dict[str, tuple] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (_POINTER,),
    "cuGetErrorName": (c_int, _POINTER),
    "cuGetErrorString": (c_int, _POINTER),
    "cuDeviceGet": (_POINTER, c_int),
    "cuDeviceGetName": (_POINTER, c_int, c_int),
    "cuDeviceGetAttribute": (_POINTER, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (_POINTER, c_int),
    "cuCtxGetCurrent": (_POINTER,),
    "cuCtxPushCurrent_v2": (_POINTER,),
    "cuCtxPopCurrent_v2": (_POINTER,),
    "cuThreadExchangeStreamCaptureMode": (_POINTER,),
    "cuModuleLoadData": (_POINTER, c_char_p),
    "cuModuleGetFunction": (_POINTER, _POINTER, c_char_p),
    "cuFuncGetAttribute": (_POINTER, c_int, _POINTER),
    "cuFuncSetAttribute": (_POINTER, c_int, c_int),
    "cuLaunchKernel": (_POINTER, *(c_uint,) * 7, _POINTER, _POINTER, _POINTER),
}
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED

# CUdevice_attribute and CUfunction_attribute
_MULTIPROCESSORS, _L2_BYTES, _MAJOR, _MINOR, _SHARED_OPTIN = 16, 38, 75, 76, 97
_MAX_THREADS, _STATIC_SHARED, _LOCAL_BYTES, _REGISTERS, _MAX_DYNAMIC_SHARED = 0, 1, 3, 4, 8

_OTHER_DRIVER = (
    "update the NVIDIA driver, or install the compiler of the driver's CUDA major version: nvidia-cuda-nvrtc "
    "(nvidia-cuda-nvrtc-cu12 for CUDA 12) and cuda-bindings"
)
_EARLIER = (
    "an earlier kernel of this process failed and CUDA reports it now; run with CUDA_LAUNCH_BLOCKING=1, or under "
    "compute-sanitizer, to find it"
)
_CURES = {
    1: "the grid, block or shared memory is more than this device has",
    2: "free GPU memory, or use a smaller batch",
    3: "CUDA cannot be used in a forked process: start workers with the 'spawn' method",
    100: "no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES",
    101: "torch.cuda.device_count() says how many devices there are",
    200: _OTHER_DRIVER,
    209: _OTHER_DRIVER,
    218: _OTHER_DRIVER,
    222: _OTHER_DRIVER,
    700: _EARLIER,
    701: "the kernel takes too many registers or too much shared memory for this block: use a smaller block",
    715: _EARLIER,
    716: _EARLIER,
    717: _EARLIER,
    718: _EARLIER,
    719: _EARLIER,
    804: "the installed CUDA compatibility package does not support this GPU: update the driver",
}
# What a launch from a thread whose current context is none, or another device's, comes back with.
_WRONG_CONTEXT = (201, 400, 709)


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; `code` is its CUresult."""

    def __init__(self, action: str, code: int):
        self.code = code
        name, text = (_error_text(getter, code) for getter in ("cuGetErrorName", "cuGetErrorString"))
        cure = f"; {_CURES[code]}" if code in _CURES else ""
        super().__init__(f"{action} failed: {name} ({text}){cure}")


class DeviceProperties(NamedTuple):
    """What the launchers need to know of a GPU; `driver_version` is the latest CUDA that its driver supports."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes_per_block: int
    driver_version: tuple[int, int]


@functools.cache
def library() -> ctypes.CDLL:
    """The initialised driver. Raises KernelUnavailable where there is none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
        for function, arguments in _PROTOTYPES.items():
            getattr(driver, function).argtypes = arguments
    except (OSError, AttributeError) as error:
        reason = f"the NVIDIA driver {LIBRARY} cannot be loaded ({error})"
        raise KernelUnavailable(f"{reason}; install or update it") from error
    code = driver.cuInit(0)
    if code:
        text = c_char_p()
        driver.cuGetErrorName(code, byref(text))
        shown = (text.value or b"").decode() or f"error {code}"
        raise KernelUnavailable(
            f"the NVIDIA driver cannot be initialised: {shown}; {_CURES.get(code, 'see nvidia-smi')}"
        )
    return driver


@functools.cache
def properties(device_index: int) -> DeviceProperties:
    """The properties of one GPU. Raises KernelUnavailable without a driver, and CudaError for a wrong index."""
    device = _device(device_index)
    name = ctypes.create_string_buffer(256)
    _call("cuDeviceGetName", name, len(name), device)
    version = c_int()
    _call("cuDriverGetVersion", byref(version))

    def attribute(which: int) -> int:
        value = c_int()
        _call("cuDeviceGetAttribute", byref(value), which, device)
        return value.value

    return DeviceProperties(
        name.value.decode(errors="replace"),
        (attribute(_MAJOR), attribute(_MINOR)),
        attribute(_MULTIPROCESSORS),
        attribute(_L2_BYTES),
        attribute(_SHARED_OPTIN),
        (version.value // 1000, version.value % 1000 // 10),
    )


class Program:
    """A compiled program on one device. `program.kernel(name)` is one of its kernels, ready to be launched."""

    def __init__(self, name: str, image: bytes, device_index: int):
        self.name, self.device_index = name, device_index
        module = c_void_p()
        with _loading(device_index):
            _call("cuModuleLoadData", byref(module), image, action=f"loading {self}")
        self._module = module
        self._kernels: Once[str, Kernel] = Once(lambda kernel: Kernel(self, kernel))

    def __str__(self) -> str:
        return f"{self.name} on cuda:{self.device_index}"

    def kernel(self, name: str) -> "Kernel":
        """The kernel of this name, with all of the device's shared memory at its disposal. Raises CudaError."""
        return self._kernels[name]


class Kernel:
    """One kernel, which takes a single struct by value."""

    __slots__ = ("_argument_bytes", "_function", "_launch", "_program", "device_index", "name")

    def __init__(self, program: Program, name: str):
        self._program, self.name, self.device_index = program, name, program.device_index
        function = c_void_p()
        with _loading(self.device_index):
            arguments = (byref(function), program._module, name.encode())
            _call("cuModuleGetFunction", *arguments, action=f"finding kernel {name} in {program}")
            assert function.value is not None
            self._function: int = function.value
            dynamic = properties(self.device_index).shared_bytes_per_block - self._attribute(_STATIC_SHARED)
            _call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, dynamic, action=f"preparing kernel {name}")
            self._argument_bytes = self._parameter_bytes()
        self._launch = library().cuLaunchKernel

    def launch(self, grid: int, block: int, shared_bytes: int, stream: int, packed: bytes) -> None:
        """Queues the kernel on the raw `stream` of its device, with `packed` as its struct, which is copied at once.

        `grid` and `block` are counts along one dimension. Raises ValueError for sizes that no launch can have, and
        CudaError with the names of all that took part.
        """
        if not (0 < grid < 2**31 and 0 < block <= 1024 and 0 <= shared_bytes < 2**31):
            raise ValueError(
                f"{self.name}: grid must be in 1..2**31-1, block in 1..1024 and shared_bytes at least 0, "
                f"got {grid}, {block} and {shared_bytes}"
            )
        if self._argument_bytes not in (len(packed), None):
            raise ValueError(f"{self.name} takes a struct of {self._argument_bytes} bytes, got {len(packed)}")
        # The kernel's parameters are an array of pointers: here of one, which c_char_p holds, to the bytes themselves.
        parameters = byref(c_char_p(packed))
        if torch._C._cuda_getDevice() == self.device_index:
            code = self._launch(self._function, grid, 1, 1, block, 1, 1, shared_bytes, stream, parameters, None)
            if code == 0:
                return
            if code not in _WRONG_CONTEXT or _is_current(self.device_index):
                raise CudaError(self._described(grid, block, shared_bytes), code)
        # Another device is current, or none yet: an autograd thread may meet CUDA here for the first time.
        with _current(self.device_index):
            code = self._launch(self._function, grid, 1, 1, block, 1, 1, shared_bytes, stream, parameters, None)
        if code:
            raise CudaError(self._described(grid, block, shared_bytes), code)

    def _described(self, grid: int, block: int, shared_bytes: int) -> str:
        takes = ""
        try:
            registers, local, threads = map(self._attribute, (_REGISTERS, _LOCAL_BYTES, _MAX_THREADS))
            takes = f" (it takes {registers} registers and {local} bytes of local memory a thread"
            takes += f" and at most {threads} threads a block)"
        except CudaError:
            pass  # after a fault in the context every call fails, and the launch's own error is the one to report
        shape = f"grid={grid}, block={block}, shared_bytes={shared_bytes}"
        return f"launching kernel {self.name} of {self._program} with {shape}{takes}"

    def _attribute(self, which: int) -> int:
        value = c_int()
        _call("cuFuncGetAttribute", byref(value), which, self._function)
        return value.value

    def _parameter_bytes(self) -> int | None:
        """The size of the kernel's struct; None where the driver is older than the question (CUDA 12.4)."""
        try:
            ask = library().cuFuncGetParamInfo
        except AttributeError:
            return None
        offset, size = c_size_t(), c_size_t()
        code = ask(c_void_p(self._function), c_size_t(0), byref(offset), byref(size))
        return size.value if code == 0 else None


def _call(function: str, *arguments, action: str | None = None) -> None:
    code = getattr(library(), function)(*arguments)
    if code:
        raise CudaError(action or function, code)


def _error_text(getter: str, code: int) -> str:
    text = c_char_p()
    getattr(library(), getter)(code, byref(text))
    return (text.value or f"error {code}".encode()).decode(errors="replace")


def _device(device_index: int) -> c_int:
    device = c_int()
    _call("cuDeviceGet", byref(device), device_index, action=f"finding device cuda:{device_index}")
    return device


def _retain(device_index: int) -> int:
    context = c_void_p()
    _call("cuDevicePrimaryCtxRetain", byref(context), _device(device_index))
    assert context.value is not None
    return context.value


_contexts: Once[int, int] = Once(_retain)  # the primary contexts, kept for the life of the process, as torch keeps them


def _is_current(device_index: int) -> bool:
    context = c_void_p()
    _call("cuCtxGetCurrent", byref(context))
    return context.value == _contexts[device_index]


@contextmanager
def _current(device_index: int) -> Iterator[None]:
    """Makes the device's primary context current in this thread, and the one before it afterwards."""
    _call("cuCtxPushCurrent_v2", _contexts[device_index])
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", byref(c_void_p()))


@contextmanager
def _loading(device_index: int) -> Iterator[None]:
    """The context, in a mode of stream capture that lets a thread load code while a graph is being captured."""
    mode = c_int(_RELAXED)
    with _current(device_index):
        _call("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            yield
        finally:
            _call("cuThreadExchangeStreamCaptureMode", byref(mode))
