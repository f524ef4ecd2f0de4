"""The sweep of launch plans (benchmarks/scan_sweep.py) on the host shim: what it tries is right; it finds the best."""

import time
from pathlib import Path

import pytest
import torch

from linrnn.kernels.cuda import selective_scan
from linrnn.kernels.cuda.selective_plan import Plan


@pytest.fixture
def sweep(monkeypatch, host_cuda):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return __import__("scan_sweep")


@pytest.mark.parametrize("case", ("fp32", "bf16, constant fp32 a"))
def test_every_plan_that_it_tries_is_right(sweep, case):
    """Plans of all shapes of parallelism, and those around them."""
    from scan_cases import CASES

    shape, device = (1, 70, 34), torch.device("cpu")
    for name, _, call in sweep.passes(shape, CASES[case], device):
        rule, wanted = sweep.rule(call), call(0)
        plans = [plan for plan in sweep.neighbours(rule, 70, first=True) if sweep.sensible(plan, 70)]
        assert {plan.chunk > 0 for plan in plans} == {plan.segments > 1 for plan in plans} == {False, True}
        for plan in plans:
            for got, expected in zip(call(0, plan), wanted, strict=True):
                assert sweep.close(got, expected), (name, plan)


def test_it_climbs_to_the_fastest_and_leaves_out_what_fails_or_differs(sweep, monkeypatch, capsys):
    """Times are made up: the more rows in a stage the better, but for a plan that is wrong and one that fails."""
    from linrnn.kernels.cuda.plan import Plan

    monkeypatch.setattr(sweep, "rule", lambda call: Plan(64, 1, 4))

    def call(number, plan=None):
        if plan and plan.rows == 32:
            raise RuntimeError("does not fit")
        return (torch.full((1, 70, 3), 2.0 if plan and plan.rows == 2 else 1.0),)

    def median_times(functions, device, seconds):
        plan = functions[""].__defaults__[0] if functions[""].__defaults__ and functions[""] is not call else None
        return {"": 1.0 / (plan.rows if plan else 4)}

    monkeypatch.setattr(sweep.common, "median_times", median_times)
    line = sweep.row("label", 1000, call, torch.device("cpu"), 1e9, 0.001, time.monotonic() + 60)
    assert line.startswith("| label | width 64, segments 1, rows 4 | 0.2500 | ")
    assert "rows 16 | 0.0625 | " in line and line.endswith("| 4.00 |")
    printed = capsys.readouterr().out
    assert "rows=32" in printed and "does not run: does not fit" in printed and "gives other results" in printed


def test_every_plan_of_the_selective_scan_that_it_tries_is_right(monkeypatch, host_cuda):
    """benchmarks/selective_scan_gpu.py, with the kernels' launcher on the CPU."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench = __import__("selective_scan_gpu")
    monkeypatch.setattr(bench._selective_scan, "_launcher", lambda _: selective_scan)
    T, host_cuda.device = 70, host_cuda.device._replace(shared_bytes_per_block=227 << 10)
    inputs = bench.make((1, T, 10, 16), torch.float32, torch.device("cpu"))
    for name, call in bench.passes(inputs, type("OnTheGpu", (), {"type": "cuda"})).items():
        rule = Plan(64, 16 if name == "backward" else 32)
        wanted = call(rule)
        plans = set(bench.neighbours(rule, T, name == "backward"))
        assert {plan.threads for plan in plans} == {32, 64, 128} and len({plan.chunk for plan in plans}) > 2
        for plan in plans:
            for got, expected in zip(call(plan), wanted, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_program_for_compute_sanitizer(host_cuda, capsys):
    """benchmarks/sanitize.py, its tensors on the CPU."""
    source = (Path(__file__).parents[2] / "benchmarks" / "sanitize.py").read_text()
    names = {"__name__": "sanitize"}
    exec(source.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", ""), names)
    names["main"]()
    assert "87 calls, all results finite" in capsys.readouterr().out
