"""What the benchmarks share: fair timing, the machine's name, and where tables go."""

import ctypes
import importlib.metadata
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def keep_memory_warm() -> None:
    """Makes glibc keep freed memory, so that outputs are warm: fresh pages cost as much as a whole scan."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def best_times(functions: dict[str, Callable[[], object]], seconds: float = 1.0, most: int = 100) -> dict[str, float]:
    """Milliseconds of the fastest run of each, the runs interleaved so that a busy moment hits all of them.

    Each is called at least twice and then, in turn, until its own share of time (`seconds`) or count is spent.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(most):
        for name, function in functions.items():
            if turn < 2 or sum(times[name]) < seconds:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * min(values) for name, values in times.items()}


def machine() -> str:
    """Processor, threads and load, for the head of a table."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = dict(line.split("\t: ", 1) for line in info.read_text().splitlines() if "\t: " in line)
        name = lines.get("model name", name)
    load = Path("/proc/loadavg")
    busy = f", load {load.read_text().split()[0]} at the start" if load.exists() else ""
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}{busy}"


def head(title: str, *packages: str) -> str:
    """Title, machine, versions, commit and command of a results file."""
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS)
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = ["", f"- machine: {machine()}", f"- versions: {', '.join(versions)}"]
    lines.append(f"- commit: {git.stdout.strip() or 'unknown'}, {time.strftime('%Y-%m-%d')}")
    return "\n".join([f"# {title}", *lines, f"- command: `{command}`", ""])
