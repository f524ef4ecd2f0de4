"""Models of ours in transformers' format: transformers computes the same with them, and they come back unchanged."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linrnn.models import LanguageModel, SequenceClassifier
from linrnn.models.checkpoints import export_transformers, load_pretrained
from linrnn.models.weights import unique_tensors

V = 50
CASES: dict[str, dict[str, Any]] = {
    "mamba": {"tie_embeddings": True},
    "mamba, options": {
        "norm_eps": 0.1,
        "mixer_kwargs": {"bias": True, "conv_bias": False, "d_state": 3, "d_conv": 3, "expand": 3, "dt_rank": 5},
    },
    "mamba, normalised": {"mixer_kwargs": {"bcdt_norm": True, "bcdt_norm_eps": 0.1}},
    "mamba2": {"norm_eps": 1e-5},
    "mamba2, options": {
        "norm_eps": 0.1,
        "tie_embeddings": True,
        "mixer_kwargs": {"bias": True, "conv_bias": False, "d_state": 3, "d_conv": 3, "expand": 3, "n_groups": 3}
        | {"d_head": 16, "norm_eps": 0.1},
    },
    "mamba2, limits": {"norm_eps": 1e-5, "mixer_kwargs": {"dt_limit": [0.01, 0.05]}},
}


class Derived(LanguageModel):
    """Could compute anything."""


def make(case: str = "mamba", **kwargs: Any) -> LanguageModel:
    torch.manual_seed(1)
    arguments = {"mixer": case.split(",")[0], "d_model": 32, "n_layers": 2, "ffn": None, **CASES[case], **kwargs}
    model = LanguageModel(V, **arguments).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize(
    ("case", "max_shard_bytes"), [*((case, 5 * 10**9) for case in CASES), ("mamba", 20_000), ("mamba2", 20_000)]
)
def test_transformers_computes_the_same(tmp_path: Path, case: str, max_shard_bytes: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = make(case)
    export_transformers(model, tmp_path / "folder", max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "folder" / "model.safetensors").is_file() == (max_shard_bytes > 20_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32 and theirs.config.eos_token_id is None
    ids = torch.randint(V, (2, 63))
    torch.testing.assert_close(model(ids)[0], theirs.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    if "limits" not in case:  # which theirs forgets in single steps
        expected = theirs.generate(ids[:, :9], max_new_tokens=50, do_sample=False)
        assert torch.equal(model.generate(ids[:, :9], 50), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_round_trip(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    model = make(case).to(dtype)
    export_transformers(model, tmp_path, max_shard_bytes=20_000)
    again = load_pretrained(tmp_path, dtype=dtype)
    for (name, p), (other_name, q) in zip(unique_tensors(model).items(), unique_tensors(again).items(), strict=True):
        assert name == other_name and p.dtype == q.dtype and torch.equal(p, q), name
    assert again.tie_embeddings == model.tie_embeddings and not again.training
    assert json.loads((tmp_path / "config.json").read_text())["residual_in_fp32"] == (dtype == torch.float32)
    ids = torch.randint(V, (2, 9))
    assert torch.equal(model(ids)[0], again(ids)[0])
    export_transformers(again, tmp_path / "again")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first == second


def test_special_tokens(tmp_path: Path) -> None:
    model = make()
    export_transformers(model, tmp_path, eos_token_id=3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, 3, None]
    saved: list[str] = []
    model.tokenizer = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=None, save_pretrained=saved.append)
    export_transformers(model, tmp_path, eos_token_id=4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 4, None]
    assert saved == [str(tmp_path)]


def test_an_earlier_model_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for kwargs in ({"max_shard_bytes": 20_000}, {}, {"max_shard_bytes": 30_000}):
        model = make()
        export_transformers(model, tmp_path, **kwargs)
        assert (tmp_path / "model.safetensors").exists() == (not kwargs)
        if kwargs:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            expected = {*index["weight_map"].values(), "model.safetensors.index.json"}
        else:
            expected = {"model.safetensors"}
        assert {path.name for path in tmp_path.iterdir()} == expected | {"config.json", "notes.txt"}
        assert torch.equal(load_pretrained(tmp_path).embed.weight, model.embed.weight)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mixer": "lru"}, r"mixer: transformers' Mamba models have 'mamba' or 'mamba2' alone only, got \['LRU'\]"),
        ({"mixer": ["mamba", "mamba2"]}, r"mixer: .*got \['Mamba', 'Mamba2'\]"),
        ({"ffn": "swiglu"}, "ffn: transformers' Mamba models have None only, got 'swiglu'"),
        ({"norm": "layer"}, "norm: .* have 'rms' only, got 'layer'"),
        ({"prenorm": False}, "prenorm: .* have True only, got False"),
        ({"embed_scale": 2.0}, "embed_scale: .* have None only, got 2.0"),
        ({"embed_norm": True}, "embed_norm: .* have False only, got True"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap: .* have None only, got 30.0"),
        ({"mixer": "mamba2"}, "norm_eps: .* have that of the blocks' norms, 1e-06, only, got 1e-05"),
    ],
)
def test_models_without_an_equivalent(tmp_path: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export_transformers(make(**kwargs), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_head_that_was_untied(tmp_path: Path) -> None:
    model = make(tie_embeddings=True)
    model.head.weight = torch.nn.Parameter(model.head.weight.detach() + 1)
    with pytest.raises(ValueError, match=r"tie_embeddings: .* have False, as the head is, only, got True"):
        export_transformers(model, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"eos_token_id": V}, ValueError, f"eos_token_id: expected an id from 0 to {V - 1} or None, got {V}"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id: expected an id from 0"),
        ({"eos_token_id": [0, 1]}, ValueError, r"eos_token_id: expected an id from 0 .*, got \[0, 1\]"),
        ({"eos_token_id": 1.5}, ValueError, "eos_token_id: expected an id from 0 .*, got 1.5"),
        ({"model": Derived(V, mixer="mamba", ffn=None)}, TypeError, "model: expected a LanguageModel, got Derived"),
        ({"max_shard_bytes": 0}, ValueError, "max_shard_bytes: expected an integer >= 1, got 0"),
        ({"model": SequenceClassifier(2, vocab_size=4, d_model=16)}, TypeError, "model: expected a LanguageModel, got"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        export_transformers(**{"model": make(), "folder": tmp_path, **arguments})
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_examples_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    page = Path(__file__).parents[3] / "docs" / "checkpoints.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "checkpoints.md", "exec"), namespace)
