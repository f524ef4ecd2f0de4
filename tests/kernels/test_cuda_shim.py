"""The host shim on toy kernels: right ones pass in every mode, and a planted bug is found by the mode that should."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .host import MODES, SHIM, SMALL, CompileError, HostCuda, sanitized_environment, skip_without_compiler

WIDTH, WARPS, GRID, ROWS, SEEDS = 33, 64, 5, 7, 20
KERNELS = ("mirror", "ring", "exchange")
_ENUM = re.search(r"enum Bug : int64_t {(.*?)}", (SHIM / "toys.cu").read_text(), re.DOTALL)
assert _ENUM
BUGS = {name: number for number, name in enumerate(re.findall(r"k(\w+)", _ENUM[1]))}

RACE = (
    r"kernel mirror, block .: thread \d+ (reads|writes) shared memory at byte \d+ \(toys.cu:\d+\), "
    r"which thread \d+ of block . (wrote|read) \(toys.cu:\d+\) with no barrier between"
)
# what each bug is called by the first mode that is sure to find it; fibers find it in one of SEEDS orders
FOUND = {
    ("fibers", "NoBarrierBeforeRead"): "wrong result",
    ("fibers", "NoBarrierAfterRead"): "wrong result",
    ("fibers", "SharedWrite"): f"kernel mirror, block . of 5: write outside of shared memory, at byte {4 * WIDTH} of",
    ("fibers", "SharedRead"): "wrong result",
    ("fibers", "Divergent"): r"thread \d+ waits at the barrier .*toys.cu:\d+, but thread 1 at .*toys.cu:\d+",
    ("fibers", "Exited"): r"thread \d+ waits at the barrier .*toys.cu:\d+, but thread 1 has exited",
    ("fibers", "OtherBarrier"): r"thread \d+ waits at the barrier .*toys.cu:\d+, but thread \d+ at .*toys.cu:\d+",
    ("fibers", "NoWait"): "wrong result",
    ("fibers", "ShortWait"): "wrong result",
    ("fibers", "NoCommit"): "wrong result",
    ("fibers", "NoBarrierAfterWait"): "wrong result",
    ("fibers", "EarlyRefill"): "wrong result",
    ("fibers", "Misaligned"): r"kernel ring, block . of 5, thread \d+: .* 4 bytes between addresses that are not",
    ("fibers", "OddSize"): "asynchronous copy of 2 bytes; 4, 8 and 16 are allowed",
    ("fibers", "NotShared"): "asynchronous copy to outside of shared memory",
    ("fibers", "Overflow"): "asynchronous copy to outside of shared memory",
    ("fibers", "FromShared"): "asynchronous copy from shared memory",
    ("fibers", "AbsentLane"): r"thread \d+ waits in the shuffle .*toys.cu:\d+ for lanes of its warp that do not come",
    ("fibers", "OtherShuffle"): r"thread \d+ is in the shuffle .*toys.cu:\d+ by \d, but thread \d+ in that .* by \d",
    ("races", "ShuffleForBarrier"): RACE.replace("mirror", "exchange"),
    ("races", "NoBarrierBeforeRead"): RACE,
    ("races", "NoBarrierAfterRead"): RACE,
    ("races", "SharedWrite"): f"thread 1 writes shared memory at byte {4 * WIDTH} .*, outside of its {4 * WIDTH} bytes",
    ("races", "SharedRead"): f"thread 1 reads shared memory at byte {4 * WIDTH} .*, outside of its {4 * WIDTH} bytes",
    ("races", "BlocksMeet"): r"writes global memory .*, which thread \d+ of block \d wrote .* with no barrier between",
    ("races", "NoWait"): r"reads shared memory .* asynchronous copy of thread \d+ may still be writing",
    ("races", "ShortWait"): r"reads shared memory .* asynchronous copy of thread \d+ may still be writing",
    ("races", "NoCommit"): r"reads shared memory .* asynchronous copy of thread \d+ may still be writing",
    (
        "races",
        "NoBarrierAfterWait",
    ): r"starts a copy to shared memory .*, which thread \d+ of block . read .* no barrier",
    ("races", "EarlyRefill"): r"(starts a copy to .* read .* no barrier|reads .* may still be writing)",
    ("address", "GlobalWrite"): r"heap-buffer-overflow[\s\S]*WRITE of size 4[\s\S]*toys.cu:\d+",
    ("address", "GlobalRead"): r"heap-buffer-overflow[\s\S]*READ of size 4[\s\S]*toys.cu:\d+",
    ("address", "SharedWrite"): r"use-after-poison[\s\S]*WRITE of size 4[\s\S]*toys.cu:\d+",
    ("address", "SharedRead"): r"use-after-poison[\s\S]*READ of size 4[\s\S]*toys.cu:\d+",
    ("threads", "NoBarrierBeforeRead"): r"data race[\s\S]*toys.cu:\d+",
    ("threads", "NoBarrierAfterRead"): r"data race[\s\S]*toys.cu:\d+",
    ("threads", "NoBarrierAfterWait"): r"data race[\s\S]*runtime.cpp:\d+",
    ("threads", "EarlyRefill"): r"data race[\s\S]*runtime.cpp:\d+",
    ("threads", "AbsentLane"): r"waits in the shuffle .*toys.cu:\d+ for lanes of its warp that do not come",
    ("threads", "OtherShuffle"): r"is in the shuffle .*toys.cu:\d+ by \d, but thread \d+ in that .* by \d",
    ("threads", "Exited"): r"waits at the barrier .*toys.cu:\d+, but thread 1 has exited",
}


def launch(host: HostCuda, bug: str, kernel: str = "") -> None:
    """The kernel that has the bug, or the one named, once; raises for a wrong result."""
    own = "exchange" if BUGS[bug] >= BUGS["AbsentLane"] else "ring" if BUGS[bug] >= BUGS["NoWait"] else "mirror"
    kernel = kernel or own
    width = WARPS if kernel == "exchange" else WIDTH
    n, rows = (ROWS, 3) if kernel == "ring" else (width, 1)
    x = torch.randn(n if kernel == "ring" else GRID, width)
    out = torch.full((GRID, width), torch.nan)
    packed = struct.pack("QQqq", x.data_ptr(), out.data_ptr(), n, BUGS[bug])
    host.program("toys.cu", ()).kernel(kernel).launch(GRID, width, 4 * rows * width, 0, packed)
    wanted = x.sum(0).roll(-1).expand(GRID, -1) if kernel == "ring" else x.flip(1)
    if kernel == "exchange":
        t = torch.arange(width)
        wanted = x[:, t ^ 1] + x[:, t ^ 2]
    if not torch.allclose(out, wanted, rtol=1e-5, atol=1e-5):
        raise RuntimeError("wrong result")


@pytest.fixture
def shim(host_folder: Path):
    skip_without_compiler()
    return lambda mode: HostCuda(mode, host_folder, SHIM)


@pytest.mark.parametrize("mode", ("fibers", "races"))
def test_right_kernels_pass(shim, mode):
    host = shim(mode)
    for _ in range(SEEDS):
        for kernel in KERNELS:
            launch(host, "None", kernel)


@pytest.mark.parametrize(("mode", "bug"), [key for key in FOUND if key[0] in ("fibers", "races")])
def test_a_bug_is_found(shim, mode, bug):
    host = shim(mode)
    for _ in range(SEEDS if mode == "fibers" else 1):
        try:
            launch(host, bug)
        except RuntimeError as error:
            assert re.search(FOUND[mode, bug], str(error)), error
            break
    else:
        pytest.fail(f"{bug} was not found")
    launch(host, "None")  # a failed launch leaves nothing behind


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("address", pytest.param("threads", marks=pytest.mark.exhaustive)))
def test_sanitizers(shim, host_folder, mode):
    """One process for all bugs, since starting torch under a sanitizer takes seconds; it forks for each."""
    root = str(Path(__file__).parents[2])
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.kernels import test_cuda_shim as t"
    command = [sys.executable, "-c", f"{code}; t.fork_for_each_bug(*sys.argv[2:])", root, mode, str(host_folder)]
    subprocess.run(command, env=sanitized_environment(mode), check=True, timeout=300)
    for bug in ["None", *(bug for at, bug in FOUND if at == mode)]:
        status, log = ((host_folder / f"{mode}-{bug}.{kind}").read_text() for kind in ("status", "log"))
        if bug == "None":
            assert status == "0", log
        else:
            assert status != "0" and re.search(FOUND[mode, bug], log), (bug, status, log)


def fork_for_each_bug(mode: str, folder: str) -> None:
    """Writes <mode>-<bug>.status and .log, the exit status and standard error of the launches with that bug."""
    host = HostCuda(mode, Path(folder), SHIM)
    host.program("toys.cu", ())
    for bug in ["None", *(bug for at, bug in FOUND if at == mode)]:
        path = Path(folder, f"{mode}-{bug}")
        child = os.fork()
        if not child:
            os.dup2(os.open(path.with_suffix(".log"), os.O_CREAT | os.O_WRONLY), 2)
            try:
                for _ in range(5):
                    for kernel in KERNELS:
                        launch(host, "None", kernel)
                    launch(host, bug)
            except RuntimeError as error:
                os.write(2, str(error).encode())
                os._exit(1)
            os._exit(0)
        path.with_suffix(".status").write_text(str(os.waitpid(child, 0)[1]))


def test_each_bug_is_on_the_list():
    assert set(BUGS) - {"None"} == {bug for _, bug in FOUND}


def test_blocks_and_threads_take_many_orders(shim):
    """A kernel whose last writer wins shows the order; the same seed gives the same order."""
    host = shim("fibers")
    host.os_threads = 1

    def winners() -> list[int]:
        host.seed(0)
        found = []
        for _ in range(SEEDS):
            x, out = torch.arange(GRID).float().repeat_interleave(WIDTH), torch.full((WIDTH,), torch.nan)
            packed = struct.pack("QQqq", x.data_ptr(), out.data_ptr(), WIDTH, BUGS["BlocksMeet"])
            host.program("toys.cu", ()).kernel("mirror").launch(GRID, WIDTH, 4 * WIDTH, 0, packed)
            found.append(int(out[0]))
        return found

    assert set(winners()) == set(range(GRID)) and winners() == winners()


def test_launches_that_a_device_refuses(shim):
    host = shim("fibers")
    host.device = SMALL._replace(shared_bytes_per_block=1000)
    kernel = host.program("toys.cu", ()).kernel("mirror")
    for grid, block, shared_bytes, size, message in (
        (0, 32, 0, 32, r"kernel mirror: grid must be in \[1, 2147483647\], got 0"),
        (1, 1025, 0, 32, r"block must be in \[1, 1024\], got 1025"),
        (1, 0, 0, 32, r"block must be in \[1, 1024\], got 0"),
        (1, 257, 0, 32, "kernel mirror takes blocks of up to 256 threads but was given 257"),
        (1, 32, 1001, 32, r"shared_bytes must be in \[0, 1000\], got 1001"),
        (1, 32, 1000, 31, "kernel mirror takes a struct of 32 bytes but was given 31"),
    ):
        with pytest.raises(RuntimeError, match=message):
            kernel.launch(grid, block, shared_bytes, 0, bytes(size))


def test_names_that_do_not_exist(shim, host_folder, tmp_path):
    with pytest.raises(RuntimeError, match=r"no kernel missing in toys-.*; there are mirror, ring, exchange"):
        shim("fibers").program("toys.cu", ()).kernel("missing")
    with pytest.raises(ValueError, match=f"mode must be one of {', '.join(MODES)}, got fast"):
        HostCuda("fast", host_folder)
    (tmp_path / "empty.cu").write_text("int x;")
    with pytest.raises(RuntimeError, match="no kernel declared by LINRNN_KERNEL in empty"):
        HostCuda("fibers", host_folder, tmp_path).program("empty.cu", ())
    (tmp_path / "wrong.cu").write_text("#error what is wrong")
    with pytest.raises(CompileError, match="what is wrong"):
        HostCuda("fibers", host_folder, tmp_path).program("wrong.cu", ())
