"""benchmarks/attention.py at a size that takes no time: its rows, their ratios, blocks of equal weights."""

import pytest
import torch


@pytest.fixture
def attention():
    import attention

    return attention


@pytest.mark.parametrize("bidirectional", [False, True])
def test_rows(attention, bidirectional, monkeypatch):
    monkeypatch.setattr(attention.common, "best_times", lambda runs, *_, **__: {n: 1 + i for i, n in enumerate(runs)})
    lines = attention.measure(8, 16, bidirectional, torch.device("cpu"), 0.0)
    rows = {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in lines[4:-1])}
    assert rows[attention.BASELINE][1:] == ["1.00", "1.0 (1.00)", "1.0 (1.00)"]
    assert rows["two GAU"][2:] == ["3.0 (3.00)", "3.0 (3.00)"]
    assert ("Nyström + gated network" in rows) == bidirectional


@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks(attention, bidirectional):
    """Every one of them runs both ways, and all but attention alone have about 12 D² weights."""
    x = torch.randn(1, 5, 512)
    for name, block in attention.blocks(512, bidirectional).items():
        forward, both = attention.calls(block, x)
        assert forward().shape == x.shape
        assert sum(gradient is None for gradient in both()) == 0 or name.startswith("- ")
        weights = sum(p.numel() for p in block.parameters()) / 512**2
        assert 11.9 < weights < 12.8 or name == "attention alone"
