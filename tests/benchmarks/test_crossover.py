"""The crossovers that benchmarks/crossover.py reads off its measurements, and what it writes of them."""

import pytest
import torch


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({16: 0.5, 64: 2.0}, 32.0),  # log-log: halfway
        ({16: 0.5, 64: 0.9}, None),
        ({16: 1.5, 64: 2.0}, 16.0),  # from the first length on
        ({16: 2.0, 64: 0.5, 256: 2.0}, 128.0),  # for good, not for a while
        ({16: 2.0, 64: 0.5}, None),
    ],
)
def test_from_which_length_on_it_takes_longer(ratios, expected):
    from crossover import measured_crossover

    got = measured_crossover({T: 3 * ratio for T, ratio in ratios.items()}, dict.fromkeys(ratios, 3.0) | {1024: 1.0})
    assert got == (None if expected is None else pytest.approx(expected))


def test_measures_and_writes(tmp_path, capsys):
    from crossover import ATTENTION, KINDS, measure, modules, report, save_plot

    found = modules(64)
    times = measure(found, [8, 32], 64, torch.device("cpu"), seconds=0.0, most=1e-9)
    for kind in KINDS:
        assert all(ms.keys() == {8} for ms in times[kind].values())  # each took longer than a nanosecond: left out
    for of_layer in (of_layer for kind in KINDS for of_layer in times[kind].values()):
        of_layer[32] = 4 * of_layer[8]
    lines = report(found, times, 64)
    (row,) = (line for line in lines if line.startswith("| feed-forward |"))
    assert row.split(" | ")[1] == "129"  # 2 D + 1
    assert f"| T | {ATTENTION} | lru | linear_attention | feed-forward |" in lines
    save_plot(found, times, 64, tmp_path / "plots" / "crossover.png")
    assert (tmp_path / "plots" / "crossover.png").read_bytes().startswith(b"\x89PNG")
