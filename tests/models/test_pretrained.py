"""Checkpoint folders: what is saved comes back, and what does not fit is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linrnn.models import Pretrained, SequenceClassifier
from linrnn.models.pretrained import CONFIG, WEIGHTS


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
    assert set(config) == {"class", "version", "arguments"}


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.save_pretrained(tmp_path)

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        make(d_model=32).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    x = torch.randint(7, (2, 9))
    assert torch.equal(SequenceClassifier.from_pretrained(tmp_path)(x), model(x))


def test_not_a_checkpoint_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing-folder: not a checkpoint folder.*config\.json is missing"):
        SequenceClassifier.from_pretrained(tmp_path / "missing-folder")
    make().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
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
    for text in ("{", "[]", '{"class": "SequenceClassifier"}', '{"class": "SequenceClassifier", "arguments": 3}'):
        (folder / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: expected JSON with class, version and arguments"):
            SequenceClassifier.from_pretrained(folder)


def test_damaged_weights(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    for damaged in (b"", data[:100], data[:-1]):
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
