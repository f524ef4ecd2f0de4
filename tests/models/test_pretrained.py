"""Checkpoint folders: what is saved comes back, and what does not fit is named."""

import copy
import json
import os
import pickle
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linrnn.models import Pretrained, SequenceClassifier
from linrnn.models.pretrained import CONFIG, INDEX, WEIGHTS


def make(**kwargs: Any) -> SequenceClassifier:
    return SequenceClassifier(3, **({"vocab_size": 7, "d_model": 16, "mixer": "lru", "n_layers": 1} | kwargs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    kwargs = {"mixer": ("lru", "attention"), "n_layers": 2, "pooling": "cls", "mixer_kwargs": {"lru": {"d_state": 8}}}
    model = make(**kwargs).to(dtype)
    model.save_pretrained(tmp_path / "deep" / "folder")
    again = SequenceClassifier.from_pretrained(tmp_path / "deep" / "folder")
    assert sorted(p.name for p in (tmp_path / "deep" / "folder").iterdir()) == [CONFIG, WEIGHTS]
    for (name, p), (other_name, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other_name and p.dtype == q.dtype and torch.equal(p, q) and q.requires_grad
    x = torch.randint(7, (2, 9))
    assert torch.equal(model(x), again(x))


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_files_are_for_all_that_the_umask_lets(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "other").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_saving_again_replaces(tmp_path: Path) -> None:
    make(d_model=32).save_pretrained(tmp_path)
    model = make()
    model.save_pretrained(tmp_path)
    x = torch.randint(7, (2, 9))
    assert torch.equal(SequenceClassifier.from_pretrained(tmp_path)(x), model(x))


class Tied(Pretrained):
    """Shares its embedding with its head, and has a buffer."""

    def __init__(self, size: int):
        super().__init__()
        self.config = self.constructor_arguments(locals())
        self.embed = nn.Embedding(size, 4)
        self.head = nn.Linear(4, size, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3]))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids)) * self.count


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    model = Tied(5)
    model.count += 2
    model.save_pretrained(tmp_path)
    assert sorted(load_file(tmp_path / WEIGHTS)) == ["count", "embed.weight"]
    again = Tied.from_pretrained(tmp_path)
    assert again.head.weight is again.embed.weight
    assert torch.equal(again(torch.arange(5)), model(torch.arange(5)))


def test_config_is_readable(tmp_path: Path) -> None:
    make(max_length=9).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["class"] == "SequenceClassifier"
    assert config["arguments"]["max_length"] == 9
    assert set(config) == {"model_type", "class", "format", "version", "arguments"}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.save_pretrained(tmp_path)

    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        make(d_model=32).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    x = torch.randint(7, (2, 9))
    assert torch.equal(SequenceClassifier.from_pretrained(tmp_path)(x), model(x))


def test_a_file_that_is_being_read_stays_whole(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    with (tmp_path / CONFIG).open("rb") as config, (tmp_path / WEIGHTS).open("rb") as weights:
        make(d_model=32).save_pretrained(tmp_path)
        assert {CONFIG: config.read(), WEIGHTS: weights.read()} == before


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing-folder: no such folder, nor a hub id"):
        SequenceClassifier.from_pretrained(tmp_path / "missing-folder")
    with pytest.raises(FileNotFoundError, match=r"not the folder of a checkpoint, config\.json is missing"):
        SequenceClassifier.from_pretrained(tmp_path)
    make().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor .*index\.json is there"):
        SequenceClassifier.from_pretrained(tmp_path)


def edited(tmp_path: Path, **changes: Any) -> Path:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text()) | changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    return tmp_path


def test_another_class(tmp_path: Path) -> None:
    Tied(5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a Tied; load it with Tied\.from_pretrained, not SequenceClassifier"):
        SequenceClassifier.from_pretrained(tmp_path)


def test_bad_config(tmp_path: Path) -> None:
    folder = edited(tmp_path, arguments={"n_classes": 3, "vocab_size": 7, "depth": 2})
    with pytest.raises(ValueError, match=r"config\.json: SequenceClassifier does not take these arguments .*'depth'"):
        SequenceClassifier.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"config\.json: SequenceClassifier does not take .*'gru'"):
        SequenceClassifier.from_pretrained(
            edited(tmp_path, arguments={"n_classes": 3, "vocab_size": 7, "mixer": "gru"})
        )
    for text, message in (
        ("{", "damaged or not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"class": "SequenceClassifier"}', "expected class, format and arguments.*, got class;"),
        ('{"class": "SequenceClassifier", "arguments": 3}', "expected class, format and arguments"),
        (
            '{"model_type": "mamba"}',
            "expected class.*; checkpoints of others are read by linrnn.models.load_pretrained",
        ),
    ):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            SequenceClassifier.from_pretrained(folder)


class Tripwire:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code of a checkpoint ran",)


def test_damaged_weights(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (b"", data[:100], data[:-1], pickle.dumps({"head.weight": Tripwire()})):
        (tmp_path / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: damaged or not a safetensors file"):
            SequenceClassifier.from_pretrained(tmp_path)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["head.bias"]
    tensors["head.bios"] = torch.zeros(3)
    tensors["head.weight"] = torch.zeros(4, 16)
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="does not fit SequenceClassifier") as error:
        SequenceClassifier.from_pretrained(tmp_path)
    for part in ("missing: head.bias", "unexpected: head.bios", "shape of head.weight: expected (3, 16), got (4, 16)"):
        assert part in str(error.value)


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"and \d+ more\)$"):
        SequenceClassifier.from_pretrained(tmp_path)


def test_arguments_must_be_json(tmp_path: Path) -> None:
    model = make(mixer_kwargs={"max_phase": torch.tensor(0.5)})
    with pytest.raises(TypeError, match="config: expected arguments that JSON can hold"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_pickles_are_not_read(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"head.weight": Tripwire()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin.*pickle"):
        SequenceClassifier.from_pretrained(tmp_path)


def test_eval_mode_and_a_chosen_precision(tmp_path: Path) -> None:
    model = make(dropout=0.5)
    model.save_pretrained(tmp_path)
    again = SequenceClassifier.from_pretrained(tmp_path, dtype=torch.float64, device="cpu")
    assert not again.training and {p.dtype for p in again.parameters()} == {torch.float64}
    x = torch.randint(7, (2, 9))
    torch.testing.assert_close(again(x), model.double().eval()(x), rtol=0, atol=0)
    assert {p.device.type for p in SequenceClassifier.from_pretrained(tmp_path, device="meta").parameters()} == {"meta"}
    for dtype in ("float64", torch.int8):
        with pytest.raises(ValueError, match="dtype: expected a floating point"):
            SequenceClassifier.from_pretrained(tmp_path, dtype=dtype)
    with pytest.raises(ValueError, match="revision: a folder has none"):
        SequenceClassifier.from_pretrained(tmp_path, revision="main")


def test_several_files(tmp_path: Path) -> None:
    """Sharded and whole checkpoints replace one another without leaving files behind."""
    model, x = make(), torch.randint(7, (2, 9))
    make().save_pretrained(tmp_path)
    for size, whole in ((2000, False), (1, False), (10**6, True), (3000, False)):
        model.save_pretrained(tmp_path, max_shard_bytes=size)
        names = {path.name for path in tmp_path.iterdir()}
        assert (names == {CONFIG, WEIGHTS}) == whole
        if not whole:
            index = json.loads((tmp_path / INDEX).read_text())
            assert names == {CONFIG, INDEX, *index["weight_map"].values()}
            for shard in set(index["weight_map"].values()):
                tensors = load_file(tmp_path / shard)
                assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= size
        assert torch.equal(SequenceClassifier.from_pretrained(tmp_path)(x), model(x))
    next(tmp_path.glob("model-00001-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-.* is missing"):
        SequenceClassifier.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes: expected an integer >= 1, got 0"):
        model.save_pretrained(tmp_path, max_shard_bytes=0)


def test_config_is_a_dataclass(tmp_path: Path) -> None:
    given = {"lru": {"d_state": 8}}
    model = make(mixer=("lru", "attention"), n_layers=2, mixer_kwargs=given)
    config = model.config
    assert isinstance(config, SequenceClassifier.Config) and config.d_model == 16 and config.max_length is None
    with pytest.raises(FrozenInstanceError):
        config.d_model = 32
    given["lru"]["d_state"] = 4
    assert config.mixer_kwargs == {"lru": {"d_state": 8}}  # what the model was built with
    assert SequenceClassifier(**asdict(config)).config == config == SequenceClassifier.from_config(config).config
    assert len(SequenceClassifier.from_config(replace(config, n_layers=4)).backbone.blocks) == 4
    model.save_pretrained(tmp_path)
    assert SequenceClassifier.from_pretrained(tmp_path).config == config
    assert pickle.loads(pickle.dumps(model)).config == copy.deepcopy(model).config == config
    with pytest.raises(TypeError, match=r"config: expected a SequenceClassifier\.Config, got \{\}"):
        SequenceClassifier.from_config({})


class Wider(SequenceClassifier):
    """Has an argument of its own."""

    def __init__(self, n_classes: int, factor: int, *, record: bool = True):
        super().__init__(n_classes, vocab_size=7, d_model=16 * factor)
        if record:
            self.config = self.constructor_arguments(locals())


def test_a_subclass_with_other_arguments(tmp_path: Path) -> None:
    model, x = Wider(3, 2), torch.randint(7, (2, 9))
    assert asdict(model.config) == {"n_classes": 3, "factor": 2, "record": True}
    model.save_pretrained(tmp_path)
    assert torch.equal(Wider.from_pretrained(tmp_path)(x), model(x))
    with pytest.raises(TypeError, match=r"Wider\.config: expected self\.constructor_arguments"):
        Wider(3, 2, record=False).save_pretrained(tmp_path)
