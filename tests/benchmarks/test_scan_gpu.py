"""benchmarks/scan_gpu.py and layer_gpu.py without a GPU: dry runs, the check of the peers, goals and crossover."""

import subprocess
import sys

import pytest
import torch

CPU = torch.device("cpu")


def execute(scripts, name: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(scripts / name), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_dry_run_of_the_scan(scripts, tmp_path):
    result = execute(scripts, "scan_gpu.py", "--device", "cpu", "--dry-run", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "scan_cpu_dry_run.md").read_text()
    assert table.strip() in result.stdout
    for part in ("| linrnn |", "| copy |", "| torch.add |", "| linrnn, torch form |", "- not here: ", "## Goals"):
        assert part in table
    for part in ("CUDA graph", "host time of a step", "first call of a process, from the cache", "- met: "):
        assert part in table
    assert (tmp_path / "scan_cpu_dry_run.png").stat().st_size > 10_000

    result = execute(scripts, "scan_gpu.py", "--device", "cpu", "--dry-run", "--sweep", "--out", str(tmp_path))
    assert result.returncode == 0 and "No GPU: nothing to sweep" in result.stdout


@pytest.mark.slow
def test_dry_run_of_the_layer(scripts, tmp_path):
    result = execute(scripts, "layer_gpu.py", "--device", "cpu", "--dry-run", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "layer_cpu_dry_run.md").read_text()
    assert "| 64 | 1 |" in table and "**d = 128: " in table
    assert (tmp_path / "layer_cpu_dry_run.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ("scan_gpu", "layer_gpu"))
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--device", "cpu"], "--device cpu measures nothing that is of use: add --dry-run"),
        ([], "no GPU: torch.cuda.is_available() is False"),
    ),
)
def test_without_a_gpu(name, arguments, message, monkeypatch, capsys):
    script = __import__(name)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("shapes", ("1,2", "1,2,x"))
def test_bad_shapes(shapes, monkeypatch, capsys):
    import scan_gpu

    monkeypatch.setattr(sys, "argv", ["scan_gpu", "--device", "cpu", "--dry-run", "--shapes", shapes])
    with pytest.raises(SystemExit):
        scan_gpu.main()
    assert "--shapes: expected" in capsys.readouterr().err


def test_peers_that_are_wrong_fail_or_take_too_long_are_named_and_not_timed():
    import time

    import scan_gpu
    from scan_cases import CASES
    from scan_peers import Peer

    from linrnn.ops import diagonal_scan

    def right(a, x):
        return diagonal_scan(a, x, backend="torch")[0]

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(a, x)
            return right(a, x)

        @staticmethod
        def backward(ctx, g):
            return g, g

    def fails(a, x):
        raise RuntimeError("no such device\nand more")

    peers = [
        Peer("right", right),
        Peer("right, time last", lambda a, x: right(a.mT, x.mT).mT, time_last=True),
        Peer("right, by logarithms", lambda g, x: right(g.exp(), x), prepare=lambda a, x: (a.log(), x),
             gradients=lambda a, x, grad_g, grad_x: (grad_g / a, grad_x)),
        Peer("wrong", lambda a, x: right(a, 1.01 * x)),
        Peer("wrong backwards", WrongGradient.apply),
        Peer("NaN", lambda a, x: right(a, x) * torch.nan),
        Peer("fails", fails),
        Peer("slow", lambda a, x: time.sleep(60)),
        Peer("of another kind", fails, accepts=lambda a, x: x.is_complex()),
    ]  # fmt: skip
    asked = list(peers)
    for name, patient in (("fp32", True), ("fp32, constant a", False)):
        found = scan_gpu.measure((2, 20, 3), CASES[name], asked, CPU, 0.001, patience=1.0)
        assert set(found.both) == {"copy", "linrnn", *(p.name for p in peers[:3])}
        assert set(found.forward) == {*found.both, "torch.add"}
        left_out = " | ".join(found.left_out)
        for part in (
            "wrong: h is off by",
            "wrong backwards: the gradient of ",
            "NaN: h is off by nan",
            "fails: RuntimeError: no such device",
        ):
            assert part in left_out
        assert ("slow: TimeoutError: stopped after 1 s" in left_out) == patient  # who is late once is not asked again
        assert len(found.left_out) == 4 + patient


def test_goals():
    """Each is met and missed where it should be: 100 GB/s is the copy's."""
    from scan_cases import CASES, NARROW, SMALL
    from scan_report import Result, goals, table

    case, big = CASES["fp32"], (8, 4096, 2048)
    results = []
    for share in (0.95, 0.5):
        for shape in (big, NARROW, SMALL):
            forward, both = (size / share / 1e11 * 1e3 for size in (case.forward_bytes(shape), case.both_bytes(shape)))
            add = forward / (1.5 if share > 0.9 else 3)
            times = {"copy": forward, "torch.add": add, "linrnn": forward, "linrnn, torch form": 0.1 * forward}
            peer = forward * (2 if share > 0.9 else 0.9)
            results.append(
                Result(
                    shape,
                    case,
                    times | {"peer": peer},
                    {"linrnn": both, "peer": 1.5 * both},
                    dict(times),
                    {"peer": 1e-6},
                )
            )
    lines = goals(results, 1e11)
    half = len(lines) // 2
    assert all(line.startswith("- met: ") for line in lines[:half])
    missed = [line for line in lines[half:] if line.startswith("- MISSED: ")]
    for part in (
        "(goal 90 %)",
        "(goal 85 %)",
        "(goal 70 %)",
        "called, forward takes 3.00",
        "a CUDA graph, forward takes",
    ):
        assert any(part in line for line in missed), part
    assert sum("the fastest peer (peer) takes 0.90 times" in line for line in missed) == 3
    row = next(line for line in table(results[0], 1e11) if line.startswith("| linrnn |"))
    assert row.split(" | ")[2:5] == ["95", "95%", "1.00"] and row.split(" | ")[6:9] == ["95", "95%", "1.00"]


def test_bytes_that_must_move():
    """The figures of the issue: 12 and 32 bytes for fp32 with a varying a, 8 and 20 for a constant one."""
    from scan_cases import CASES

    found = {name: (c.forward_bytes((1, 1, 1)), c.both_bytes((1, 1, 1))) for name, c in CASES.items()}
    assert found["fp32"] == (12, 32) and found["fp32, constant a"] == (8, 20)
    assert found["complex64"] == (24, 64) and found["complex64, constant a"] == (16, 40)
    assert found["bf16 beside fp32 a"] == (8, 22) and found["bf16, constant fp32 a"] == (4, 10)


def test_crossover():
    from layer_gpu import crossover, verdict

    def times(ratios):
        return {256 * 2**i: {"LRU": 1.0, "attention": r, "attention, no positions": 9.0} for i, r in enumerate(ratios)}

    assert crossover(times([0.5, 0.8, 0.9])) == (None, None)
    assert crossover(times([1.1, 1.2])) == (256, None)
    first, where = crossover(times([0.5, 2.0, 3.0]))
    assert first == 512 and where == pytest.approx(256 * 2**0.5)
    assert crossover(times([2.0, 0.5, 4.0]))[0] == 1024  # a win that is lost again does not count
    assert "goal T = 1024: met" in verdict(512, times([0.5, 0.8, 2.0]))
    assert "goal T = 1024: MISSED" in verdict(512, times([0.5, 0.8, 0.9, 2.0]))
    assert "MISSED" in verdict(512, times([0.5])) and "goal" not in verdict(256, times([0.5]))
