"""Loading and launching, on a stand-in for the CUDA driver (stub_driver.c): no GPU is needed."""

import ctypes
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from linrnn.kernels import KernelUnavailable, cuda
from linrnn.kernels.cuda import cache, compiler, driver
from linrnn.kernels.cuda.__main__ import main
from linrnn.kernels.cuda.driver import CudaError, Program
from linrnn.kernels.cuda.once import Once

PACKED = struct.pack("2q", 1234567890123456789, -5)


@pytest.fixture(scope="session")
def stub_path(tmp_path_factory):
    gcc = shutil.which("gcc")
    if gcc is None or sys.platform == "win32":
        pytest.skip("the stand-in for the driver is built with gcc")

    def build(name: str, *options: str) -> str:
        path = tmp_path_factory.mktemp("stub") / name
        source = str(Path(__file__).parent / "stub_driver.c")
        subprocess.run([gcc, "-shared", "-fPIC", "-Wall", *options, source, "-o", str(path)], check=True)
        return str(path)

    return {"new": build("libcuda.so.1"), "old": build("libcuda-old.so.1", "-DOLD_DRIVER")}


def fresh(monkeypatch, path):
    """As in a new process whose driver is the file `path`."""
    monkeypatch.setattr(driver, "LIBRARY", path)
    monkeypatch.setattr(driver, "_contexts", Once(driver._retain))
    monkeypatch.setattr(cuda, "_programs", Once(cuda._load))
    for function in (driver.library, driver.properties):
        function.cache_clear()
    cuda._verdicts.clear()


class Device:
    """torch's current device in the main thread, and the stub's variables."""

    def __init__(self, library):
        self.library, self.current = library, 0

    def __getattr__(self, name):
        return ctypes.c_int.in_dll(self.library, f"stub_{name}").value

    def fail(self, function: str, code: int):
        ctypes.c_char.in_dll(self.library, "stub_failing")
        (ctypes.c_char * 64).in_dll(self.library, "stub_failing").value = function.encode()
        self.set("code", code)

    def set(self, name: str, value: int):
        ctypes.c_int.in_dll(self.library, f"stub_{name}").value = value

    def choose(self, index: int):
        self.current = index
        self.library.stub_set_device(index)

    @property
    def shape(self):
        return tuple((ctypes.c_uint * 7).in_dll(self.library, "stub_shape"))

    @property
    def stream(self):
        return ctypes.c_void_p.in_dll(self.library, "stub_stream").value

    def text(self, name: str, size: int = 16):
        return bytes((ctypes.c_char * 64).in_dll(self.library, f"stub_{name}"))[:size]


@pytest.fixture
def device(monkeypatch, stub_path):
    fresh(monkeypatch, stub_path["new"])
    library = ctypes.CDLL(stub_path["new"])
    library.stub_reset()
    found = Device(library)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: found.current, raising=False)
    found.choose(0)
    yield found
    library.stub_reset()
    for function in (driver.library, driver.properties):
        function.cache_clear()
    cuda._verdicts.clear()


@pytest.fixture
def no_compiler_needed(monkeypatch):
    monkeypatch.setattr(cache, "obtain", lambda source, definitions, capability, version: source.name.encode())


def test_properties_of_a_device(device):
    found = cuda.properties(1)
    assert found == ("Stub 1", (9, 0), 101, 50 * 2**20, 200_000, (13, 0))
    assert cuda.properties(1) is found
    with pytest.raises(CudaError, match=r"finding device cuda:7 failed.*torch\.cuda\.device_count\(\)"):
        cuda.properties(7)


def test_a_launch_hands_everything_over(device):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    kernel.launch(2**31 - 1, 96, 4096, 2**40 + 8, PACKED)
    assert device.shape == (2**31 - 1, 1, 1, 96, 1, 1, 4096)
    assert device.stream == 2**40 + 8 and device.text("packed") == PACKED and device.launch_device == 0
    kernel.launch(1, 1, 0, 0, bytes(16))
    assert device.text("packed") == bytes(16) and device.stream is None and device.launches == 2
    assert device.dynamic_shared == 200_000 - 1000  # what the device has, less the kernel's static 1000 bytes


def test_programs_and_kernels_are_made_once(device, no_compiler_needed):
    one = cuda.program("probe.cu", (), 0)
    assert cuda.program("probe.cu", (), 0) is one and one.kernel("probe") is one.kernel("probe")
    assert device.loads == 1 and device.text("image", 13) == b"cuda/probe.cu"
    assert cuda.program("probe.cu", (), 1) is not one and cuda.program("probe.cu", ("A=1",), 0) is not one
    assert device.loads == 3 and device.retained == 2  # one context a device
    assert device.library.stub_depth() == 1 and device.library.stub_mode() == 0  # as it was before


def test_a_launch_on_another_device_than_the_current_one(device):
    there = Program("one.cu", b"image", 1).kernel("scan")
    there.launch(4, 32, 0, 0, PACKED)
    assert device.launch_device == 1 and device.library.stub_depth() == 1
    device.choose(1)
    there.launch(4, 32, 0, 0, PACKED)
    assert device.launch_device == 1 and device.launches == device.attempts == 2  # never tried in the wrong context


def test_a_thread_that_never_touched_cuda_can_launch(device):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    seen = []

    def run():
        assert device.library.stub_depth() == 0
        kernel.launch(4, 32, 0, 0, PACKED)
        Program("two.cu", b"image", 0).kernel("scan").launch(4, 32, 0, 0, PACKED)
        seen.append(device.library.stub_depth())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [0] and device.launches == 2


def test_a_foreign_context_is_replaced_for_the_launch(device):
    """torch believes in device 0, but another library has made device 1 current."""
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    device.library.stub_set_device(1)
    kernel.launch(4, 32, 0, 0, PACKED)
    assert device.launch_device == 0 and device.library.stub_depth() == 1


@pytest.mark.parametrize(("foreign", "code", "attempts"), ((True, 400, 2), (True, 700, 1), (False, 400, 1)))
def test_only_a_wrong_context_is_worth_a_second_attempt(device, foreign, code, attempts):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    device.library.stub_set_device(int(foreign))
    device.fail("cuLaunchKernel", code)
    with pytest.raises(CudaError) as caught:
        kernel.launch(4, 32, 0, 0, PACKED)
    assert caught.value.code == code and device.attempts == attempts and device.library.stub_depth() == 1


@pytest.mark.parametrize("current", (0, 1))
def test_a_failed_launch_names_everything(device, current):
    kernel = Program("one.cu A=1", b"image", 0).kernel("scan")
    device.choose(current)
    device.fail("cuLaunchKernel", 701)
    with pytest.raises(CudaError) as caught:
        kernel.launch(5, 96, 4096, 0, PACKED)
    expected = (
        "kernel scan of one.cu A=1 on cuda:0",
        "grid=5, block=96, shared_bytes=4096",
        "40 registers",
        "at most 768 threads",
        "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (what went wrong)",
        "use a smaller block",
    )
    assert all(part in str(caught.value) for part in expected) and caught.value.code == 701


def test_an_error_that_this_driver_cannot_name_is_a_number(device):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    device.fail("cuLaunchKernel", 12345)
    with pytest.raises(CudaError, match=r"failed: error 12345 \(error 12345\)$"):
        kernel.launch(1, 32, 0, 0, PACKED)


@pytest.mark.parametrize(
    "shape", ((0, 32, 0), (2**31, 32, 0), (-1, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, -1), (2**32 + 1, 32, 0))
)
def test_sizes_that_would_wrap_are_refused(device, shape):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    with pytest.raises(ValueError, match=r"scan: grid must be in .*, got " + f"{shape[0]}, {shape[1]} and {shape[2]}"):
        kernel.launch(*shape, 0, PACKED)
    assert device.launches == 0


def test_a_struct_of_another_size_is_refused(device, monkeypatch, stub_path):
    kernel = Program("one.cu", b"image", 0).kernel("scan")
    with pytest.raises(ValueError, match="scan takes a struct of 16 bytes, got 8"):
        kernel.launch(1, 32, 0, 0, PACKED[:8])
    fresh(monkeypatch, stub_path["old"])  # a driver before CUDA 12.4 does not tell
    library = ctypes.CDLL(stub_path["old"])
    library.stub_set_device(0)
    Program("one.cu", b"image", 0).kernel("scan").launch(1, 32, 0, 0, PACKED)
    assert Device(library).launches == 1


@pytest.mark.parametrize(
    "function",
    (
        "cuDevicePrimaryCtxRetain",
        "cuCtxPushCurrent_v2",
        "cuThreadExchangeStreamCaptureMode",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncGetAttribute",
        "cuFuncSetAttribute",
        "cuDeviceGetAttribute",
        "cuDriverGetVersion",
        "cuDeviceGetName",
    ),
)
def test_every_call_is_checked(device, function):
    device.fail(function, 999)
    with pytest.raises(CudaError, match=r"failed: CUDA_ERROR_X \(what went wrong\)") as caught:
        Program("one.cu", b"image", 0).kernel("scan")
    assert caught.value.code == 999
    device.fail("", 0)
    assert device.library.stub_mode() == 0 and device.library.stub_depth() == 1
    Program("one.cu", b"image", 0).kernel("scan").launch(1, 32, 0, 0, PACKED)  # a failure is not remembered


def test_machine_code_that_the_driver_refuses_names_the_cure(device):
    with pytest.raises(
        CudaError, match=r"loading one\.cu on cuda:0 failed: CUDA_ERROR_INVALID_IMAGE.*update the NVIDIA"
    ):
        Program("one.cu", b"bad image", 0)
    with pytest.raises(CudaError, match=r"finding kernel absent in one\.cu on cuda:0"):
        Program("one.cu", b"image", 0).kernel("absent")


def test_the_stream_is_torchs(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False)
    assert cuda.current_stream(3) == 1003


def test_available(device, no_compiler_needed):
    assert cuda.unavailable(0) is None and cuda.unavailable(1) is None
    device.fail("cuModuleLoadData", 200)
    assert cuda.unavailable(0) is None  # asked once


def test_why_not(device, monkeypatch, no_compiler_needed):
    def reason():
        fresh(monkeypatch, driver.LIBRARY)
        return cuda.unavailable(0)

    device.fail("cuModuleLoadData", 222)
    assert "loading probe.cu on cuda:0 failed" in reason() and "update the NVIDIA driver" in reason()
    device.fail("cuInit", 100)
    assert reason() == f"the NVIDIA driver cannot be initialised: CUDA_ERROR_X; {driver._CURES[100]}"
    device.fail("", 0)
    (ctypes.c_int * 2).in_dll(device.library, "stub_capability")[:] = (6, 1)
    assert reason() == "Stub 0 has compute capability 6.1 and the CUDA kernels need 7.0 or newer"
    (ctypes.c_int * 2).in_dll(device.library, "stub_capability")[:] = (9, 0)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "obtain", lambda *_: {}["surprise"])
        assert reason().startswith("an unexpected KeyError: 'surprise'")
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "hip", "6.4")
        assert "AMD" in reason()
    assert reason() is None


def test_no_compiler_and_nothing_compiled_is_a_reason(device, monkeypatch, tmp_path):
    def missing():
        raise KernelUnavailable(f"no compiler; {compiler.install()}")

    monkeypatch.setenv("LINRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "version", missing)
    assert "pip install" in cuda.unavailable(0)
    monkeypatch.setattr(cache, "_compiled", Once(cache._compile))
    cache.store(tmp_path, cache.entry(compiler.read("probe.cu"), (), "sm_90", (13, 0)), b"image")
    fresh(monkeypatch, driver.LIBRARY)
    assert cuda.unavailable(0) is None


def test_a_missing_or_foreign_driver(monkeypatch, tmp_path):
    absent = str(tmp_path / "libcuda.so.1")
    fresh(monkeypatch, absent)
    with pytest.raises(KernelUnavailable, match=r"the NVIDIA driver .*libcuda\.so\.1 cannot be loaded .*; install"):
        driver.library()
    assert "install or update it" in cuda.unavailable(0)
    driver.library.cache_clear()
    monkeypatch.setattr(driver, "LIBRARY", "libc.so.6" if sys.platform == "linux" else sys.executable)  # not CUDA's
    with pytest.raises(KernelUnavailable, match=r"cannot be loaded .*; install"):
        driver.library()
    cuda._verdicts.clear()


def test_the_diagnosis(device, no_compiler_needed, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LINRNN_CACHE_DIR", str(tmp_path))
    assert main([]) == 0
    shown = capsys.readouterr().out
    for part in (torch.__version__, "Stub 0, compute capability 9.0", "CUDA 13.0", "NVRTC", f"{tmp_path}, 0 entries"):
        assert part in shown
    assert "kernels run  yes" in shown
    assert main(["--device", "5"]) == 1
    shown = capsys.readouterr().out
    assert "kernels run  no: finding device cuda:5 failed" in shown

    def missing():
        raise KernelUnavailable("no compiler; pip install one")

    monkeypatch.setattr(compiler, "version", missing)
    assert main(["--device", "1"]) == 0 and "NVRTC        none: no compiler; pip install one" in capsys.readouterr().out
