"""A captured step: the same tokens as the model's own steps, and a state that is copied in when it is another one."""

from typing import Any
from unittest import mock

import pytest
import torch

from linrnn.decode import graph
from linrnn.decode import state as states
from linrnn.models import LanguageModel
from linrnn.ops import FallbackWarning

V = 13
KINDS: list[dict[str, Any]] = [
    {"mixer": "lru"},
    {"mixer": "mamba", "ffn": None},
    {"mixer": ("gated_deltanet", "attention"), "mixer_kwargs": {"attention": {"window": 5}}},
    {"mixer": "rwkv4", "ffn": "channel_mix"},
]


def follows_the_model(model: LanguageModel, device: str, tolerance: float) -> None:
    model = model.eval().to(device)
    ids = torch.randint(V, (3, 20), device=device)
    with torch.inference_mode():
        expected, _ = model(ids)
        step = graph.GraphedStep(model, 3)
        _, prefilled = model(ids[:, :6])
        kept = states.clone(prefilled)
        for _ in range(2):  # from the same state again: it was copied in, not written to
            state = prefilled
            for t in range(6, 20):
                logits, state = step(ids[:, t], state)
                torch.testing.assert_close(logits, expected[:, t], rtol=tolerance, atol=tolerance)
        for a, b in zip(states.leaves(prefilled), states.leaves(kept), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_are_the_models(kind: dict[str, Any], uncaptured: None) -> None:
    follows_the_model(LanguageModel(V, d_model=16, **kind).double(), "cpu", 1e-9)


def test_a_graph_is_captured_for_what_lasts(uncaptured: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "PATIENCE", 3)
    model = LanguageModel(V, d_model=16, mixer="lru").double()
    step, used = graph.GraphedSteps(model), []
    for B in (5, 5, 5, 5, 4, 3, 4, 2, 1, 3, 12):
        step(torch.zeros(B, dtype=torch.int64), model.init_state(B))
        used.append(0 if step._last is None else step._last.batch_size)
    assert used == [0, 0, 0, 8, 8, 8, 8, 8, 8, 4, 0] and list(step._graphs) == [8, 4]


def follows_a_changing_batch(model: LanguageModel, device: str, tolerance: float) -> None:
    """Rows leave and come back, so that graphs of several sizes hand their states to each other."""
    model = model.eval().to(device)
    ids = torch.randint(V, (5, 12), device=device)
    with torch.inference_mode():
        expected, _ = model(ids)
        step, rows = graph.GraphedSteps(model), [0, 1, 2, 3, 4]
        state = model.init_state(5)
        for t in range(12):
            if t in (3, 7, 8):
                state, rows = states.select(state, [0, 2][: len(rows)]), [rows[0], rows[2]][: len(rows)]
            logits, state = step(ids[rows, t], state)
            torch.testing.assert_close(logits, expected[rows, t], rtol=tolerance, atol=tolerance)
            if len(rows) == 2 and t < 8:  # a third row comes back, as it was
                extra = model(ids[4:, : t + 1])[1]
                state, rows = states.concatenate([state, extra]), [*rows, 4]


@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_a_changing_batch(kind: dict[str, Any], uncaptured: None) -> None:
    follows_a_changing_batch(LanguageModel(V, d_model=16, **kind).double(), "cpu", 1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS[:3], ids=str)
def test_a_changing_batch_on_a_gpu(kind: dict[str, Any]) -> None:
    follows_a_changing_batch(LanguageModel(V, d_model=64, **kind), "cuda", 2e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_steps_are_the_models_on_a_gpu(kind: dict[str, Any]) -> None:
    follows_the_model(LanguageModel(V, d_model=64, **kind), "cuda", 2e-4)


def test_what_is_refused(uncaptured: None) -> None:
    with pytest.raises(ValueError, match="its state grows with every token"):
        graph.GraphedStep(LanguageModel(V, mixer="attention"), 2)
    step = graph.GraphedStep(LanguageModel(V, mixer="lru"), 2)
    with pytest.raises(ValueError, match=r"ids_t: expected shape \(1 to 2,\), got \(3,\)"):
        step(torch.zeros(3, dtype=torch.int64), LanguageModel(V, mixer="lru").init_state(3))
    with pytest.raises(ValueError, match="state: expected shapes"):
        step(torch.zeros(2, dtype=torch.int64), LanguageModel(V, mixer="lru").init_state(3))


def test_a_capture_leaves_others_alone() -> None:
    """On the model's device, whichever is the current one; and other threads may allocate."""
    with pytest.MonkeyPatch.context() as patch:
        cuda = mock.MagicMock()
        patch.setattr(torch, "cuda", cuda)
        run = mock.Mock(side_effect=lambda: cuda.device.return_value.__exit__.assert_not_called())
        graph.capture(run, torch.device("cuda:1"))
    cuda.device.assert_called_once_with(torch.device("cuda:1"))
    assert cuda.graph.call_args.kwargs == {"stream": cuda.Stream.return_value, "capture_error_mode": "thread_local"}
    assert run.call_count == graph.WARM_UPS + 1


def test_no_gpu_is_named() -> None:
    with pytest.raises(ValueError, match="CUDA graphs need a model on an NVIDIA GPU, this one is on cpu"):
        graph.GraphedStep(LanguageModel(V, mixer="lru"), 2)


def test_a_step_taken_back(uncaptured: None) -> None:
    model = LanguageModel(V, d_model=16, mixer="mamba", ffn=None).double()
    ids = torch.randint(V, (2, 4))
    with torch.inference_mode():
        expected, _ = model(ids)
        step, state = graph.GraphedStep(model, 2), model.init_state(2)
        for t in range(4):
            _, state = step((ids[:, t] + 1) % V, state)
            step.undo()
            logits, state = step(ids[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-9, atol=1e-9)


def test_a_step_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "PATIENCE", 0)
    model = LanguageModel(V, d_model=16, mixer="lru").double()
    step, ids = graph.GraphedSteps(model), torch.randint(V, (2, 3))
    with torch.inference_mode():
        with pytest.warns(FallbackWarning, match="cannot be captured in a CUDA graph .operation not permitted"):
            _, state = step(ids[:, 0], model.init_state(2))
        _, state = step(ids[:, 1], state)  # without another warning
        step.undo()
        torch.testing.assert_close(step(ids[:, 2], state)[0], model(ids)[0][:, 2], rtol=1e-9, atol=1e-9)
