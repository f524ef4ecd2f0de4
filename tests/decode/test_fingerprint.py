"""Two models have one fingerprint exactly if they are one model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from linrnn import layers
from linrnn.decode.fingerprint import differences, fingerprint
from linrnn.layers.positions import ALiBi, RoPE
from linrnn.models import LanguageModel, SequenceBackbone


def make(**kwargs: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(11, **({"mixer": ["lru", "attention"], "d_model": 16, "n_layers": 2} | kwargs))


def test_the_same_model(tmp_path: Path) -> None:
    model = make(tie_embeddings=True, mixer_kwargs={"lru": {"d_state": 8}})
    expected = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(LanguageModel.from_pretrained(tmp_path)) == expected
    assert fingerprint(copy.deepcopy(model)) == expected
    assert fingerprint(model.eval().requires_grad_(False)) == expected
    assert fingerprint(model, fresh=True) == expected
    # an argument at its default is none at all: a version that brings one refuses no older state
    assert fingerprint(make(tie_embeddings=True, prenorm=True, mixer_kwargs={"lru": {"d_state": 8}})) == expected
    assert fingerprint(torch.compile(model, backend="eager")) == expected  # type: ignore[arg-type]


def test_one_mixer_by_name_or_in_a_list() -> None:
    options = {"d_state": 8}
    assert fingerprint(make(mixer="lru")) == fingerprint(make(mixer=["lru"])) == fingerprint(make(mixer=["lru"] * 2))
    one, listed = make(mixer="lru", mixer_kwargs=options), make(mixer=["lru"], mixer_kwargs={"lru": options})
    assert fingerprint(one) == fingerprint(listed) != fingerprint(make(mixer="lru"))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"n_layers": 3},
        {"mixer": "lru"},
        {"norm": "layer"},
        {"prenorm": False},
        {"mixer_kwargs": {"attention": {"window": 3}}},  # nothing about the tensors says so
        {"mixer_kwargs": {"attention": {"positions": RoPE(base=5e5)}}},
        {"mixer_kwargs": {"attention": {"positions": ALiBi()}}},
    ],
)
def test_another_architecture(kwargs: dict[str, Any]) -> None:
    assert "architecture" in differences(fingerprint(make()), fingerprint(make(**kwargs)))


def test_modules_without_a_config() -> None:
    def of(name: str, **kwargs: Any) -> str:
        torch.manual_seed(0)
        return fingerprint(layers.build(name, 16, **kwargs))

    assert of("attention", window=3) == of("attention", window=3)
    assert differences(of("attention"), of("attention", window=3)) == ["architecture"]
    assert differences(of("attention"), of("attention", positions=RoPE(base=5e5))) == ["architecture"]
    assert differences(of("gau"), of("gau", attention="softmax_plus")) == ["architecture"]
    assert fingerprint(SequenceBackbone("lru", 16, 2)) != fingerprint(SequenceBackbone("lru", 16, 2, prenorm=False))


def test_other_weights() -> None:
    model = make()
    before = fingerprint(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model(torch.randint(11, (2, 5)))[0].square().sum().backward()
    optimizer.step()
    after = fingerprint(model)
    assert differences(before, after) == ["weights"]
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    assert fingerprint(model) != after
    model.load_state_dict(make().state_dict())
    assert fingerprint(model) == before
    model.backbone.blocks[0].ffn.out.weight.data[0, 1] += 1  # nothing says so, and no number that is looked at
    assert fingerprint(model) == before and differences(fingerprint(model, fresh=True), before) == ["weights"]
    model.head.weight.data = model.head.weight.data.clone()
    assert differences(fingerprint(model), before) == ["weights"]
    assert differences(fingerprint(make().bfloat16()), fingerprint(make())) == ["weights"]
    # the same numbers under other names
    swapped = make()
    with torch.no_grad():
        a, b = swapped.head.weight, swapped.embed.weight
        a[:], b[:] = b.clone(), a.clone()
    assert differences(fingerprint(swapped), fingerprint(make())) == ["weights"]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_fused_optimizers(optimizer: Any) -> None:
    """They write without torch's knowledge."""
    model = make()
    before, versions = fingerprint(model), [p._version for p in model.parameters()]
    model(torch.randint(11, (2, 5)))[0].square().sum().backward()
    optimizer(model.parameters(), lr=1e-3, fused=True).step()
    assert [p._version for p in model.parameters()] == versions
    assert differences(fingerprint(model), before) == ["weights"]


def test_every_tensor_is_looked_at() -> None:
    """Whatever its type, size, order in memory and number of dimensions."""
    model = make()
    for i, tensor in enumerate(
        [torch.tensor(1), torch.ones(2, 3, dtype=torch.cfloat), torch.ones(0), torch.ones(9, 8)]
    ):
        model.register_buffer(f"more{i}", tensor.mT.conj() if tensor.ndim == 2 else tensor)
    before = fingerprint(model)
    for tensor in model.state_dict().values():
        if tensor.numel():
            tensor.data += 1
            after = fingerprint(model)
            assert differences(after, before) == ["weights"]
            before = after


def test_wrappers_have_the_fingerprint_of_what_they_wrap() -> None:
    model = make()
    wrapped = nn.Sequential(model)
    assert fingerprint(wrapped) == fingerprint(nn.Sequential(wrapped[0])) == fingerprint(model)
    assert fingerprint(nn.Sequential(model, nn.Linear(2, 2))) != fingerprint(model)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = make()
        before = fingerprint(model)
        model.head.weight[0, 0] += 1
        assert fingerprint(model) != before


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        fingerprint("lru")  # type: ignore[arg-type]
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model: expected weights with numbers, got weight on the meta device"):
        fingerprint(empty)
