"""What the benchmarks share: fair timing, the machine's name, and where tables go."""

import contextlib
import ctypes
import importlib.metadata
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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


Call = Callable[[int], object]  # takes the number of the call, so that it can go round several sets of inputs


def median_times(
    functions: dict[str, Call], device: torch.device, seconds: float = 0.15, least: int = 5, block_ms: float = 3.0
) -> dict[str, float]:
    """Median milliseconds of one call of each, on the clock of the device (CUDA events) or, for a CPU, of the host.

    Calls are timed in blocks that last `block_ms`, since an event costs about as much as a launch. The blocks of all
    functions take turns, at least `least` each and then until each has spent its `seconds`. Compilation, autotuning
    and the first allocations happen before. Times of short calls include what launching costs: see `captured`.
    """
    calls = {}
    for name, function in functions.items():
        for i in range(3):
            function(i)
        once = max(_elapsed(function, device, range(3, 5)) / 2, 1e-4)
        calls[name] = min(max(math.ceil(block_ms / once), 1), 300)
    blocks: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(max(least, math.ceil(1e3 * seconds / block_ms))):
        for name, function in functions.items():
            if turn < least or sum(blocks[name]) < 1e3 * seconds:
                first = turn * calls[name]
                blocks[name].append(_elapsed(function, device, range(first, first + calls[name])))
    return {name: statistics.median(values) / calls[name] for name, values in blocks.items()}


def _elapsed(function: Call, device: torch.device, numbers: Sequence[int]) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for i in numbers:
            function(i)
        return 1e3 * (time.perf_counter() - start)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for i in numbers:
        function(i)
    after.record()
    after.synchronize()
    return before.elapsed_time(after)


def captured(function: Call, calls: int, device: torch.device) -> Callable[[int], object]:
    """A function that replays a CUDA graph of calls 0 ... calls - 1; on a CPU, one that makes them.

    Divide its time by `calls`: what is left of each call then is the time of its kernels, and next to no launch.
    """
    if device.type != "cuda":
        return lambda _: [function(i) for i in range(calls)]
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # warm-up, as capture demands, away from the default stream
        for i in range(2):
            function(i)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            function(i)
    return lambda _: graph.replay()


def rounds(set_bytes: int, device: torch.device, most: int = 64) -> int:
    """How many sets of `set_bytes` to go round so that none is found in the L2 cache (four times its size): at least 2,
    unless a quarter of the free memory cannot hold them."""
    if device.type != "cuda":
        return 2
    properties = torch.cuda.get_device_properties(device)
    fit = torch.cuda.mem_get_info(device)[0] // (4 * max(set_bytes, 1))
    return max(1, min(max(2, math.ceil(4 * properties.L2_cache_size / max(set_bytes, 1))), most, fit))


def copy_bandwidth(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes per second, read plus written, of a copy within the device: the ceiling of whatever is bound by memory."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    ms = median_times({"copy": lambda _: source.clone()}, device, seconds=0.2)["copy"]
    return 2 * size / ms * 1e3


def synchronized(function: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A function that returns once the device is done, for clocks of the host."""
    if device.type != "cuda":
        return function

    def run():
        function()
        torch.cuda.synchronize(device)

    return run


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """MiB that a call of `function` takes at its peak, results included, on top of what is held before.

    On a CPU this is Linux's high-water mark of resident memory, set back before the call. It misses what the process
    has freed and malloc still holds: measure in a fresh process, after a small call that loads and starts everything.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        del result
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    result = function()
    peak = _status_kib("VmHWM") - before
    del result
    return peak / 2**10


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within the block after `seconds`: peers compile for as long as they like."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def accelerator(device: torch.device) -> str:
    """The GPU, its driver and torch's CUDA, for the head of a table."""
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index or 0}"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return (
        f"{properties.name}, capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.L2_cache_size / 2**20:.0f} MiB of L2, "
        f"{properties.total_memory / 2**30:.0f} GiB; driver {driver}, CUDA {torch.version.cuda}"
    )


def device_slug(device: torch.device) -> str:
    """The device in the name of a results file: "nvidia_h200", or "cpu"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return "_".join(name.lower().replace("-", " ").split())


def write_whole(path: Path, text: str) -> None:
    """Writes a file at once: a run that is cut short leaves the last whole table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


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


def head(title: str, *packages: str, device: torch.device | None = None) -> str:
    """Title, machine, versions, commit and command of a results file; `device` is the GPU that was measured."""
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS)
    command = "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    lines = ["", f"- machine: {machine()}", f"- versions: {', '.join(versions)}"]
    if device is not None and device.type == "cuda":
        lines.insert(1, f"- GPU: {accelerator(device)}")
    commit = git.stdout.strip() or os.environ.get("LINRNN_COMMIT", "unknown")  # a copied tree has no history to ask
    lines.append(f"- commit: {commit}, {time.strftime('%Y-%m-%d')}")
    return "\n".join([f"# {title}", *lines, f"- command: `{command}`", ""])
