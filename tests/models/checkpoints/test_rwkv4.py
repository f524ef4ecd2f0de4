"""RWKV-4: transformers' model with random weights against ours made of its folder."""

from pathlib import Path
from typing import Any

import pytest
import torch

from linrnn.models.checkpoints import load_pretrained
from linrnn.models.checkpoints.rwkv4 import arguments

from .oracles import check_greedy, check_modes, logits_of, low_precision_errors, saved

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
SETTINGS: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3}
WIDTHS: dict[str, Any] = {"attention_hidden_size": 48, "intermediate_size": 50, "tie_word_embeddings": True}


def make(folder: Path, embedding_gain: float = 1.0, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(**SETTINGS | settings))
    with torch.no_grad():
        model.rwkv.blocks[0].pre_ln.weight *= embedding_gain
    return saved(model, folder)


@pytest.mark.parametrize("settings", [{}, WIDTHS], ids=["as released", "widths"])
def test_equals_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs, ids = make(tmp_path, **settings), torch.randint(61, (3, 23))
    ours = load_pretrained(tmp_path)
    assert not ours.training and ours.tie_embeddings == theirs.config.tie_word_embeddings
    torch.testing.assert_close(ours(ids)[0], logits_of(theirs, ids), rtol=0, atol=1e-5)
    check_modes(ours, ids, rtol=0, atol=1e-5)


def test_generates_as_transformers(tmp_path: Path) -> None:
    theirs = make(tmp_path)
    check_greedy(load_pretrained(tmp_path), theirs, 61)


@torch.no_grad()
def test_prefill_in_pieces(tmp_path: Path) -> None:
    theirs, ids, state, cache = make(tmp_path), torch.randint(61, (1, 25)), None, None
    ours = load_pretrained(tmp_path)
    for piece in ids.split((12, 12, 1), 1):
        expected = theirs(piece, state=cache, use_cache=True)
        logits, state, cache = *ours(piece, state), expected.state
        torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 0])
def test_rescaling_changes_nothing(every: int, tmp_path: Path) -> None:
    """But for the eps of norms, which is nothing where the residual stream is large."""
    theirs, ids = make(tmp_path, rescale_every=every, embedding_gain=1e3), torch.randint(61, (2, 23))
    torch.testing.assert_close(load_pretrained(tmp_path)(ids)[0], logits_of(theirs, ids), rtol=0, atol=1e-5)


def test_defaults_are_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert arguments({}) == arguments(transformers.RwkvConfig().to_dict())


def test_bfloat16(tmp_path: Path) -> None:
    theirs = make(tmp_path)
    ours, error = low_precision_errors(theirs, tmp_path, torch.randint(61, (3, 63)), torch.bfloat16)
    assert ours <= 2 * error


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon: expected 1e-05, all we have, got 1e-06"),
        ("hidden_size", -1, "hidden_size: expected an integer >= 1, got -1"),
        ("attention_hidden_size", 0, "attention_hidden_size: expected an integer >= 1, got 0"),
        ("intermediate_size", 1.0, r"intermediate_size: expected an integer >= 1, got 1\.0"),
        ("num_hidden_layers", "3", "num_hidden_layers: expected an integer >= 1, got '3'"),
        ("tie_word_embeddings", 0, "tie_word_embeddings: expected true or false, got 0"),
        ("vocab_size", 0, "vocab_size: expected an integer >= 1, got 0"),
    ],
)
def test_bad_configs(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(SETTINGS | {field: value})


def test_the_base_model_alone(tmp_path: Path) -> None:
    theirs = make(tmp_path / "whole", tie_word_embeddings=True)
    theirs.rwkv.save_pretrained(tmp_path / "base")
    ids = torch.randint(61, (2, 9))
    assert torch.equal(load_pretrained(tmp_path / "base")(ids)[0], load_pretrained(tmp_path / "whole")(ids)[0])
