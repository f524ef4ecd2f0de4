"""Checkpoint folders: what is saved comes back, and what does not fit is named."""

import copy
import json
import os
import pickle
import threading
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from linrnn.models import LanguageModel, Pretrained, SequenceClassifier
from linrnn.models.files import write_whole
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


@pytest.mark.parametrize("before, after", [(10**6, 10**6), (3000, 3000), (10**6, 3000), (3000, 10**6), (2000, 3000)])
def test_an_interruption_leaves_no_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int, after: int
) -> None:
    """At each call that changes a name: the old model, the new one, or an error."""
    old, new = (LanguageModel(7, d_model=16, n_layers=1, logit_soft_cap=cap) for cap in (1.0, 2.0))
    ids, calls = torch.randint(7, (2, 9)), [0]
    expected = [old(ids)[0], new(ids)[0]]
    unlink, replace_ = Path.unlink, os.replace

    def interrupted(call: Any) -> Any:
        def change(path: Path, *args: Any, **kwargs: Any) -> None:
            if not str(path).endswith(".tmp") or call is replace_:
                calls[0] -= 1
                if calls[0] == 0:
                    raise KeyboardInterrupt
            call(path, *args, **kwargs)

        return change

    seen = []
    for n in range(1, 30):
        calls[0] = 0
        old.save_pretrained(tmp_path, max_shard_bytes=before)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", interrupted(unlink))
            patch.setattr(os, "replace", interrupted(replace_))
            calls[0] = n
            try:
                new.save_pretrained(tmp_path, max_shard_bytes=after)
                break
            except KeyboardInterrupt:
                pass
        try:
            logits = LanguageModel.from_pretrained(tmp_path)(ids)[0]
            seen.append([torch.equal(logits, y) for y in expected].index(True))
        except FileNotFoundError:
            seen.append(-1)
        assert not list(tmp_path.glob(".*"))
    assert seen[0] == 0 and -1 in seen and len(seen) > 3
    assert torch.equal(LanguageModel.from_pretrained(tmp_path)(ids)[0], expected[1])


def test_the_next_weights_of_one_model_replace_the_last_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make().save_pretrained(tmp_path)
    monkeypatch.setattr(os, "replace", lambda old, new: pytest.fail("gone") if not new.exists() else None)
    make().save_pretrained(tmp_path)


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    contents, failed = [bytes([i]) * 1000 for i in range(2)], []

    def write(content: bytes) -> None:
        for _ in range(20):
            try:
                write_whole(tmp_path / "file", content)
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and (tmp_path / "file").read_bytes() in contents and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError) as error:
        write_whole(tmp_path / "missing" / "file", b"")
    assert error.value.filename == str(tmp_path / "missing" / "file")


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
    damaged = r"model\.safetensors: damaged or not a safetensors file"
    foreign = pickle.dumps({"head.weight": Tripwire()})
    for content, message in ((b"", damaged), (data[:100], damaged), (data[:-1], damaged), (foreign, "got a pickle")):
        (tmp_path / WEIGHTS).write_bytes(content)
        with pytest.raises(ValueError, match=message):
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


@pytest.mark.parametrize(
    "name, dtype, message",
    [
        ("head.weight", torch.int8, "dtype of head.weight: expected a floating point one, got torch.int8"),
        ("head.weight", torch.complex64, "dtype of head.weight: expected a floating point one, got torch.complex64"),
        ("head.weight", torch.float8_e4m3fn, "dtype of head.weight: expected a floating point one"),
        ("head.weight", torch.bfloat16, "dtype of head.weight: expected torch.float32 as the others, got .*bfloat16"),
        ("count", torch.float32, "dtype of count: expected torch.int64, got torch.float32"),
    ],
)
def test_numbers_of_another_kind(tmp_path: Path, name: str, dtype: torch.dtype, message: str) -> None:
    model = make() if name == "head.weight" else Tied(5)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, name: tensors[name].to(dtype)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)
    if dtype == torch.bfloat16:
        assert type(model).from_pretrained(tmp_path, dtype=torch.float32).head.weight.dtype == torch.float32


class WithNumbers(Pretrained):
    """Has numbers that are in no file, one of them read in the constructor, and a submodule called model."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.config = self.constructor_arguments(locals())
        self.model = nn.Linear(size, size)
        self.register_buffer("powers", 2.0 ** torch.arange(size), persistent=False)
        self.offset = torch.ones(size)
        self.largest = self.powers.max().item()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) * self.powers + self.offset + self.largest


def test_numbers_that_are_not_saved_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = WithNumbers(), torch.randn(3, 4)
    model.save_pretrained(tmp_path)
    assert torch.equal(WithNumbers.from_pretrained(tmp_path)(x), model(x))
    monkeypatch.setattr(Tensor, "item", lambda self: 8.0)  # the constructor runs without numbers now
    again = WithNumbers.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(x.double()), model.double()(x.double()))


def test_loading_draws_no_numbers(tmp_path: Path) -> None:
    models = [WithNumbers(), LanguageModel(5, mixer=["lru", "mamba", "performer"], d_model=16, n_layers=3)]
    for model in models:
        model.save_pretrained(tmp_path)
        before = torch.get_rng_state()
        type(model).from_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 10**13}, r"shape of embed.weight: expected \(10000000000000, 64\)"),
        ({"vocab_size": 10**18}, r"config\.json: .*sizes beyond any memory"),
        ({"n_layers": 10**7}, r"config\.json: n_layers: expected at most the number of tensors, \d+, got 10000000"),
    ],
)
def test_a_config_of_no_possible_model(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    LanguageModel(5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["arguments"] |= changes
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        LanguageModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["two_inputs", "bidirectional", "prenorm"])
def test_flags_are_true_or_false(name: str) -> None:
    for value in ("false", 1, None):
        with pytest.raises(ValueError, match=f"{name}: expected True or False, got {value!r}"):
            make(**{name: value})


def test_infinity_is_written_as_json_has_it(tmp_path: Path) -> None:
    model = LanguageModel(5, mixer="mamba2", d_model=32, mixer_kwargs={"dt_limit": [0.01, float("inf")]})
    model.save_pretrained(tmp_path)

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    json.loads((tmp_path / CONFIG).read_text(), parse_constant=refuse)
    assert LanguageModel.from_pretrained(tmp_path).config == model.config


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    untied = LanguageModel(5, d_model=16, tie_embeddings=True)
    untied.head.weight = nn.Parameter(torch.randn(5, 16))
    resized = make()
    resized.head = nn.Linear(16, 4)
    for model, message in ((untied, r"unexpected: head\.weight"), (resized, r"shape of head\.weight: expected")):
        with pytest.raises(ValueError, match=rf"its config does not make these tensors \(.*{message}"):
            model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


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


class Forgetful(LanguageModel):
    """Records nothing of its own."""

    def __init__(self, vocab_size: int, *, d_model: int = 16, gain: float = 1.0):
        super().__init__(vocab_size, d_model=2 * d_model)
        self.gain = gain


class Narrow(LanguageModel):
    """Has arguments of the base's names only, and other values for them."""

    def __init__(self, vocab_size: int, *, d_model: int = 16):
        super().__init__(vocab_size, d_model=2 * d_model)


class Nameless(LanguageModel):
    """Hands on whatever it gets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    "cls, message",
    [
        (Forgetful, r"Forgetful\.config: expected self\.constructor_arguments\(locals\(\)\)"),
        (Narrow, r"Narrow\.config: expected self\.constructor_arguments"),
        (Nameless, r"Nameless: expected a constructor whose arguments have names, got \*args"),
    ],
)
def test_a_subclass_that_records_nothing(tmp_path: Path, cls: type[LanguageModel], message: str) -> None:
    model = cls(5, d_model=8)
    assert model.config is None
    with pytest.raises(TypeError, match=message):
        model.save_pretrained(tmp_path)
