"""The language model keeps the contract of a layer, begins as no worse than a guess, and names wrong inputs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from linrnn.decode import state as state_ops
from linrnn.models import LanguageModel

V = 11
MIXERS = ["lru", "attention", ("mamba2", "attention")]


KINDS: dict[str, dict[str, Any]] = {
    **{str(mixer): {"mixer": mixer} for mixer in MIXERS},
    "tied": {"mixer": ("lru", "attention"), "tie_embeddings": True},
    "Mamba": {"mixer": "mamba", "ffn": None, "norm_eps": 1e-5},
    "RWKV-4": {"mixer": "rwkv4", "ffn": "channel_mix", "norm": "layer", "embed_norm": True},
    "Griffin": {
        **{"mixer": ("griffin", "griffin", "attention"), "n_layers": 3, "mixer_kwargs": {"attention": {"window": 4}}},
        **{"ffn": "geglu", "ffn_kwargs": {"bias": True, "d_hidden": 20}, "embed_scale": 4.0, "logit_soft_cap": 3.0},
    },
    "postnorm": {"mixer": "lru", "prenorm": False, "ffn": "channel_mix"},
}


def make(**kwargs: Any) -> LanguageModel:
    return LanguageModel(V, **({"d_model": 16} | kwargs)).double()


@pytest.mark.parametrize("kind", KINDS)
def test_whole_equals_pieces_and_steps(kind: str) -> None:
    model = make(**KINDS[kind])
    ids = torch.randint(V, (2, 9))
    logits, _ = model(ids)
    assert logits.shape == (2, 9, V)
    first, state = model(ids[:, :4], model.init_state(2))
    rest = []
    for t in range(4, 9):
        logits_t, state = model.step(ids[:, t], state)
        rest.append(logits_t)
    torch.testing.assert_close(torch.cat((first, torch.stack(rest, 1)), 1), logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.read_out(model.features(ids)[0]), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_step_is_step(kind: str) -> None:
    model = make(**KINDS[kind]).eval()
    ids = torch.randint(V, (3, 9))
    with torch.inference_mode():
        expected, _ = model(ids)
        step, state = model.frozen_step(), model(ids[:, :4])[1]
        for t in range(4, 9):
            logits, state = step(ids[:, t], state)
            torch.testing.assert_close(logits, expected[:, t], rtol=1e-9, atol=1e-9)
        assert state_ops.nbytes(state) == state_ops.nbytes(model(ids)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_and_padding(kind: str) -> None:
    model = make(**KINDS[kind])
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
        ({"mixer": "gru"}, "mixer: no layer is called 'gru'"),
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


def test_embeddings_and_logits() -> None:
    ids = torch.randint(V, (2, 5))
    plain = make(mixer="lru")
    other = make(mixer="lru", embed_scale=4.0, logit_soft_cap=0.5)
    other.load_state_dict(plain.state_dict())
    with torch.no_grad():
        plain.embed.weight *= 4
        torch.testing.assert_close(other(ids)[0], 0.5 * torch.tanh(plain(ids)[0] / 0.5))
    assert other(ids)[0].abs().max() < 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixer": ["lru", "nope"]}, "mixer: no layer is called 'nope', expected one of aaren, "),
        ({"ffn": "mlp"}, "ffn: expected one of 'swiglu', 'geglu', 'channel_mix', None, got 'mlp'"),
        (
            {"ffn_kwargs": {"biass": True}},
            r"ffn_kwargs: biass unknown to 'swiglu', expected some of \['bias', 'd_hidden'",
        ),
        ({"ffn": None, "ffn_kwargs": {"bias": True}}, "ffn_kwargs: bias unknown to None"),
        ({"ffn": "channel_mix", "ffn_expand": 0}, "ffn_expand: expected a number > 0"),
        ({"ffn_kwargs": {"d_hidden": 0}}, "d_hidden: expected an integer >= 1"),
        ({"norm_eps": 0.0}, "norm_eps: expected a finite number > 0 or None, got 0.0"),
        ({"embed_scale": 0.0}, "embed_scale: expected a finite number > 0"),
        ({"logit_soft_cap": math.inf}, "logit_soft_cap: expected a finite number > 0"),
    ],
)
def test_options_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (lambda m: m.init_state(3), ValueError, r"state\[0\]: state.x: expected shape \(2, 16\), got \(3, 16\)"),
        (lambda m: m.init_state(2)[:1], TypeError, "state: expected a tuple of 2 block states or None, got 1 of them"),
        (lambda m: make(mixer="lru").init_state(2), TypeError, r"state\[0\]: state: expected BlockState, got LRUState"),
        (lambda m: make(mixer="lru", ffn="channel_mix").init_state(2), TypeError, "expected RWKV4State or None"),
        (lambda m: "state", TypeError, "state: expected a tuple of 2 block states or None, got str"),
    ],
)
def test_foreign_states_are_refused(state: Any, error: type[Exception], message: str) -> None:
    model = make(mixer="rwkv4", ffn="channel_mix")
    with pytest.raises(error, match=message):
        model(torch.randint(V, (2, 5)), state(model))
