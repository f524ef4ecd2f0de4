"""Cells: what names them, what they may spend, what they refuse."""

import dataclasses
import subprocess
import sys

import pytest

from lra.config import Budget, Cell, Model, Optim, cell_from_dict

from .fake_results import result


def test_key_is_readable_and_depends_on_what_matters(tiny):
    cell = tiny(regime="finetune", seed=3)
    assert cell.key.startswith("listops/lru-masked-finetune/seed3-")
    assert cell.key == tiny(regime="finetune", seed=3, objective="masked").key
    assert cell.key == tiny(regime="finetune", seed=3, budget={"checkpoint_every": 7}).key
    changes = [
        {"task": {"seed": 1}},
        {"task": {"mask_rate": 0.2}},
        {"model": {"d_model": 32}},
        {"optim": {"lr": 1e-4}},
        {"optim": {"pretrain_lr": 1e-4}},
        {"budget": {"steps": 24}},
        {"budget": {"labels": 10}},
        {"seed": 4},
    ]
    keys = {tiny(**{"regime": "finetune", "seed": 3, **change}).key for change in changes}
    assert len(keys | {cell.key}) == len(changes) + 1


def test_defaults_spelled_out_are_the_same_cell(tiny):
    assert tiny().key == tiny(task={"mask_rate": 0.10, "pooling": "mean"}).key


def test_whole_numbers_are_numbers(tiny):
    """What YAML reads as 0 and as 0.0 is one cell, in the sections as in the options of the task."""
    whole = tiny(optim={"weight_decay": 0, "clip": 1}, task={"mask_rate": 0})
    assert whole.key == tiny(optim={"weight_decay": 0.0, "clip": 1.0}, task={"mask_rate": 0.0}).key
    assert type(whole.optim.weight_decay) is type(whole.optim.clip) is float and type(whole.optim.batch_size) is int


def test_the_folder_of_a_cell_lies_in_runs_dir(tiny):
    """Whatever stands in the mixer's arguments."""
    key = tiny(model={"mixer_kwargs": {"a/../../b": "../..", "n_heads": 4, "width": [1, 2]}}).key
    assert key.startswith("listops/lru-a_.._.._b=.._..-n_heads=4-width=_1_2_-scratch/seed0-") and key.count("/") == 2


@pytest.mark.parametrize("option", [{"mask_rate": 0.25}, {"pretrain_loss": "ce"}])
def test_grids_of_pretraining_share_one_scratch_cell(tiny, option):
    base, other = (dataclasses.replace(tiny(), task={"name": "digits", **given}) for given in ({}, option))
    assert base.key == other.key
    for regime in ("pretrain", "finetune"):
        assert dataclasses.replace(base, regime=regime).key != dataclasses.replace(other, regime=regime).key


def test_a_scratch_cell_stands_beside_its_pretrained_twins(tiny):
    from lra.results import sections

    cells = [tiny(), tiny(regime="finetune"), tiny(regime="finetune", task={"mask_rate": 0.5})]
    (section,) = sections([result(cell, 0.5) for cell in cells])
    assert [g.pretrained for g in section.groups] == [False, True, True]


def test_pooling_is_resolved(tiny):
    assert tiny(model={"pooling": "mean"}).key == tiny().key != tiny(task={"pooling": "max"}).key
    assert tiny(model={"bidirectional": False}).plan()["model"]["pooling"] == "last"
    with pytest.raises(ValueError, match=r"model\.pooling must be auto for task 'mqar', which labels positions"):
        Cell(task={"name": "mqar"}, model=Model(pooling="max")).plan()


def test_finetuning_grids_share_one_pretraining(tiny):
    base = tiny(regime="finetune", optim={"pretrain_lr": 1e-3})
    other = tiny(regime="finetune", optim={"pretrain_lr": 1e-3, "lr": 5e-4}, budget={"labels": 10})
    assert base.key != other.key
    assert base.pretraining().key == other.pretraining().key


def test_scratch_spends_what_pretraining_and_finetuning_spend():
    for steps in (2, 3, 1000):
        for share in (0.001, 0.4, 0.999):
            cell = Cell(budget=Budget(steps=steps, pretrain_share=share), regime="finetune")
            assert cell.steps + cell.pretraining().steps == dataclasses.replace(cell, regime="scratch").steps == steps
            assert cell.steps >= 1 and cell.pretraining().steps >= 1


def test_direction_decides_the_objective(tiny):
    assert tiny(model={"bidirectional": False}).denoising == "causal"
    with pytest.raises(ValueError, match=r"objective 'causal'.*model.bidirectional=True"):
        tiny(objective="causal")
    with pytest.raises(ValueError, match=r"objective 'masked'.*model.bidirectional=False"):
        tiny(objective="masked", model={"bidirectional": False})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Model(d_model=0), "model.d_model"),
        (lambda: Model(n_layers=0), "model.n_layers"),
        (lambda: Model(ffn_expand=0), "model.ffn_expand"),
        (lambda: Model(dropout=1), "model.dropout"),
        (lambda: Optim(lr=0), "optim.lr"),
        (lambda: Optim(pretrain_lr=-1), "optim.pretrain_lr"),
        (lambda: Optim(batch_size=0), "optim.batch_size"),
        (lambda: Optim(weight_decay=-1), "optim.weight_decay"),
        (lambda: Optim(warmup=2), "optim.warmup"),
        (lambda: Optim(clip=0), "optim.clip"),
        (lambda: Budget(steps=1), "budget.steps"),
        (lambda: Budget(pretrain_share=1), "budget.pretrain_share"),
        (lambda: Budget(labels=0), "budget.labels"),
        (lambda: Budget(evaluations=0), "budget.evaluations"),
        (lambda: Budget(checkpoint_every=0), "budget.checkpoint_every"),
        (lambda: Cell(task={}), "task"),
        (lambda: Cell(regime="warm"), "regime"),
        (lambda: Cell(seed=-1), "seed"),
        (lambda: Cell(task={"name": "listopz"}).key, "listopz"),
        (lambda: Cell(task={"name": "listops", "n_train": "many"}).key, "n_train"),
        (lambda: cell_from_dict({"modle": {}}), r"modle.*allowed: task, model"),
        (lambda: cell_from_dict({"optim": {"lrr": 1}}), r"optim.lrr.*optim.lr, "),
    ],
)
def test_bad_values_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"seed": "x"}, "seed must be an integer; got 'x'"),
        ({"seed": True}, "seed must be an integer; got True"),
        ({"seed": None}, "seed must be an integer; got None"),
        ({"seed": 1.0}, "seed must be an integer; got 1.0"),
        ({"task": 3}, "task must be a mapping with the key `name` (`lra tasks` lists the names); got 3"),
        ({"regime": ["scratch"]}, "regime must be one of scratch, pretrain, finetune; got ['scratch']"),
        ({"objective": 3}, "objective must be one of auto, masked, causal; got 3"),
        ({"model": {"d_model": "64"}}, "model.d_model must be an integer; got '64'"),
        ({"model": {"bidirectional": 1}}, "model.bidirectional must be true or false; got 1"),
        ({"model": {"dropout": False}}, "model.dropout must be a number such as 0.001; got False"),
        ({"model": {"mixer": 3}}, "model.mixer must be a string; got 3"),
        ({"model": {"norm": "batch"}}, "model.norm must be one of rms, layer; got 'batch'"),
        ({"model": {"mixer_kwargs": []}}, "model.mixer_kwargs must be a mapping; got []"),
        ({"optim": {"lr": "1e-3"}}, "optim.lr must be a number such as 0.001; got '1e-3'"),
        ({"optim": {"clip": "no"}}, "optim.clip must be a number such as 0.001 or null; got 'no'"),
        ({"budget": {"labels": 1.5}}, "budget.labels must be an integer or null; got 1.5"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_is_allowed(config, message):
    with pytest.raises(ValueError) as refusal:
        cell_from_dict(config)
    assert str(refusal.value) == message


def test_an_integer_is_a_number_and_null_is_allowed_where_it_is_the_default():
    cell = cell_from_dict({"optim": {"lr": 1, "clip": None, "pretrain_lr": None}, "budget": {"labels": None}})
    assert cell.optim.lr == 1 and cell.optim.clip is None


def test_config_round_trip(tiny):
    cell = tiny(regime="finetune", seed=2, model={"mixer_kwargs": {"r_min": 0.5}})
    assert cell_from_dict(cell.to_dict()) == cell


def test_configuration_needs_no_torch():
    code = "import sys, lra.config, lra.__main__; lra.config.Cell().key; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
