"""Cells: what names them, what they may spend, what they refuse."""

import dataclasses
import subprocess
import sys

import pytest

from lra.config import Budget, Cell, Model, Optim, cell_from_dict


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


def test_config_round_trip(tiny):
    cell = tiny(regime="finetune", seed=2, model={"mixer_kwargs": {"r_min": 0.5}})
    assert cell_from_dict(cell.to_dict()) == cell


def test_configuration_needs_no_torch():
    code = "import sys, lra.config, lra.__main__; lra.config.Cell().key; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
