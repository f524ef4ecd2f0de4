"""Parameter groups, counts and matching."""

from typing import Any

import pytest
import torch
from torch import nn

from linrnn import layers
from linrnn.models import SequenceBackbone, SequenceClassifier, count_params, match_params, param_groups


def settings(model: nn.Module, **kwargs: Any) -> dict[str, tuple[float, float]]:
    groups = param_groups(model, **({"lr": 1.0, "weight_decay": 0.1} | kwargs))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_hints_of_every_layer_are_honoured() -> None:
    model = SequenceClassifier(
        3, vocab_size=7, mixer=["lru", "attention"], d_model=16, pooling="cls", mixer_kwargs={"lru": {"lr_scale": 0.25}}
    )
    expected = {
        "backbone.blocks.0.mixer.nu_log": (0.25, 0.0),
        "backbone.blocks.0.mixer.theta_log": (0.25, 0.0),
        "backbone.blocks.0.mixer.gamma_log": (0.25, 0.0),
        "backbone.blocks.0.mixer.B": (1.0, 0.0),
        "backbone.blocks.0.mixer.C": (1.0, 0.1),
        "backbone.blocks.0.mixer.D": (1.0, 0.0),
        "backbone.blocks.0.ffn.gate_in.weight": (1.0, 0.1),
        "backbone.blocks.0.mixer_norm.weight": (1.0, 0.0),
        "backbone.blocks.1.mixer.qkv.weight": (1.0, 0.1),
        "backbone.norm.weight": (1.0, 0.0),
        "embed.weight": (1.0, 0.0),
        "cls": (1.0, 0.0),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }
    found = settings(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert {name: found[name] for name in expected} == expected


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = SequenceClassifier(3, vocab_size=7, d_model=16)
    model.embed.weight.requires_grad_(False)
    groups = param_groups(model, lr=1e-3, weight_decay=0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)
    torch.optim.AdamW(groups)


def test_optimiser_states_fit_a_rebuilt_model() -> None:
    one, other = (SequenceClassifier(3, vocab_size=7, d_model=16) for _ in range(2))
    shapes = [[[p.shape for p in g["params"]] for g in param_groups(m, 1e-3, 0.1)] for m in (one, other)]
    assert shapes[0] == shapes[1]


def test_no_decay_of_shared_embeddings() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

    (group,) = param_groups(Tied(), lr=1.0, weight_decay=0.1)
    assert len(group["params"]) == 1
    assert group["weight_decay"] == 0


def test_bad_groups() -> None:
    class Wrong(nn.Linear):
        def optim_hints(self) -> dict[str, dict[str, float]]:
            return {"wait": {"lr_scale": 0.5}}

    with pytest.raises(ValueError, match=r"0\.optim_hints: no parameter is called 'wait'"):
        param_groups(nn.Sequential(Wrong(2, 2)), lr=1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"lr: expected a number >= 0, got -1\.0"):
        param_groups(nn.Linear(2, 2), lr=-1.0, weight_decay=0.0)
    with pytest.raises(ValueError, match="weight_decay: expected a number >= 0, got nan"):
        param_groups(nn.Linear(2, 2), lr=1.0, weight_decay=float("nan"))


def test_count_params() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    assert count_params(model) == 12 + 4 + 12
    model[1].weight = model[0].weight
    assert count_params(model) == 12 + 4
    model[0].bias.requires_grad_(False)
    assert count_params(model) == 12


@pytest.mark.parametrize("mixer", ["lru", "slru", "attention"])
def test_match_params(mixer: str) -> None:
    def build(width: int) -> nn.Module:
        return SequenceBackbone(mixer, width, 2)

    widths = range(16, 161, 16)
    counts = {width: count_params(build(width)) for width in widths}
    for width in widths:
        assert match_params(counts[width] + 5, build, widths) == width
    with pytest.raises(ValueError, match="widths: none gives 100000000 parameters within 10%; the nearest is 160"):
        match_params(10**8, build, widths)
    with pytest.raises(ValueError, match="widths: expected at least one"):
        match_params(1000, build, [])
    with pytest.raises(ValueError, match=r"target: .* got 0"):
        match_params(0, build, widths)


def test_match_params_allocates_nothing() -> None:
    def build(width: int) -> nn.Module:
        model = SequenceBackbone("lru", width, 2)
        assert all(p.is_meta for p in model.parameters())
        return model

    match_params(22_000_000_000, build, [2**15, 2**16])


def test_a_compiled_model_has_the_groups_of_its_content() -> None:
    """torch.compile's wrapper forwards attributes, optim_hints among them."""
    model = layers.build("lru", d_model=16)
    plain, wrapped = (param_groups(m, 1e-3, 0.1) for m in (model, torch.compile(model)))
    assert [len(g["params"]) for g in plain] == [len(g["params"]) for g in wrapped]
    assert [(g["lr"], g["weight_decay"]) for g in plain] == [(g["lr"], g["weight_decay"]) for g in wrapped]
