"""How benchmarks/common.py times, on the clock of the host and on that of a GPU, for which a stand-in plays."""

import time
from types import SimpleNamespace

import pytest
import torch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_median_of_blocks_by_the_number_of_the_call():
    import common

    numbers = {"slow": [], "fast": []}
    functions = {
        "slow": lambda i: (numbers["slow"].append(i), time.sleep(0.004)),
        "fast": lambda i: (numbers["fast"].append(i), time.sleep(0.001)),
    }
    times = common.median_times(functions, CPU, seconds=0.02, block_ms=4)
    assert times["slow"] >= 4 and times["fast"] >= 1
    for made in numbers.values():  # warm-up and estimate, then every number once, so that sets of inputs take turns
        assert made[:5] == [0, 1, 2, 3, 4] and made[5:] == list(range(len(made) - 5))


class Event:
    """A CUDA event of the host."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Graph:
    replays = 0

    def replay(self):
        Graph.replays += 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    wait_stream = __init__ = lambda self, *_: None


def test_on_a_gpu(monkeypatch):
    import common

    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=140 << 30
    )
    for name, value in {
        "Event": Event,
        "Stream": Graph,
        "CUDAGraph": Graph,
        "stream": lambda s: s,
        "graph": lambda g: g,
        "current_stream": lambda d: Graph(),
        "get_device_properties": lambda d: properties,
        "get_device_name": lambda d: properties.name,
        "mem_get_info": lambda d: (100 << 30, 140 << 30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    times = common.median_times({"sleep": lambda i: time.sleep(0.001)}, GPU, seconds=0.01)
    assert times["sleep"] >= 1

    calls = []
    replay = common.captured(calls.append, 7, GPU)
    assert calls == [0, 1, *range(7)]  # the warm-up, then the capture
    replay(0)
    assert Graph.replays == 1

    assert common.rounds(1 << 20, GPU) == 64 and common.rounds(30 << 20, GPU) == 8
    assert common.rounds(1 << 30, GPU) == 2  # nothing of the last call is left in the cache, and still
    assert common.rounds(200 << 30, GPU) == 1
    assert common.device_slug(GPU) == "nvidia_h200"
    assert "NVIDIA H200, capability 9.0, 132 multiprocessors, 60 MiB of L2, 140 GiB; driver" in common.accelerator(GPU)
    assert "- GPU: NVIDIA H200" in common.head("Title", device=GPU)


def test_a_graph_of_calls_on_the_cpu_makes_them():
    import common

    calls = []
    common.captured(calls.append, 3, CPU)(0)
    assert calls == [0, 1, 2]


def test_a_limit_of_time_ends_what_takes_longer_and_nothing_else():
    import common

    with pytest.raises(TimeoutError, match="stopped after 0 s"), common.time_limit(0.05):
        time.sleep(5)
    with common.time_limit(0.2):
        pass
    time.sleep(0.25)


def test_a_file_is_written_whole(tmp_path):
    import common

    common.write_whole(tmp_path / "folder" / "table.md", "text")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["table.md"]
    assert (tmp_path / "folder" / "table.md").read_text() == "text"
