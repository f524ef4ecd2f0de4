"""Compiling CUDA sources at run time: includes, architectures, resources, errors. No GPU and no driver are needed."""

import subprocess
import sys
import types

import pytest
import torch

from linrnn.kernels import KernelUnavailable
from linrnn.kernels.cuda import compiler
from linrnn.kernels.cuda.__main__ import programs
from linrnn.kernels.cuda.compiler import CompileError, Resources, compile_source, read, resources, target

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

SCALE = """
#include "../numbers.h"
#include "shared.cuh"
struct Args { float* out; };
extern "C" __global__ void scale(const __grid_constant__ Args args) {
  __shared__ float tile[64];
  tile[threadIdx.x] = FACTOR * args.out[threadIdx.x];
  __syncthreads();
  args.out[threadIdx.x] = twice(tile[63 - threadIdx.x]) + once(1.0f);
}
extern "C" __global__ void fill(const __grid_constant__ Args args) { args.out[threadIdx.x] = 1.0f; }
"""


@pytest.fixture(autouse=True, scope="module")
def nvrtc_or_skip():
    try:
        compiler.nvrtc()
    except KernelUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path):
    """A `cuda` folder with a source whose headers include one another, one of them by two paths."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "scale.cu").write_text(SCALE)
    (tmp_path / "numbers.h").write_text("#pragma once\ninline float twice(float x) { return 2 * x; }\n")
    (tmp_path / "cuda" / "shared.cuh").write_text(
        '#pragma once\n  #  include "../cuda/../numbers.h"\n#include "shared.cuh"\n'
        "inline float once(float x) { return x; }\n"
    )
    return tmp_path / "cuda"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_to_machine_code(folder, architecture):
    image, log = compile_source(read("scale.cu", folder), ("FACTOR=3.0f",), architecture)
    assert image[:4] == b"\x7fELF"
    found = resources(log)
    assert set(found) == {"scale", "fill"}
    assert found["scale"].shared >= 256 and found["fill"].registers > 0
    assert all(used.stack == used.spill_stores == used.spill_loads == 0 for used in found.values())


def test_includes_have_one_name_a_file(folder):
    source = read("scale.cu", folder)
    assert source.name == "cuda/scale.cu" and source.stem == "scale"
    assert [name for name, _ in source.headers] == ["cuda/shared.cuh", "numbers.h"]
    assert '#include "numbers.h"' in source.text and '#  include "numbers.h"' in dict(source.headers)["cuda/shared.cuh"]
    assert read(folder / "scale.cu", folder) == source


def test_a_missing_source_or_header_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"no CUDA source .*absent\.cu"):
        read("absent.cu", folder)
    (folder / "shared.cuh").write_text('#include "absent.cuh"')
    with pytest.raises(FileNotFoundError, match=r"cuda/shared\.cuh includes 'absent\.cuh'"):
        read("scale.cu", folder)


def test_an_error_shows_the_log_and_the_definitions(folder):
    with pytest.raises(CompileError, match=r"cuda/scale\.cu .*-DFACTOR=nonsense(.|\n)*\"nonsense\" is undefined"):
        compile_source(read("scale.cu", folder), ("FACTOR=nonsense",), "sm_80")


def test_spills_and_stack_are_seen(folder):
    """64 live values and an array indexed at run time do not fit the registers of 2048 resident threads."""
    (folder / "spill.cu").write_text("""
struct Args { float* out; int n; };
extern "C" __global__ void __launch_bounds__(1024, 2) spill(const __grid_constant__ Args args) {
  float v[96];
  for (int i = 0; i < 96; i++) v[i] = args.out[i * args.n + threadIdx.x];
  for (int k = 0; k < args.n; k++)
    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 1) % 96] + args.out[k];
  for (int i = 0; i < 96; i++) args.out[i * args.n + threadIdx.x] = v[i] + v[(args.n + i) % 96];
}
extern "C" __global__ void __launch_bounds__(1024, 2) indexed(const __grid_constant__ Args args) {
  float v[40];
  for (int i = 0; i < 40; i++) v[i] = args.out[i * args.n + threadIdx.x];
  for (int i = 0; i < 40; i++) args.out[i] = v[(args.n * i) % 40];
}
""")
    found = resources(compile_source(read("spill.cu", folder), (), "sm_80")[1])
    assert found["indexed"].stack > 0
    assert found["spill"].registers <= 32
    assert found["spill"].spill_stores > 0 and found["spill"].spill_loads > 0


def test_resources_are_read_off_either_form_of_log():
    """With and without static shared memory; anything else is an error, not a zero."""
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'one' for 'sm_90'
ptxas info    : Function properties for one
ptxas         .     8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem, 368 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_90'
ptxas info    : Function properties for two
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers"""
    assert resources(log) == {"one": Resources(40, 512, 8, 12, 16), "two": Resources(10, 0, 0, 0, 0)}
    with pytest.raises(ValueError, match="not a log"):
        resources("ptxas info : Compiling entry function 'one' for 'sm_90'\n")


def test_a_device_newer_than_the_compiler_gets_ptx(folder, monkeypatch):
    monkeypatch.setattr(compiler, "supported", lambda: (75, 80, 90))
    assert target((9, 0)) == "sm_90" and target((8, 0)) == "sm_80"
    assert target((12, 1)) == "compute_90" and target((8, 6)) == "compute_80"
    image, log = compile_source(read("scale.cu", folder), ("FACTOR=1",), "compute_90")
    assert b".target sm_90" in image and image.endswith(b"\0") and not resources(log)


def test_a_device_too_old_is_refused(monkeypatch):
    with pytest.raises(KernelUnavailable, match=r"capability 6\.1 is too old: the kernels need 7\.0 or newer"):
        target((6, 1))
    monkeypatch.setattr(compiler, "supported", lambda: (75, 80, 90))
    with pytest.raises(KernelUnavailable, match=r"no longer compiles for .* 7\.0; pip install nvidia-cuda-nvrtc-cu12"):
        target((7, 0))


@pytest.mark.parametrize(
    ("cuda", "cure"),
    (
        (None, r"pip install 'nvidia-cuda-nvrtc>=13,<14' 'cuda-bindings>=13,<14'"),
        ("13.2", r"pip install 'nvidia-cuda-nvrtc>=13,<14' 'cuda-bindings>=13,<14'"),
        ("12.8", r"pip install nvidia-cuda-nvrtc-cu12 'cuda-bindings>=12.9,<13'"),
    ),
)
def test_a_missing_compiler_names_the_packages_of_torchs_cuda(monkeypatch, cuda, cure):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(KernelUnavailable, match=r"cuda\.bindings cannot be imported .*; ") as caught:
            compiler.nvrtc.__wrapped__()
        assert str(caught.value).endswith(cure)

    def not_found():
        raise RuntimeError("Failure finding libnvrtc.so\nand a long story")

    fake = types.SimpleNamespace(nvrtcVersion=not_found)
    monkeypatch.setitem(sys.modules, "cuda.bindings", types.SimpleNamespace(nvrtc=fake))
    with pytest.raises(
        KernelUnavailable, match=r"NVRTC cannot be loaded \(RuntimeError: Failure finding libnvrtc"
    ) as caught:
        compiler.nvrtc.__wrapped__()
    assert str(caught.value).endswith(cure) and "long story" not in str(caught.value)


def test_importing_the_package_loads_neither_bindings_nor_driver():
    code = """
import sys, torch
before = set(sys.modules)
import linrnn.kernels.cuda
assert not any(name.split(".")[0] == "cuda" for name in set(sys.modules) - before)
assert linrnn.kernels.cuda.driver.library.cache_info().currsize == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def sample() -> list:
    """Every direction and pair of dtypes on every architecture, the other definitions taking turns.

    On one architecture, in turns, unless exhaustive tests are asked for.

    All programs on all architectures take minutes: `python -m linrnn.kernels.cuda --compile` does that, fails on spills
    too, and `benchmarks/gpu_check.sh` runs it for the GPU at hand.
    """
    kinds: dict[tuple, list] = {}
    for name, definitions in programs():
        dtypes = tuple(d for d in definitions if d.startswith(("LINRNN_BACKWARD", "LINRNN_A", "LINRNN_X")))
        kinds.setdefault((name, dtypes), []).append((name, definitions))
    return [
        pytest.param(
            architecture,
            *variants[(3 * i + k) % len(variants)],
            marks=() if k == i % len(ARCHITECTURES) else pytest.mark.exhaustive,
        )
        for i, variants in enumerate(kinds.values())
        for k, architecture in enumerate(ARCHITECTURES)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "name", "definitions"), sample(), ids=lambda v: v if type(v) is str else "-".join(v)
)
def test_the_programs_of_the_library_fit_the_registers(architecture, name, definitions):
    """No spills and no local memory; `pytest -s` shows the table."""
    found = resources(compile_source(read(name), definitions, architecture)[1])
    assert found
    for kernel, used in found.items():
        print(f"\n{architecture:<7} {kernel:<28} {used.registers:4} registers {used.shared:6} B static", end="")
        assert used.stack == used.spill_stores == used.spill_loads == 0, (kernel, used)
