"""Checkpoints of every format so far are read, and compute what they computed when they were written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from linrnn import models
from linrnn.models import LanguageModel, Pretrained, migrations
from linrnn.models.pretrained import CONFIG

CHECKPOINTS = Path(__file__).parent.parent / "fixtures" / "checkpoints"
WRITTEN = sorted(path.parent for path in CHECKPOINTS.glob(f"*/*/{CONFIG}"))


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_outputs_are_those_of_the_day(folder: Path) -> None:
    cls: type[Pretrained] = getattr(models, json.loads((folder / CONFIG).read_text())["class"])
    model = cls.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    expected = load_file(folder / "expected.safetensors")
    y = expected.pop("y")
    with torch.no_grad():
        out = model.double()(**expected)
    torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, y, rtol=1e-9, atol=1e-9)


def test_every_format_has_checkpoints() -> None:
    names = {"every_layer", "tied_hybrid", "classifier"}
    assert {f"format-{n}" for n in range(1, migrations.FORMAT + 1)} == {path.parent.name for path in WRITTEN}
    for path in {path.parent for path in WRITTEN}:
        assert names <= {child.name for child in path.iterdir()}


def set_format(folder: Path, value: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"format": value, "version": "9.1"}))


@pytest.mark.parametrize("value", [0, -1, "2", None, True, 1.5])
def test_malformed_format(tmp_path: Path, value: object) -> None:
    LanguageModel(5, d_model=16, n_layers=1).save_pretrained(tmp_path)
    set_format(tmp_path, value)
    with pytest.raises(ValueError, match=r"config\.json: format: expected an integer from 1"):
        LanguageModel.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    LanguageModel(5, d_model=16, n_layers=1).save_pretrained(tmp_path)
    set_format(tmp_path, migrations.FORMAT + 1)
    with pytest.raises(ValueError, match=r"expected at most \d+, got \d+, written by linrnn 9\.1; update linrnn"):
        LanguageModel.from_pretrained(tmp_path)


def test_migrations_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument and a tensor that were renamed twice since."""
    model = LanguageModel(5, d_model=16, n_layers=1)
    now, names = migrations.FORMAT, ("width", "size", "d_model")

    def renaming(old: str, new: str) -> migrations.Migration:
        def migration(name, arguments, tensors):
            assert name == "LanguageModel"
            arguments = {new if key == old else key: value for key, value in arguments.items()}
            return arguments, {key.replace(f"{old}.", f"{new}."): tensor for key, tensor in tensors.items()}

        return migration

    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["arguments"]["width"] = config["arguments"].pop("d_model")
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not take these arguments .*'width'"):
        LanguageModel.from_pretrained(tmp_path)
    monkeypatch.setattr("linrnn.models.migrations.FORMAT", now + 2)
    monkeypatch.setattr("linrnn.models.pretrained.FORMAT", now + 2)
    for i in range(2):
        monkeypatch.setitem(migrations.MIGRATIONS, now + i, renaming(names[i], names[i + 1]))
    ids = torch.randint(5, (2, 7))
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_without_a_number_it_is_the_first_format(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(migrations.MIGRATIONS, 1, lambda name, *content: seen.append(name) or content)
    LanguageModel.from_pretrained(CHECKPOINTS / "format-1" / "tied_hybrid")
    LanguageModel.from_pretrained(CHECKPOINTS / "format-2" / "tied_hybrid")
    assert seen == ["LanguageModel"]
