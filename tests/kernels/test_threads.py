"""How many CPUs a process may use: its affinity, and the quotas of control groups in both versions."""

import math
import os

import pytest

from linrnn.kernels.cpu import threads


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    (
        ("0::/\n", {}, math.inf),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/seen/from/outside\n", {"cpu.max": "100000 50000\n"}, 2),
        (
            "4:memory:/a\n3:cpu,cpuacct:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("what is this?\n", {"cpu.max": "of another form"}, math.inf),
    ),
)
def test_quota(groups, files, expected, tmp_path):
    (tmp_path / "groups").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert threads.quota(tmp_path / "groups", tmp_path / "root") == expected
    assert threads.quota(tmp_path / "missing", tmp_path / "root") == math.inf


@pytest.mark.parametrize(("quota", "expected"), ((math.inf, 3), (2.9, 2), (0.5, 1)))
def test_usable_cpus(quota, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 7}, raising=False)
    monkeypatch.setattr(threads, "quota", lambda: quota)
    assert threads.usable_cpus.__wrapped__() == expected
