"""The language model keeps the contract of a layer, begins as no worse than a guess, and names wrong inputs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from linrnn.models import LanguageModel

V = 11
MIXERS = ["lru", "attention", ("mamba2", "attention")]


def make(**kwargs: Any) -> LanguageModel:
    return LanguageModel(V, **({"d_model": 16} | kwargs)).double()


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_whole_equals_pieces_and_steps(mixer: Any, tie_embeddings: bool) -> None:
    model = make(mixer=mixer, tie_embeddings=tie_embeddings)
    ids = torch.randint(V, (2, 9))
    logits, _ = model(ids)
    assert logits.shape == (2, 9, V)
    first, state = model(ids[:, :4], model.init_state(2))
    rest = []
    for t in range(4, 9):
        logits_t, state = model.step(ids[:, t], state)
        rest.append(logits_t)
    torch.testing.assert_close(torch.cat((first, torch.stack(rest, 1)), 1), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.head(model.features(ids)[0]), logits)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_documents_and_padding(mixer: Any) -> None:
    model = make(mixer=mixer)
    ids = torch.randint(V, (1, 9))
    reset, mask = torch.zeros(1, 9, dtype=torch.bool), torch.ones(1, 9, dtype=torch.bool)
    reset[:, 5], mask[:, 2] = True, False
    expected = torch.cat([model(part)[0] for part in ids[mask][None].split([4, 4], 1)], 1)
    ids[~mask] = -100  # what stands at padded places is not even looked at
    torch.testing.assert_close(model(ids, reset=reset, mask=mask)[0][mask][None], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tie_embeddings", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_begins_as_a_guess(tie_embeddings: bool, prenorm: bool, norm: str) -> None:
    model = LanguageModel(
        500, mixer="attention", d_model=64, tie_embeddings=tie_embeddings, prenorm=prenorm, norm=norm, n_layers=1
    )
    assert (model.head.weight is model.embed.weight) == tie_embeddings
    ids = torch.randint(500, (4, 64))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[:, 1:].flatten())
    assert loss < math.log(500) + 1


def test_learns_a_cycle() -> None:
    model = LanguageModel(4, d_model=16, tie_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.arange(33).remainder(4)[None]
    for _ in range(60):
        loss = F.cross_entropy(model(ids[:, :-1])[0].flatten(0, 1), ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_state_size() -> None:
    assert make(mixer="lru").state_size == 2 * 2 * 16
    assert make(mixer="attention").state_size is None


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_saved_and_loaded(tmp_path: Path, tie_embeddings: bool) -> None:
    model, ids = make(tie_embeddings=tie_embeddings, mixer=("lru", "attention")), torch.randint(V, (2, 9))
    model.save_pretrained(tmp_path)
    again = LanguageModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids)[0], model(ids)[0], rtol=1e-12, atol=1e-12)
    assert (again.head.weight is again.embed.weight) == tie_embeddings


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: expected an integer >= 1, got 0"),
        ({"mixer": "gru"}, "name: no layer is called 'gru'"),
        ({"mixer": "attention", "mixer_kwargs": {"causal": False}}, "mixer_kwargs: .* expected causal mixers"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(**({"vocab_size": V, "d_model": 16} | kwargs))


def test_bad_inputs() -> None:
    model, ids = make(), torch.randint(V, (2, 5))
    with pytest.raises(TypeError, match="ids: expected a tensor, got list"):
        model([[1]])
    with pytest.raises(ValueError, match=r"ids: expected integer token ids, got torch\.float32"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"ids: expected token ids of shape \(batch, time\), got \(5,\)"):
        model(ids[0])
    for wrong in (-1, V):
        with pytest.raises(ValueError, match=f"ids: expected ids from 0 to {V - 1}, got {wrong}"):
            model(ids.index_fill(1, torch.tensor([2]), wrong))
    with pytest.raises(ValueError, match=r"mask: expected a bool tensor of shape \(2, 5\), got torch\.int64"):
        model(ids, mask=ids)
    with pytest.raises(ValueError, match=r"ids_t: expected a tensor of shape \(batch,\), got torch\.int64 \(2, 5\)"):
        model.step(ids, model.init_state(2))
