"""Mamba, FalconMamba and Mamba-2 of transformers, tiny and random, in our layers: same logits, same continuations."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linrnn.models.checkpoints import load_pretrained, mamba, mamba2, original
from linrnn.models.language import LanguageModel

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own

V, T = 97, 37
MAMBA = {"hidden_size": 32, "state_size": 5, "num_hidden_layers": 3}
MAMBA2 = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 6, "num_hidden_layers": 3, "chunk_size": 8}
# name: (transformers' class, its config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", MAMBA),
    "mamba, options": (
        "Mamba",
        {**MAMBA, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "conv_kernel": 3, "expand": 3}
        | {"layer_norm_epsilon": 0.1, "tie_word_embeddings": False, "hidden_act": "swish"},
    ),
    "falcon_mamba": ("FalconMamba", {**MAMBA, "tie_word_embeddings": False}),
    "falcon_mamba, options": ("FalconMamba", {**MAMBA, "mixer_rms_eps": 0.1}),
    "mamba2": ("Mamba2", {**MAMBA2, "n_groups": 1}),
    "mamba2, options": (
        "Mamba2",
        {**MAMBA2, "n_groups": 2, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}
        | {"num_heads": 12, "layer_norm_epsilon": 0.1, "tie_word_embeddings": True},
    ),
}


def make(kind: str, **fields: Any) -> Any:
    """A model of transformers in which no parameter has a value that hides an error."""
    torch.manual_seed(1)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(vocab_size=V, **tokens, **fields)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LanguageModel]:
    kind, fields = CASES[request.param]
    oracle = make(kind, **fields)
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return oracle, load_pretrained(folder)


def ids_of(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_logits_in_every_mode(pair: tuple[Any, LanguageModel]) -> None:
    oracle, model = pair
    assert not model.training and model.tokenizer is None
    ids = ids_of(2, T)
    expected = oracle(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)

    theirs = oracle(ids[:, :20], use_cache=True)
    logits, state = model(ids[:, :20])
    torch.testing.assert_close(logits, theirs.logits, rtol=1e-5, atol=1e-5)
    for t in range(20, T):
        theirs = oracle(ids[:, t : t + 1], cache_params=theirs.cache_params, use_cache=True)
        logits, state = model.step(ids[:, t], state)
        torch.testing.assert_close(logits, theirs.logits[:, 0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_prefill_in_chunks(pair: tuple[Any, LanguageModel]) -> None:
    oracle, model = pair
    ids, state, cache = ids_of(2, T), None, None
    whole = oracle(ids).logits
    for begin, end in ((0, 12), (12, 13), (13, T)):
        logits, state = model(ids[:, begin:end], state)
        torch.testing.assert_close(logits, whole[:, begin:end], rtol=1e-5, atol=1e-5)
        if oracle.config.model_type == "mamba2":  # theirs of Mamba-1 starts the second chunk from zero
            theirs = oracle(ids[:, begin:end], cache_params=cache, use_cache=True)
            cache = theirs.cache_params
            torch.testing.assert_close(logits, theirs.logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_continuations(pair: tuple[Any, LanguageModel]) -> None:
    oracle, model = pair
    ids = ids_of(2, 9)
    expected = oracle.generate(ids, max_new_tokens=50, do_sample=False)
    assert torch.equal(model.generate(ids, 50), expected)
    assert len(expected[:, 9:].unique()) > 10


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_those_alone(pair: tuple[Any, LanguageModel], side: str) -> None:
    oracle, model = pair
    lengths = (T, 1, 20)
    ids, mask = ids_of(3, T), torch.zeros(3, T, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, T - n :] = True
    if side == "right":
        mask = mask.flip(1)
    logits, _ = model(ids, mask=mask)
    for row in range(3):
        alone = oracle(ids[row][mask[row]][None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row]], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_limit_of_time_steps(tmp_path: Path) -> None:
    # theirs forgets it in single steps: compared over whole sequences
    oracle = make("Mamba2", **MAMBA2, n_groups=2, time_step_limit=(0.02, 0.1))
    oracle.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    assert model.backbone.mixers[0].dt_limit == (0.02, 0.1)
    ids = ids_of(2, T)
    expected = oracle(ids).logits
    torch.testing.assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)
    for mixer in model.backbone.mixers:
        mixer.dt_limit = None
    assert (model(ids)[0] - expected).abs().max() > 0.1  # it matters


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["mamba", "mamba2"])
def test_half_precision(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    kind, fields = CASES[case]
    oracle = make(kind, **fields).to(dtype)
    oracle.save_pretrained(tmp_path)
    ids = ids_of(2, T)
    wide, half = load_pretrained(tmp_path), load_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in wide.parameters()} == {torch.float32} and {p.dtype for p in half.parameters()} == {dtype}
    expected = oracle.float()(ids).logits
    torch.testing.assert_close(wide(ids)[0], expected, rtol=1e-5, atol=1e-5)
    error = (half(ids)[0].float() - expected).abs().max()
    assert error < 64 * torch.finfo(dtype).eps * expected.abs().max()
    state = half(ids[:, :20])[1]
    assert {leaf.dtype for layer in state for leaf in layer} == {torch.float32}
    assert half.step(ids[:, 20], state)[0].dtype == dtype
    assert load_pretrained(tmp_path, dtype=torch.float64)(ids)[0].dtype == torch.float64


@torch.no_grad()
def test_float64_stays(tmp_path: Path) -> None:
    oracle = make("Mamba", **MAMBA).double()
    oracle.save_pretrained(tmp_path)
    model = load_pretrained(tmp_path)
    ids = ids_of(2, T)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    # theirs computes norms and logits in float32 all the same
    torch.testing.assert_close(model(ids)[0].float(), oracle(ids).logits, rtol=1e-5, atol=1e-5)


ORIGINAL = {
    "mamba": {"d_model": 32, "n_layer": 3, "vocab_size": V, "ssm_cfg": {"d_state": 5, "dt_rank": "auto"}},
    "mamba2": {
        "d_model": 32, "n_layer": 3, "vocab_size": V, "tie_embeddings": False, "d_intermediate": 0,
        "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "chunk_size": 64},
    },
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", ORIGINAL)
def test_the_format_of_mamba_ssm(tmp_path: Path, case: str) -> None:
    kind, fields = CASES[case]
    oracle = make(kind, **fields)
    oracle.resize_token_embeddings(104)  # it pads the vocabulary to a multiple of 8
    oracle.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    saved = {name.replace("embeddings", "embedding"): tensor for name, tensor in saved.items()}
    saved.setdefault("lm_head.weight", saved["backbone.embedding.weight"].clone())
    save_file(saved, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**ORIGINAL[case], "rms_norm": True, "fused_add_norm": True}))
    model = load_pretrained(tmp_path)
    assert model.vocab_size == 104 and model.tie_embeddings == (case == "mamba")
    ids = ids_of(2, T)
    torch.testing.assert_close(model(ids)[0], oracle(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_backbone_alone(tmp_path: Path) -> None:
    oracle = make("Mamba", **MAMBA)
    oracle.backbone.save_pretrained(tmp_path)
    ids = ids_of(2, T)
    torch.testing.assert_close(load_pretrained(tmp_path)(ids)[0], oracle(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_head_that_is_said_to_be_tied_and_is_not(tmp_path: Path) -> None:
    oracle = make("Mamba", **MAMBA, tie_word_embeddings=False)
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="tie_word_embeddings is true, yet lm_head differs"):
        model = load_pretrained(tmp_path)
    ids = ids_of(2, T)
    torch.testing.assert_close(model(ids)[0], oracle(ids).logits, rtol=1e-5, atol=1e-5)


def test_defaults_are_those_of_transformers() -> None:
    for kind, module in (("Mamba", mamba), ("FalconMamba", mamba), ("Mamba2", mamba2)):
        config = json.loads(getattr(transformers, f"{kind}Config")().to_json_string(use_diff=False))
        config = {name: value for name, value in config.items() if name != "time_step_limit"}
        absent = {"model_type": config["model_type"]}
        rank = {"dt_rank": config["time_step_rank"]} if kind != "Mamba2" else {}
        expected = module.arguments(absent)
        assert module.arguments(config) == {**expected, "mixer_kwargs": expected["mixer_kwargs"] | rank}
        nulls = {name: None for name in config} | absent
        assert module.arguments(nulls) == expected


def test_leftovers_in_official_configs() -> None:
    # of the conversion from mamba_ssm, and of older versions of transformers
    leftovers = {
        "d_inner": 1536,
        "d_model": 768,
        "n_layer": 24,
        "ssm_cfg": {},
        "fused_add_norm": True,
        "rms_norm": True,
    }
    config = {"model_type": "mamba", "hidden_size": 768, "intermediate_size": 1536, "time_step_rank": 48, **leftovers}
    assert not original.is_original(config)
    assert mamba.arguments(config)["mixer_kwargs"] == mamba.arguments({})["mixer_kwargs"] | {"dt_rank": 48}
    falcon = {"model_type": "falcon_mamba", "hidden_size": 4096, "expand": 16, "intermediate_size": 8192}
    assert mamba.arguments(falcon)["mixer_kwargs"]["expand"] == 2
    codestral = {"norm_before_gate": True, "rms_norm": True, "time_step_limit": [0.0, float("inf")]}
    assert mamba2.arguments(codestral) == mamba2.arguments({})


@pytest.mark.parametrize(
    ("module", "field", "value", "message"),
    [
        (mamba, "hidden_act", "gelu", "hidden_act: expected 'silu' or 'swish', all we have, got 'gelu'"),
        (mamba, "hidden_size", 0, "hidden_size: expected an integer >= 1, got 0"),
        (mamba, "expand", 1.51, "intermediate_size: expected a multiple of hidden_size = 768, got 1159"),
        (mamba, "intermediate_size", "big", "intermediate_size: expected an integer >= 1, got 'big'"),
        (mamba, "time_step_rank", "some", "time_step_rank: expected an integer >= 1, got 'some'"),
        (mamba, "use_bias", "no", "use_bias: expected true or false, got 'no'"),
        (mamba, "residual_in_fp32", 1, "residual_in_fp32: expected true or false, got 1"),
        (mamba, "layer_norm_epsilon", "1e-5", "layer_norm_epsilon: expected a finite number, got '1e-5'"),
        (mamba, "intermediate_size", 100, "intermediate_size: expected a multiple of hidden_size = 768, got 100"),
        (mamba2, "hidden_act", "relu", "hidden_act: expected 'silu'"),
        (mamba2, "num_heads", 3, r"num_heads, head_dim: expected a product of .* = 8192, got 3 \* 64 = 192"),
        (mamba2, "time_step_limit", [0.1, 0.01], "time_step_limit: .*expected None or numbers 0 <= lower <= upper"),
        (mamba2, "state_size", 1.5, "state_size: expected an integer >= 1, got 1.5"),
    ],
)
def test_fields_that_cannot_be_honoured(module: Any, field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.arguments({field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rms_norm": False}, "rms_norm: expected True, all we have, got False"),
        ({"d_intermediate": 64}, "d_intermediate: expected 0"),
        ({"attn_layer_idx": [3]}, r"attn_layer_idx: expected \[\]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "ssm_cfg.layer: expected 'Mamba1' or 'Mamba2', got 'Mamba3'"),
        ({"ssm_cfg": {"headdim": 8}}, r"ssm_cfg: expected some of .*d_state.*, got \['headdim'\]"),
        ({"ssm_cfg": 3}, "ssm_cfg: expected an object, got 3"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim: expected False"),
    ],
)
def test_what_of_mamba_ssm_has_no_equivalent(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        original.to_transformers({"d_model": 32, "n_layer": 1, **fields})


@pytest.mark.parametrize("module", [mamba, mamba2])
@pytest.mark.parametrize("field", [{"time_step_min": 0.2}, {"time_step_max": -1.0}, {"time_step_min": "small"}])
def test_how_steps_start_is_passed_over(module: Any, field: dict[str, Any]) -> None:
    assert module.arguments(field) == module.arguments({})
