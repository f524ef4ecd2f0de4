"""RecurrentGemma: transformers' model with random weights against ours made of its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from linrnn.models import LanguageModel
from linrnn.models.checkpoints import load_pretrained
from linrnn.models.checkpoints.recurrent_gemma import arguments, tensors

from .oracles import check_greedy, check_modes, logits_of, low_precision_errors, saved

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
ROPE = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.4}
SETTINGS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 40,  # whose root bfloat16 rounds by 0.2 %
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 90,
    "attention_window_size": 7,
    "logits_soft_cap": 4.0,
    "rope_parameters": ROPE,
}
OTHERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "block_types": ["attention", "recurrent"],
    "num_key_value_heads": 2,
    "head_dim": 12,
    "lru_width": 48,
    "conv1d_width": 2,
    "attention_bias": True,
    "rms_norm_eps": 1e-2,
    "intermediate_size": 51,
    "tie_word_embeddings": False,
    "logits_soft_cap": 30.0,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
}
ALIKE = {"num_hidden_layers": 2, "block_types": ["attention"], "num_key_value_heads": None}
SHORT = {"num_hidden_layers": 2, "lru_width": None}  # of the pattern: no attention


def make(folder: Path, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return saved(
        transformers.RecurrentGemmaForCausalLM(transformers.RecurrentGemmaConfig(**SETTINGS | settings)), folder
    )


@pytest.mark.parametrize("settings", [{}, OTHERS, ALIKE, SHORT], ids=["as released", "others", "alike", "short"])
def test_equals_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs, ids = make(tmp_path, **settings), torch.randint(61, (3, 23))
    ours = load_pretrained(tmp_path)
    assert not ours.training and ours.tie_embeddings == theirs.config.tie_word_embeddings
    torch.testing.assert_close(ours(ids)[0], logits_of(theirs, ids), rtol=0, atol=1e-5)
    check_modes(ours, ids, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, OTHERS], ids=["as released", "others"])
def test_generates_as_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = make(tmp_path, **settings)
    check_greedy(load_pretrained(tmp_path), theirs, 61)


def test_reads_the_config_of_the_release(tmp_path: Path) -> None:
    """Its rotary fields stood at the top, beside those of the initialisation and one for what is always done."""
    make(tmp_path)
    path, ids = tmp_path / "config.json", torch.randint(61, (1, 23))
    expected = load_pretrained(tmp_path)(ids)[0]
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    old = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"]}
    path.write_text(json.dumps(config | old | {"embeddings_scale_by_sqrt_dim": True, "rope_scaling": None}))
    assert torch.equal(load_pretrained(tmp_path)(ids)[0], expected)


def test_defaults_are_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    assert arguments({}) == arguments(transformers.RecurrentGemmaConfig().to_dict())


def test_bfloat16(tmp_path: Path) -> None:
    theirs = make(tmp_path, **OTHERS)
    ours, error = low_precision_errors(theirs, tmp_path, torch.randint(61, (3, 63)), torch.bfloat16)
    assert ours <= 2 * error


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_activation", "silu", "hidden_activation: expected 'gelu_pytorch_tanh' or .*, got 'silu'"),
        ("embeddings_scale_by_sqrt_dim", False, "embeddings_scale_by_sqrt_dim: expected True"),
        ("hidden_size", 0, "hidden_size: expected an integer >= 1, got 0"),
        ("num_hidden_layers", 2.5, r"num_hidden_layers: expected an integer >= 1, got 2\.5"),
        ("num_key_value_heads", 3, "num_key_value_heads: expected a divisor of num_attention_heads = 4, got 3"),
        ("lru_width", 42, "lru_width: expected a multiple of num_attention_heads = 4, got 42"),
        ("intermediate_size", 1, "intermediate_size: expected an integer >= 2, of which half is used, got 1"),
        ("attention_bias", 1, "attention_bias: expected true or false, got 1"),
        ("attention_window_size", 0, "attention_window_size: expected an integer >= 1, got 0"),
        ("conv1d_width", "4", "conv1d_width: expected an integer >= 1, got '4'"),
        ("logits_soft_cap", 0.0, r"logits_soft_cap: expected a number > 0, got 0\.0"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps: expected a number > 0, got -1e-06"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings: expected true or false, got 'yes'"),
        ("block_types", ["recurrent", "full"], "block_types: expected a list of 'recurrent' and 'attention', got"),
        ("block_types", [], "block_types: expected a list"),
        ("block_types", [["attention"]], "block_types: expected a list"),
        ("rope_parameters", 3, "rope_parameters: expected an object, got 3"),
        ("rope_parameters", ROPE | {"rope_type": "yarn"}, "rope_type: expected 'default', all we have, got 'yarn'"),
        ("rope_parameters", ROPE | {"type": "linear"}, "type: expected 'default', all we have, got 'linear'"),
        ("rope_parameters", ROPE | {"rope_theta": 0}, "rope_theta: expected a number > 0, got 0"),
        (
            "rope_parameters",
            ROPE | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor: .* head_dim = 10 .* got 0.5",
        ),
    ],
)
def test_bad_configs(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(SETTINGS | {field: value})


def test_bad_tensors() -> None:
    config = SETTINGS | {"num_hidden_layers": 1}
    with pytest.raises(ValueError, match=r"missing: model\.layers\.0\.mlp_block\.gate_proj\.weight"):
        tensors({"model.layers.0.mlp_block.up_proj.weight": torch.zeros(45, 40)}, config)
    with pytest.raises(ValueError, match="dropout: expected a number"):
        LanguageModel(**arguments(SETTINGS | {"attention_dropout": 2.0}))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("temporal_block.q_proj.weight", (), r"one shape behind the first dimension, got .*q_proj\.weight \(\)"),
        (
            "mlp_block.gate_proj.weight",
            (3, 4),
            r"one shape behind the first dimension, got .*gate_proj\.weight \(3, 4\)",
        ),
        ("temporal_block.q_proj.bias", (3,), r"shape of .*q_proj\.bias: expected \(\d+,\), got \(3,\)"),
        ("temporal_block.v_proj.bias", (3,), r"shape of .*v_proj\.bias: expected \(\d+,\), got \(3,\)"),
        ("temporal_block.o_proj.weight", (3, 4), r"shape of .*o_proj\.weight: expected \(40, \d+\), got \(3, 4\)"),
        ("temporal_block.o_proj.bias", (3,), r"shape of .*o_proj\.bias: expected \(40,\), got \(3,\)"),
    ],
)
def test_tensors_of_wrong_shapes(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    make(tmp_path, **OTHERS)
    weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    where = next(key for key in weights if key.endswith("temporal_block.q_proj.weight")).split("temporal_block")[0]
    assert where + name in weights
    with pytest.raises(ValueError, match=message):
        tensors(weights | {where + name: torch.zeros(shape)}, config)


def test_the_other_name_of_the_window() -> None:
    window = {"sliding_window": 3}
    assert arguments(window)["mixer_kwargs"]["attention"]["window"] == 3
    assert arguments(window | {"attention_window_size": None}) == arguments({"attention_window_size": 3})
    with pytest.raises(ValueError, match=r"attention_window_size, sliding_window: expected one number, got \[3, 4\]"):
        arguments(window | {"attention_window_size": 4})


def test_the_base_model_alone(tmp_path: Path) -> None:
    theirs = make(tmp_path / "whole")
    theirs.model.save_pretrained(tmp_path / "base")
    ids = torch.randint(61, (2, 9))
    assert torch.equal(load_pretrained(tmp_path / "base")(ids)[0], load_pretrained(tmp_path / "whole")(ids)[0])
