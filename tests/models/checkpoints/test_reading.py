"""Folders of checkpoints: whole, in parts, damaged, foreign, hostile; from here or from the hub."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from linrnn.models import LanguageModel, SequenceClassifier, weights
from linrnn.models.checkpoints import export_transformers, load_pretrained

V = 20
IDS = torch.arange(2 * 9).view(2, 9) % V


def make() -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(V, mixer="mamba", d_model=16, n_layers=2, ffn=None).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    export_transformers(make(), tmp_path / "mamba")
    return tmp_path / "mamba"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    export_transformers(make(), tmp_path / "shards", max_shard_bytes=5000)
    return tmp_path / "shards"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@torch.no_grad()
def test_one_file_and_several(folder: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = make()(IDS)[0]
    for source in (folder, str(folder), shards):
        model = load_pretrained(source)
        assert torch.equal(model(IDS)[0], expected) and not model.training and model.tokenizer is None
        assert all(p.requires_grad for p in model.parameters())
    assert capsys.readouterr().err == ""


def test_progress(shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(weights, "PROGRESS_BYTES", 10_000)
    load_pretrained(shards)
    lines = capsys.readouterr().err.splitlines()
    total = sum(tensor.nbytes for tensor in make().state_dict().values())
    assert 1 < len(lines) <= total / 10_000 and all("shards: 0.0 of 0.0 GB" in line for line in lines)


def test_the_file_may_go_afterwards(folder: Path) -> None:
    model = load_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(size))
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], make()(IDS)[0])


def test_a_folder_of_our_own(tmp_path: Path) -> None:
    model = LanguageModel(V, mixer=["lru", "attention"], d_model=16, n_layers=2).eval()
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert torch.equal(again(IDS)[0], model(IDS)[0]) and not again.training and again.tokenizer is None
    assert load_pretrained(tmp_path, dtype=torch.float64).embed.weight.dtype == torch.float64
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_pretrained(tmp_path).embed.weight.dtype == torch.float32
    SequenceClassifier(2, vocab_size=4, d_model=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a SequenceClassifier; load it with SequenceClassifier\.from_pre"):
        load_pretrained(tmp_path)


def test_code_beside_the_weights_is_not_run(folder: Path) -> None:
    names = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    edit(folder / "config.json", auto_map=names, trust_remote_code=True)
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(folder / 'mark')!r})\n")
    load_pretrained(folder)
    assert not (folder / "mark").exists() and "modeling" not in sys.modules


def test_a_pointer_of_git_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="got a pointer to one; fetch the file itself with `git lfs pull`"):
        load_pretrained(folder)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_pickles_are_refused(folder: Path, file: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / file).write_bytes(pickle.dumps({"weight": Payload(folder / "mark")}))
    if file == "pytorch_model.bin":
        with pytest.raises(FileNotFoundError, match=r"only pytorch_model\.bin: .*run any code.*AutoModelForCausalLM"):
            load_pretrained(folder)
    else:
        with pytest.raises(ValueError, match=r"model\.safetensors: expected a safetensors file, got a pickle"):
            load_pretrained(folder)
    assert not (folder / "mark").exists()


def test_damaged_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    for damaged in (b"", data[:5], data[:100], data[:-1], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged or not a safetensors file"):
            load_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*if it has only pytorch_model\.bin"):
        load_pretrained(folder)


def test_damaged_shards(shards: Path) -> None:
    name = "model-00002-of"
    path = next(path for path in shards.iterdir() if path.name.startswith(name))
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{name}.*: damaged or not a safetensors file"):
        load_pretrained(shards)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}.*\.safetensors is missing, a part of the weights"):
        load_pretrained(shards)
    path.write_bytes(data)
    first = next(path for path in shards.iterdir() if path.name.startswith("model-00001-of"))
    kept = load_file(first)
    save_file(kept | load_file(path), first)
    with pytest.raises(ValueError, match=r"stands in another file of this checkpoint too"):
        load_pretrained(shards)
    kept.popitem()
    save_file(kept, first)
    with pytest.raises(ValueError, match=r"index\.json: promises backbone\S+, which no file has"):
        load_pretrained(shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged or not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected an object weight_map"),
        ('{"weight_map": ["a"]}', "expected an object weight_map"),
        *(
            (json.dumps({"weight_map": {"a": name}}), "expected names of safetensors files in the same folder, got")
            for name in (
                "../secret.safetensors",
                "/etc/secret.safetensors",
                "a\\b.safetensors",
                "pytorch_model-00001-of-00002.bin",
                "..",
                ".safetensors",
                3,
            )
        ),
    ],
)
def test_a_bad_index(shards: Path, text: str, message: str) -> None:
    save_file(load_file(next(shards.glob("*.safetensors"))), shards.parent / "secret.safetensors")
    index_of(shards).write_text(text)
    with pytest.raises(ValueError, match=rf"index\.json: {message}"):
        load_pretrained(shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged or not JSON"),
        ("[" * 100_000, "damaged or not JSON"),
        ("3", "expected a JSON object, got int"),
        ("{}", "expected a model_type of 'mamba', .*'mamba2'.*, got None"),
        ('{"model_type": "llama"}', "expected a model_type of .*, got 'llama'"),
        ('{"model_type": ["mamba"]}', r"expected a model_type of .*, got \['mamba'\]"),
        ('{"model_type": "mamba", "hidden_size": -1}', "hidden_size: expected an integer >= 1, got -1"),
        ('{"model_type": "recurrent_gemma", "attention_dropout": 2.0}', "dropout: expected a number"),
        ('{"d_model": 16, "n_layer": 2, "rms_norm": false}', "rms_norm: expected True"),
        ('{"model_type": "mamba", "hidden_size": 1000000000000}', "sizes beyond any memory"),
        (
            '{"model_type": "recurrent_gemma", "num_hidden_layers": 1000000000000}',
            "num_hidden_layers: expected at most the number of tensors",
        ),
    ],
)
def test_a_bad_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_pretrained(folder)


def test_a_config_that_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json: damaged or not JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"mamba: not the folder of a checkpoint, config\.json is missing"):
        load_pretrained(folder)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    name = "backbone.layers.1.mixer.D"
    save_file(saved | {name: saved[name][:-1].clone(), "stranger": saved[name]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: stranger; shape of backbone\.blocks\.1\.mixer\.D: .*\(31,\)"):
        load_pretrained(folder)
    del saved[name]
    save_file(saved, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit LanguageModel \(missing: backbone\.blocks\.1\.mixer\.D\)"):
        load_pretrained(folder)


def test_two_tensors_of_one_name(folder: Path) -> None:
    saved = load_file(folder / "model.safetensors")
    embeddings = saved["backbone.embeddings.weight"]
    save_file({**saved, "backbone.embedding.weight": embeddings + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embeddings?\.weight: another tensor of the checkpoint is embed\.weight too"):
        load_pretrained(folder)


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_filters_over_several_channels(tmp_path: Path, mixer: str) -> None:
    model = LanguageModel(V, mixer=mixer, d_model=32, n_layers=1, ffn=None, norm_eps=1e-5)
    export_transformers(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.0.mixer.conv1d.weight"
    save_file({**saved, name: saved[name].repeat(1, 2, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"shape of backbone\.blocks\.0\.mixer\.conv\S*\.weight: .*, 2, 4\)"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_head_of_nan(folder: Path, dtype: torch.dtype) -> None:
    saved = load_file(folder / "model.safetensors")
    saved["backbone.embeddings.weight"][0, 0] = float("nan")
    edit(folder / "config.json", tie_word_embeddings=True)
    saved["lm_head.weight"] = saved["backbone.embeddings.weight"].to(dtype, copy=True)
    save_file(saved, folder / "model.safetensors")
    assert load_pretrained(folder).tie_embeddings


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(folder: Path, dtype: torch.dtype) -> None:
    saved = load_file(folder / "model.safetensors")
    name = "backbone.layers.1.mixer.in_proj.weight"
    save_file(saved | {name: saved[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{name} is {dtype}; quantised weights are not read"):
        load_pretrained(folder)
    edit(folder / "config.json", quantization_config={"bits": 8})
    with pytest.raises(ValueError, match=r"config\.json: quantization_config: quantised weights are not read"):
        load_pretrained(folder)


def test_bad_arguments(folder: Path) -> None:
    for dtype in (torch.int64, "float32"):
        with pytest.raises(ValueError, match=r"dtype: expected a floating point torch\.dtype or None"):
            load_pretrained(folder, dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="revision: a folder has none, only a repository of the hub, got 'main'"):
        load_pretrained(folder, revision="main")
    with pytest.raises(TypeError, match="source: expected a folder or a hub id, got int 3"):
        load_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(NotADirectoryError, match="expected the folder of a checkpoint, or a hub id, got a file"):
        load_pretrained(folder / "config.json")
    for source in (folder / "none", str(folder / "none"), "./none", "a/b/c", "../no such folder", "a b"):
        with pytest.raises(FileNotFoundError, match="no such folder, nor a hub id"):
            load_pretrained(source)


@pytest.fixture
def vocabulary(folder: Path) -> Path:
    """A tokenizer of words beside the weights."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["[UNK]", "to", "be", "or", "not"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_the_tokenizer(vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    model = load_pretrained(vocabulary)
    assert model.tokenizer("to be or not to be").input_ids == [1, 2, 3, 4, 1, 2]
    export_transformers(model, tmp_path / "again")
    again = load_pretrained(tmp_path / "again")
    assert again.tokenizer("not to be").input_ids == [4, 1, 2]
    model.save_pretrained(tmp_path / "own")
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", pytest.fail)  # of a config it does not know
    assert load_pretrained(tmp_path / "own").tokenizer("not to be").input_ids == [4, 1, 2]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # transformers is not installed
    assert load_pretrained(vocabulary).tokenizer is None


def test_a_tokenizer_that_cannot_be_loaded(vocabulary: Path) -> None:
    pytest.importorskip("transformers")
    (vocabulary / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match="the tokenizer cannot be loaded"):
        model = load_pretrained(vocabulary)
    assert model.tokenizer is None and torch.equal(model(IDS)[0], make()(IDS)[0])


def test_a_tokenizer_with_code_is_not_run(vocabulary: Path) -> None:
    pytest.importorskip("transformers")
    (vocabulary / "tokenizer.json").rename(vocabulary / "vocab.json")
    config = {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["strange.Strange", None]}}
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(config))
    (vocabulary / "strange.py").write_text(f"import os\nos.mkdir({str(vocabulary / 'mark')!r})\nclass Strange: ...\n")
    with pytest.warns(UserWarning, match="the tokenizer cannot be loaded"):
        assert load_pretrained(vocabulary).tokenizer is None
    assert not (vocabulary / "mark").exists()


@pytest.fixture
def hub(shards: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, list[str]]]:
    """What is asked of the hub, which has the folder `shards`."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot_download(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((source, revision, allow_patterns))
        return str(shards)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_the_hub(hub: list[tuple[str, str | None, list[str]]], shards: Path) -> None:
    model = load_pretrained("nobody/mamba", revision="v2")
    assert torch.equal(model(IDS)[0], make()(IDS)[0])
    (first, revision, small), (second, commit, weights) = hub
    assert first == second == "nobody/mamba" and revision == "v2" and commit == shards.name
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} < set(small)
    assert weights == sorted(path.name for path in shards.glob("*.safetensors"))
    assert not any("*" in name or name.endswith((".bin", ".py", ".pt")) for name in small)
    edit(shards / "config.json", model_type="llama")
    with pytest.raises(ValueError, match="got 'llama'"):
        load_pretrained("nobody/mamba")
    assert len(hub) == 3  # its weights are not downloaded


def test_the_hub_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    errors = huggingface_hub.errors
    for error, expected, message in (
        (errors.LocalEntryNotFoundError("offline"), ConnectionError, r"hub cannot be reached.*\(offline\)"),
        (errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError), FileNotFoundError, "hf auth login"),
        (errors.GatedRepoError.__new__(errors.GatedRepoError), FileNotFoundError, "private or gated"),
        (errors.RevisionNotFoundError.__new__(errors.RevisionNotFoundError), FileNotFoundError, "at revision 'v9'"),
        (errors.HfHubHTTPError.__new__(errors.HfHubHTTPError), ConnectionError, "broke off, run again to go on"),
        (type("ReadError", (Exception,), {"__module__": "httpx"})("gone"), ConnectionError, r"broke off.*\(gone\)"),
        (RecursionError("a bug"), RecursionError, "a bug"),
    ):

        def refuse(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
        with pytest.raises(expected, match=message):
            load_pretrained("nobody/mamba", revision="v9")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"nobody/mamba: no folder .* pip install 'linrnn\[hf\]'"):
        load_pretrained("nobody/mamba")
