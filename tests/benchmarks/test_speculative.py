"""benchmarks/speculative.py at a size that takes no time: its pair, its rows."""

import argparse

import pytest
import torch


@pytest.fixture
def speculative():
    import speculative

    return speculative


@pytest.mark.parametrize("mixer", ["lru", "mamba", "attention"])
def test_without_gains_the_draft_is_the_model(speculative, mixer):
    """And with them it is not: so gains decide the acceptance."""
    ids = torch.randint(256, (1, 9))
    for gain, same in ((0.0, True), (1.0, False)):
        model, draft = speculative.pair(mixer, 16, 3, 1, gain)
        assert len(draft.backbone.blocks) == 1 and len(model.backbone.blocks) == 3
        assert torch.allclose(model(ids)[0], draft(ids)[0], atol=1e-4) == same


def test_rows(speculative, monkeypatch):
    monkeypatch.setattr(speculative, "GAINS", (1.0, 0.0))
    monkeypatch.setattr(speculative, "GUESSES", (2,))
    args = argparse.Namespace(d_model=16, layers=2, kept=1, tokens=9, calls=1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in speculative.table("lru", args)[2:]]
    assert [row[1] for row in rows] == ["2", "", "2", ""]
    assert rows[2][:4] == ["100%", "2", "3.00", "0.00"] and float(rows[0][2]) < 3
    lines = speculative.roll_back("lru", args)[2:]
    assert len(lines) == len(speculative.TAILS)
    assert speculative._speculation.LONGEST_TAIL == 16
