"""benchmarks/step.py at a size that takes no time: peers with the same logits, a share for every line."""

import pytest
import torch

from linrnn.models import LanguageModel
from linrnn.ops._backend import choose

pytestmark = pytest.mark.skipif(choose("auto", torch.zeros(1), ("cpu",)) != "cpu", reason="needs the compiled kernels")
pytest.importorskip("transformers")
pytest.importorskip("mambapy")


def test_rows():
    import step

    lines = step.measure("tiny", 0.02)
    rows = [line.split("|")[1:-1] for line in lines if line.count("|") == 7 and "frozen_step" in line]
    assert [cells[0].split(",")[0].strip() for cells in rows] == ["linrnn Mamba", "linrnn LRU"]
    assert all(float(cell) > 0 for cells in rows for cell in cells[2:])
    assert sum(line.startswith(("- met", "- MISSED")) for line in lines) == 4


@torch.inference_mode()
def test_other_logits_stop_the_run(monkeypatch):
    import step

    model = LanguageModel(64, d_model=32, n_layers=2, mixer="mamba", ffn=None, tie_embeddings=True, norm_eps=1e-5)
    own = model.frozen_step()
    monkeypatch.setattr(
        model, "frozen_step", lambda: lambda ids, state: (own(ids, state)[0] * 1.01, own(ids, state)[1])
    )
    with pytest.raises(SystemExit, match="transformers has other logits"):
        step.peers(model.eval())
