"""Every Triton kernel, as the launchers launch it, compiled ahead for GPUs that need not be here.

Launches on meta tensors are recorded instead of run, and what they would compile is compiled: nothing may spill
registers to memory, shared memory must fit every GPU since sm_80, and products in bfloat16 must run on tensor cores.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHARED = 99 * 1024  # of a block, on the smallest of sm_80 to sm_120
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KINDS = ("none", "head", "channel")


class Launch(NamedTuple):
    kernel: JITFunction
    args: tuple
    options: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """What the launchers launch, instead of launching it."""
    recorded: list[Launch] = []

    def record(self, *args, grid, warmup, **options):
        assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < size < 2**16 for size in grid[1:])
        recorded.append(Launch(self, args, options))

    monkeypatch.setattr(JITFunction, "run", record)
    yield recorded


def launch_all(dtype: torch.dtype, kind: str, delta: bool, K: int, V: int, T: int) -> None:
    """Forward, backward and step of one problem."""
    from linrnn.kernels.triton import delta_rule, linear_attention

    B, H = 2, 4

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v, grad_o = empty(B, T, H, K), empty(B, T, H, K), empty(B, T, H, V), empty(B, T, H, V)
    beta = empty(B, T, H) if delta else None
    shape = {"none": None, "head": (B, T, H), "channel": (B, T, H, K)}[kind]
    log_decay = None if shape is None else empty(*shape, dtype=torch.float32)
    state = empty(B, H, K, V, dtype=torch.float32)
    module, inputs = (delta_rule, (q, k, v, beta)) if delta else (linear_attention, (q, k, v))
    module.forward(*inputs, log_decay, state, 0.3, 64, dtype)
    module.backward(*inputs, log_decay, state, grad_o, state, 0.3, 64)
    linear_attention.step(q, k, v, beta, log_decay, state, 0.3, dtype)


def source_of(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton would compile for a launch, and its options."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.args, strict=False))
    options = {}
    for name, value in launch.options.items():
        (values if name in names else options)[name] = value
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(names, launch.kernel.params, strict=True)):
        value = values[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[i,] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes), options


def spills(ptx: str) -> int:
    """Bytes stored, as ptxas tells; some wheels hold a second one, for Blackwell and for newer PTX."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    told = ""
    names = ("ptxas", "ptxas-blackwell")
    for name in reversed(names) if target[1].startswith("sm_1") else names:
        if (BINARIES / name).exists():
            command = [str(BINARIES / name), "-v", "--gpu-name", target[1], "-o", os.devnull, "/dev/stdin"]
            done = subprocess.run(command, input=ptx, capture_output=True, text=True)
            told += done.stderr
            if done.returncode == 0:
                return sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", done.stderr))
    raise AssertionError(told)


def check(launches: list[Launch], arch: int, only: tuple[str, ...] = ()) -> set[str]:
    """Compiles what was recorded; returns the names of the kernels."""
    seen = set()
    for launch in launches:
        if only and launch.kernel.__name__ not in only:
            continue
        source, options = source_of(launch)
        key = (launch.kernel.__name__, str(source.signature), str(source.constants), str(options))
        if key in seen:
            continue
        seen.add(key)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx, name = compiled.asm["ptx"], f"{launch.kernel.__name__} for sm_{arch} with {source.constants}"
        spilled = spills(ptx)
        assert spilled == 0, f"{name} spills {spilled} bytes of registers"
        assert compiled.metadata.shared <= SHARED, f"{name} takes {compiled.metadata.shared} bytes of shared memory"
        if "DOT" in launch.options:
            assert re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx), f"{name} uses no tensor cores"
        if launch.options.get("DOT") == triton.language.bfloat16:
            assert re.search(r"mma[^;\n]*bf16|tcgen05\.mma[^;\n]*f16", ptx), f"{name} multiplies in another type"
    return {name for name, *_ in seen}


@pytest.fixture
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The launchers lay out for this compute capability."""
    from linrnn.kernels.triton import plan

    monkeypatch.setattr(plan, "warpgroup_products", lambda device: request.param >= 90)
    return request.param


LINEAR = {"carry", "read", "gradients", "recurrent"}
DELTA = {"read", "gradients", "recurrent", "inverse_of_chunks", "write", "write_backward", "inverse_backward"}


@pytest.mark.parametrize("arch", (90,), indirect=True)
@pytest.mark.parametrize("delta", (False, True))
def test_bf16_for_hopper(launches, arch, delta):
    launch_all(torch.bfloat16, "head", delta, 64, 64, 4096)
    assert check(launches, arch) == (DELTA if delta else LINEAR)


@pytest.mark.parametrize("arch", (80, 100), indirect=True)
def test_some_for_the_generations_around_it(launches, arch):
    launch_all(torch.bfloat16, "head", False, 64, 64, 4096)
    assert check(launches, arch, only=("carry", "read")) == {"carry", "read"}


# Every op and kind of decay on every architecture, the dtypes taking turns: all of them together take minutes.
KINDS_OF_CALL = [(delta, kind) for delta in (False, True) for kind in KINDS]
ROTATION = [
    (arch, tuple(TYPES)[(i + j) % len(TYPES)], kind, delta)
    for i, (delta, kind) in enumerate(KINDS_OF_CALL)
    for j, arch in enumerate((80, 90, 100))
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "dtype", "kind", "delta"),
    [pytest.param(*case, marks=() if case[0] == 90 else pytest.mark.exhaustive) for case in ROTATION],
    indirect=["arch"],
    ids=str,
)
def test_everything_compiles(launches, arch, dtype, kind, delta):
    for K, V, T in ((64, 64, 4096), (128, 128, 4096), (32, 64, 20)):
        launch_all(dtype, kind, delta, K, V, T)
    check(launches, arch)
