"""What a call of diagonal_scan costs beside its kernels: launching, the Python around it, and the first call of all."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from linrnn.ops import diagonal_scan, diagonal_step

# In a process of its own: CUDA is initialised, then one forward and one backward, each waited for.
FIRST_CALL = """
import sys, time, torch
from linrnn.ops import diagonal_scan
device, backend = sys.argv[1], "cuda" if sys.argv[1].startswith("cuda") else "auto"
a, x = torch.rand(64, device=device), torch.randn(2, 100, 64, device=device, requires_grad=True)
def finish():
    if device.startswith("cuda"):
        torch.cuda.synchronize()
finish()
start = time.perf_counter()
h, _ = diagonal_scan(a, x, backend=backend); finish()
middle = time.perf_counter()
h.sum().backward(); finish()
print(middle - start, time.perf_counter() - middle)
"""


def report(device: torch.device, dry_run: bool = False) -> list[str]:
    """Lines of a list, ready for the table."""
    calls = 20 if dry_run else 1000
    lines = []
    for name, microseconds in host_times(device, calls).items():
        lines.append(f"- {name}: {microseconds:.1f} us")
    launch = launch_microseconds(device, calls)
    lines.append("- one launch of a kernel, from the packed struct on: " + (f"{launch:.1f} us" if launch else "no GPU"))
    for name, (forward, backward) in first_calls(device).items():
        lines.append(f"- first call of a process, {name}: forward {forward:.2f} s, backward {backward:.2f} s")
    return lines


def host_times(device: torch.device, calls: int) -> dict[str, float]:
    """Microseconds that the host spends on a call which it does not wait for: at 1 x 1 x 64 the GPU keeps up."""
    a, x, state = torch.rand(64, device=device), torch.randn(1, 2, 64, device=device), torch.randn(1, 64, device=device)
    step, leaf = x[:, :1].clone(), x.clone().requires_grad_()
    pool, rows = torch.randn(64, 64, device=device), torch.arange(8, device=device)
    tokens = torch.randn(8, 64, device=device)
    backend = "cuda" if device.type == "cuda" else "auto"

    def training() -> None:
        diagonal_scan(a, leaf, backend=backend)[0].sum().backward()
        leaf.grad = None

    functions: dict[str, Callable[[], object]] = {
        "host time of torch.add": lambda: torch.add(x, a),
        "host time of diagonal_scan, T = 2, without gradients": lambda: diagonal_scan(a, x, backend=backend),
        "host time of the same with a given state": lambda: diagonal_scan(a, x, state, backend=backend),
        "host time of a step, T = 1, backend 'auto'": lambda: diagonal_scan(a, step, state),
        "host time of diagonal_step, 8 rows of a pool in place": lambda: diagonal_step(a, tokens, pool, rows, out=pool),
        "host time of forward, sum and backward": training,
    }
    return {name: _host_microseconds(function, device, calls) for name, function in functions.items()}


def _host_microseconds(function: Callable[[], object], device: torch.device, calls: int) -> float:
    """The best of five runs; the queue of the GPU is emptied between them, and short enough not to fill up within."""
    calls = min(calls, 200)
    best = float("inf")
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, time.perf_counter() - start)
    synchronize(device)
    return 1e6 * best / calls


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def recorded_launches() -> Iterator[list[tuple]]:
    """Collects (kernel, arguments) of every launch within."""
    from linrnn.kernels.cuda import Kernel

    launches: list[tuple] = []
    original = Kernel.launch

    def launch(kernel, *arguments):
        launches.append((kernel, arguments))
        return original(kernel, *arguments)

    Kernel.launch = launch  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        Kernel.launch = original  # type: ignore[method-assign]


def launch_microseconds(device: torch.device, calls: int) -> float | None:
    """Host microseconds of Kernel.launch alone, over the last launch of a small scan; None where nothing launches."""
    a, x = torch.rand(64, device=device), torch.randn(1, 2, 64, device=device)
    with recorded_launches() as launches:
        outputs = diagonal_scan(a, x)
    if not launches:
        return None
    kernel, arguments = launches[-1]
    time_of_one = _host_microseconds(lambda: kernel.launch(*arguments), device, calls)
    del outputs  # held until here: the launches write to it
    return time_of_one


def first_calls(device: torch.device) -> dict[str, tuple[float, float]]:
    """Seconds of the first forward and backward of a process, without cached cubins and then with them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LINRNN_CACHE_DIR": folder}
        for name in ("nothing cached", "from the cache"):
            command = [sys.executable, "-P", "-c", FIRST_CALL, str(device)]
            output = subprocess.run(command, env=environment, capture_output=True, text=True)
            if output.returncode:
                raise RuntimeError(f"the first call, {name}, failed:\n{output.stderr}")
            forward, backward = map(float, output.stdout.split()[-2:])
            found[name] = (forward, backward)
    return found
