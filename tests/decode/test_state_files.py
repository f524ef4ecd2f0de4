"""A state in a file comes back as it was, or not at all."""

import json
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from linrnn.decode import state as states
from linrnn.decode import state_files
from linrnn.models import LanguageModel

V = 11
STATES = Path(__file__).parents[1] / "fixtures" / "states"


def make(**kwargs: Any) -> LanguageModel:
    return LanguageModel(V, **({"mixer": ["lru", "attention"], "d_model": 16, "n_layers": 2} | kwargs)).eval()


def read(model: LanguageModel, rows: int = 2) -> Any:
    with torch.no_grad():
        return model(torch.randint(V, (rows, 7)))[1]


def same(ours: Any, theirs: Any) -> bool:
    pairs = list(zip(states.leaves(ours), states.leaves(theirs), strict=True))
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


class Own(NamedTuple):
    h: torch.Tensor
    rest: Any = None


@pytest.fixture
def own() -> Any:
    states.register(Own)
    yield
    from linrnn.decode import state_types

    del state_types._REGISTERED["Own"]


def test_every_kind_of_tensor_and_container(tmp_path: Path, own: None) -> None:
    shared = torch.randn(6, dtype=torch.complex128)
    state = {
        "a.b": (Own(shared.conj(), None), [torch.zeros(0, 3), torch.tensor(True)]),
        "a": {"b": (Own(torch.randn(2, 3).T.bfloat16(), shared[::2]),), "c": [], "type": ()},
        "": torch.tensor([2**62, -1]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "requires grad": torch.randn(2, dtype=torch.float16, requires_grad=True),
    }
    states.save(state, tmp_path / "state")
    loaded = states.load(tmp_path / "state")
    assert list(loaded) == list(state) and same(loaded, state)
    assert isinstance(loaded["a.b"][0], Own) and loaded["a.b"][0].rest is None
    assert isinstance(loaded["a.b"][1], list) and loaded["a"]["type"] == () and loaded["a"]["c"] == []
    for nothing in (None, (), torch.tensor(3.0)):
        states.save(nothing, tmp_path / "state")
        assert type(states.load(tmp_path / "state")) is type(nothing)


def test_a_model_goes_on_where_it_was(tmp_path: Path) -> None:
    model = make()
    state = read(model)
    states.save(state, str(tmp_path / "state"), model=model)
    ids = torch.randint(V, (2,))
    with torch.no_grad():
        expected = model.step(ids, state)[0]
        assert torch.equal(model.step(ids, states.load(tmp_path / "state", model=model))[0], expected)
        model.save_pretrained(tmp_path / "model")
        again = LanguageModel.from_pretrained(tmp_path / "model")
        assert torch.equal(again.step(ids, states.load(str(tmp_path / "state"), model=again))[0], expected)
    assert all(leaf.is_meta for leaf in states.leaves(states.load(tmp_path / "state", device="meta")))
    with safe_open(tmp_path / "state", "pt") as file:
        assert file.metadata()["version"] == "1" and "0.h" in file.keys()


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "state"
    states.save(read(model), path, model=model)
    for other in (make(n_layers=3), make(mixer="lru"), make(mixer_kwargs={"attention": {"window": 3}})):
        with pytest.raises(ValueError, match="state: the state of another model than this LanguageModel: architecture"):
            states.load(path, model=other)
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="like this LanguageModel with other weights or in another precision"):
        states.load(path, model=model)
    states.save(read(model), path)
    with pytest.raises(ValueError, match="saved without a model, whose state it is cannot be told"):
        states.load(path, model=model)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    states.save(read(make()), path)
    data = path.read_bytes()
    for end in (0, 4, 8, 100, len(data) - 1):
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="state: damaged"):
            states.load(path)
    for at in range(0, len(data), 37):  # one bit anywhere
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        with pytest.raises(ValueError, match="state: "):
            states.load(path)
    path.write_bytes(data + b"more")
    with pytest.raises(ValueError, match="state: damaged"):
        states.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        states.load(path)
    torch.save({"h": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="state: expected a safetensors file, got a pickle, which could run any code"):
        states.load(path)
    for protocol in (2, 4):
        path.write_bytes(pickle.dumps({"h": [0.0]}, protocol))
        with pytest.raises(ValueError, match="got a pickle"):
            states.load(path)
    save_file({"h": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"expected a state that .* wrote, got another safetensors file"):
        states.load(path)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"type": "os.system", "fields": {"h": {"tensor": "h"}}}, "a state of type os.system, which is unknown here"),
        ({"type": "LRUState", "fields": {"command": None}}, "unexpected keyword argument 'command'"),
        ({"type": "LRUState", "fields": {}}, "missing 1 required positional argument: 'h'"),
        ({"type": "LRUState"}, "expected a tensor, tuple, list, dict or type, got .'type'"),
        ({"tensor": "g"}, "not a state that this version of linrnn knows .'g'"),
        ({"tuple": [{"tensor": "h"}, {"tensor": "h"}]}, "not a state that this version of linrnn knows .'h'"),
        ({"complex": "h"}, "not a state that this version of linrnn knows"),
        (3, "expected an object, got 3"),
        (None, "holds tensors that are in no state, h"),
    ],
)
def test_files_with_a_digest_and_nonsense(tmp_path: Path, structure: Any, message: str) -> None:
    tensors = {"h": torch.zeros(2, 3)}
    metadata = {"format": state_files.FORMAT, "version": "1", "structure": json.dumps(structure)}
    metadata["digest"] = state_files._digest(tensors, metadata)
    save_file(tensors, tmp_path / "state", metadata)
    with pytest.raises(ValueError, match=message):
        states.load(tmp_path / "state")


@pytest.mark.parametrize("version", [2, 0, "one"])
def test_an_unknown_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: Any) -> None:
    monkeypatch.setattr(state_files, "VERSION", version)
    states.save((torch.zeros(1),), tmp_path / "state")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"expected format 1 to 1 of states, got '{version}', written by linrnn 0"):
        states.load(tmp_path / "state")


def test_what_cannot_be_saved_leaves_no_file(tmp_path: Path) -> None:
    for wrong, message in (
        ((torch.ones(1), "h"), r"state.1: expected tensors in tuples, lists or dicts, got str"),
        ({3: torch.ones(1)}, "state: expected strings as keys of a dict, got 3"),
        ((Own(torch.ones(1)),), "state.0: expected a state of a layer of linrnn, got Own; `state.register` takes"),
    ):
        with pytest.raises(TypeError, match=message):
            states.save(wrong, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_is_defined_again(own: None, tmp_path: Path) -> None:
    """As a cell of a notebook that is run twice does."""
    again: Any = NamedTuple("Own", [("k", torch.Tensor)])
    again.__module__, again.__qualname__ = Own.__module__, Own.__qualname__
    states.register(again)
    states.save(again(torch.ones(1)), tmp_path / "state")
    assert type(states.load(tmp_path / "state")) is again


def test_registered_types(own: None) -> None:
    class Other(NamedTuple):
        k: torch.Tensor
        n: torch.Tensor

    Other.__name__ = "LRUState"
    with pytest.raises(ValueError, match="state_type: expected a name that is not taken, got LRUState"):
        states.register(Other)
    with pytest.raises(TypeError, match="state_type: expected a NamedTuple class, got"):
        states.register(tuple)
    with pytest.raises(ValueError, match=r"growing: expected some of the fields \('h', 'rest'\), got \['k'\]"):
        states.register(Own, states.Growing(("k",), "rest"))


@pytest.mark.parametrize("file", sorted(STATES.glob("*/*.safetensors")), ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_states_of_every_format_are_gone_on_with(file: Path) -> None:
    """And the models they were saved with are still known by their fingerprints, in each format of their own."""
    folders = sorted((STATES.parent / "checkpoints").glob(f"*/{file.stem}"))
    assert folders
    for folder in folders:
        model = LanguageModel.from_pretrained(folder).eval().double()
        state, expected = states.load(file, model=model), load_file(folder / "expected.safetensors")
        read = 5
        with torch.no_grad():
            y, _ = model(expected["ids"][:1, read:], state)
        torch.testing.assert_close(y, expected["y"][:1, read:], rtol=1e-9, atol=1e-9)


def test_every_format_has_states() -> None:
    assert {folder.name for folder in STATES.glob("format-*")} == {
        f"format-{n + 1}" for n in range(state_files.VERSION)
    }


@pytest.mark.gpu
@torch.no_grad()
def test_between_devices(tmp_path: Path) -> None:
    here, there = make(), make().cuda()
    there.load_state_dict(here.state_dict())
    assert states.fingerprint(here) == states.fingerprint(there)
    ids = torch.randint(V, (2, 7))
    states.save(there(ids.cuda())[1], tmp_path / "state", model=there)
    expected = here.step(ids[:, 0], states.load(tmp_path / "state", model=here))[0]
    on_gpu = states.load(tmp_path / "state", model=there)
    assert all(leaf.is_cuda for leaf in states.leaves(on_gpu))
    pool = states.put(there.init_state(3), torch.tensor([2, 0]), on_gpu)
    y = there.step(ids[[1, 0, 0], 0].cuda(), states.trim(pool, there))[0]
    torch.testing.assert_close(y[[2, 0]].cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_state_is_saved_as_that_of_its_own_model_only(tmp_path: Path) -> None:
    model, other = (LanguageModel(7, d_model=16, mixer=mixer) for mixer in ("mamba", "lru"))
    with pytest.raises(TypeError, match=r"state\[0\]: state: expected MambaState or None, got LRUState"):
        states.save(other.init_state(2), tmp_path / "state", model=model)
    assert not (tmp_path / "state").exists()
