"""benchmarks/ssm.py: its rows, the check of the peers, ratios, goals and the memory of a fresh process."""

import math
import subprocess
import sys

import pytest
import torch

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("group", ["mamba", "scan", "invariant", "gated"])
def test_peers_agree_with_ours(group):
    """Those that are installed, with gradients of every source and a decoding step."""
    import ssm
    from ssm_cases import GROUPS, Size

    expected, ours = None, 0
    for case in GROUPS[group][1](Size(2, 16, 32, CPU)):
        y = ssm.without_gradients(case)()
        gradients = ssm.with_gradients(case)()
        assert y.shape[0] == 2 and len(gradients) == len(case.sources)
        assert all(g is not None and g.isfinite().all() for g in gradients), case.name
        if case.step is not None:
            with torch.inference_mode():
                case.step(), case.step()
        if case.peer:
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        else:
            expected, ours = y, ours + 1
    assert ours >= 1


def test_peers_that_are_wrong_or_fail_are_named_and_not_timed(monkeypatch, capsys):
    import ssm
    from ssm_cases import Case, Size, collect

    x = torch.randn(2, 5, 3, requires_grad=True)

    def fails():
        raise RuntimeError("no such device")

    rows = {
        "ours": Case("ours", (x,), lambda: 2 * x, step=lambda: None),
        "right": Case("right", (x,), lambda: x + x, peer=True),
        "slow": Case("slow", (x,), lambda: x + x, peer=True, quadratic=True),
        "wrong": Case("wrong", (x,), lambda: 2.1 * x, peer=True),
        "NaN": Case("NaN", (x,), lambda: torch.nan * x, peer=True),
        "broken": Case("broken", (x,), fails, peer=True),
    }

    def make(size, only=None):
        return collect(*((name, lambda name=name: rows[name]) for name in rows), ("absent", fails), only=only)

    monkeypatch.setitem(ssm.GROUPS, "test", ("Title", make))
    memory = {"ours": 10.0, "right": 25.0}
    monkeypatch.setattr(ssm, "peak_memory", lambda group, case, size: memory.get(case.name, ssm.NAN))
    found = ssm.measure("test", Size(2, 5, 3, CPU), 0.001)
    assert [(row.name, row.peer) for row in found] == [("ours", False), ("right", True), ("slow", True)]
    assert all(row.forward > 0 and row.both > 0 for row in found)
    assert found[0].step > 0 and math.isnan(found[1].step)
    *_, ours, right, slow = ssm.table(found)
    assert "| 10 |" in ours and "| 25 (2.50) | - |" in right and right.startswith("| - right |") and "| - | - |" in slow
    said = capsys.readouterr()
    assert "absent left out: RuntimeError: no such device" in said.err
    for part in ("wrong left out: it and ours disagree", "NaN left out", "broken left out: RuntimeError: no such"):
        assert part in said.out


def test_goals():
    from ssm import Row, goals

    rows = [Row("mamba", False, both=10, memory=100), Row("mambapy", True, both=51, memory=400)]
    rows += [Row("transformers", True, both=49, memory=200)]
    met, smaller, missed, larger = goals("mamba", rows, CPU)
    assert met.startswith("- met") and "5.1 times as fast as mambapy" in met
    assert smaller.startswith("- met") and "0.25 of the memory" in smaller
    assert missed.startswith("- MISSED") and larger.startswith("- MISSED") and "0.50" in larger
    assert goals("mamba", rows[:1], CPU) == goals("gated", rows, CPU) == []
    states = "selective_scan, gradients from and to its states"
    rows = [Row(states, False, both=10), Row("mamba-ssm", True, both=9)]
    (line,) = goals("scan", rows, torch.device("cuda"))
    assert line.startswith("- MISSED") and "1.11 times" in line


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_what_a_call_takes_on_top(scripts):
    """In a process of its own: 64 MiB taken and freed on top of 32 that it keeps and 128 that it had before."""
    code = (
        "import common, torch; device = torch.device('cpu'); kept = []\n"
        "def mib(n): return torch.ones(n << 18)\n"
        "del_me = mib(128); del del_me; mib(1)\n"
        "def call():\n    kept.append(mib(32)); mib(64)\n"
        "print(common.peak_memory(call, device))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=scripts, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 94 < float(result.stdout) < 104


def test_runs(monkeypatch, tmp_path, capsys):
    """The table of one row, its memory from a fresh process, and the training of both stacks."""
    import common
    import ssm

    group = ssm.GROUPS["scan"][1]
    monkeypatch.setitem(ssm.GROUPS, "scan", ("Title", lambda size: group(size, only="selective_scan")))
    monkeypatch.setattr(common, "keep_memory_warm", lambda: None)
    arguments = ["--size", "1", "32", "16", "--seconds", "0.01", "--threads", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["ssm.py", "--groups", "scan", "training", *arguments])
    ssm.main()
    table = (tmp_path / "ssm_cpu_1threads.md").read_text()
    assert table.strip() in capsys.readouterr().out
    row = next(line for line in table.splitlines() if line.startswith("| selective_scan |"))
    assert " - " not in row and row.count("|") == 6
    assert "- linrnn: " in table and "tokens per second" in table
