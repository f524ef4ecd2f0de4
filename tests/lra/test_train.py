"""How a cell is computed: precision, compilation, where the data lie, what a full disk leaves behind."""

import errno
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lra import train
from lra.batches import BatchStream
from lra.cell import run_cell, scorer
from lra.checkpoints import BEST, LAST, check_resumable, keep_weights, notes
from lra.config import Compute
from lra.data import load
from lra.distributed import Team
from lra.evaluate import WINDOWS, accuracies
from lra.examples import Examples, resident
from lra.files import write_whole
from lra.networks import build_net
from lra.train import Recorder, fit

from .runs import assert_same_bits


@pytest.fixture
def run(cache_dir, tmp_path):
    def go(cell, name="runs", **options):
        options = {"accelerator": "cpu", "say": lambda line: None, **options}
        return run_cell(cell, tmp_path / name, cache_dir=cache_dir, **options), tmp_path / name / cell.key

    go.runs = tmp_path / "runs"
    return go


def make(cell, cache_dir, device="cpu"):
    """A cell's network, and the rows it trains on."""
    task = cell.build_task()
    denoise = cell.denoising if cell.regime == "pretrain" else None
    net = build_net(cell.model, task, denoise=denoise, seed=0).computed(cell.compute).to(device)
    return net, resident(Examples.from_dataset(load(task, cache_dir)["train"], task), torch.device(device))


def curve(result, name="val_loss"):
    return [row[name] for row in result["curve"]]


def test_loading_is_timed(tiny, run):
    result, _ = run(tiny())
    assert 0 < result["loader_seconds"] < result["seconds"] and result["processes"] == 1


@pytest.mark.parametrize(("name", "failing"), [(LAST, 2), (BEST, 1)])
def test_a_full_disk_leaves_the_files_of_before(tiny, run, monkeypatch, name, failing):
    """One line of error; what was written is whole, nothing else is left, and the same call goes on from there."""
    cell = tiny(regime="pretrain", budget={"pretrain_share": 0.9, "evaluations": 3})  # 18 steps, scored every 6
    real, written = Path.write_bytes, []

    def half(path, data):
        if name in path.name:
            written.append(path)
            if len(written) == failing:
                real(path, bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(OSError, match=f"No space left on device.*{name}") as error:
            run(cell, "cut")
    assert "\n" not in str(error.value) and error.value.errno == errno.ENOSPC
    _, whole = run(cell, "whole")
    cut = Path(error.value.filename).parent
    assert not list(cut.glob(".*.tmp")) and [p.name for p in cut.glob(f"{BEST}*")] == [f"{BEST}.6"] * (name == LAST)
    assert torch.load(cut / LAST, weights_only=True)["global_step"] == 5
    run(cell, "cut")
    assert_same_bits(cut, whole)


def test_the_weights_are_those_of_the_checkpoint(tiny, run, monkeypatch):
    """A stretch that a death undoes leaves nothing: the run that goes on otherwise has weights of its own steps."""
    cell = tiny(optim={"lr": 0.03}, model={"dropout": 0.5}, budget={"evaluations": 10, "checkpoint_every": 8})

    class Death(BaseException):
        pass

    def dying(self, trainer, *rest):
        real(self, trainer, *rest)
        if trainer.global_step == 15:
            raise Death

    real = Recorder.on_train_batch_end
    improving = iter(range(100))
    measured = train.evaluate

    def better(*args):
        return {**measured(*args), "accuracy": next(improving) / 100}

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(train, "evaluate", better)
        patch.setattr(Recorder, "on_train_batch_end", dying)
        run(cell)
    folder = next(Path(folder) for folder in run.runs.rglob("lru-scratch/*"))
    assert sorted(p.name for p in folder.glob(f"{BEST}*")) == [BEST, f"{BEST}.14"]
    kept = (folder / BEST).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *args: {**measured(*args), "accuracy": 0.0})
        result, folder = run(cell)
    assert result["best_step"] == 8 and (folder / BEST).read_bytes() == kept
    assert [p.name for p in folder.glob(f"{BEST}*")] == [BEST]


def test_weights_are_kept_where_a_death_fell_between_checkpoint_and_rename(tmp_path):
    (tmp_path / BEST).write_text("before")
    (tmp_path / f"{BEST}.6").write_text("of the checkpoint")
    (tmp_path / f"{BEST}.9").write_text("of steps that were lost")
    keep_weights(tmp_path, {"step": 6})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(BEST, "of the checkpoint")]


def test_a_score_that_is_no_number_is_beaten_by_any(tiny, run, monkeypatch):
    scores = iter([math.nan, 0.25, math.nan, 0.125])
    measured = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *args: {**measured(*args), "accuracy": next(scores)})
    result, _ = run(tiny())
    assert result["best_step"] == 10 and result["val"]["accuracy"] == 0.25


def test_another_set_up_is_noticed(tmp_path):
    ours = notes({"seed": 0}, None, 2, "cpu")
    torch.save({**ours, "made": {**ours["made"], "processes": 1, "device": "gpu"}}, tmp_path / LAST)
    with pytest.warns(UserWarning, match=r"processes is 1 there, 2 here; device is 'gpu' there, 'cpu' here\)"):
        check_resumable(tmp_path / LAST, ours)


def test_files_are_whole_or_as_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="file") as error:
        write_whole(path, lambda temporary: (temporary.write_text("half"), Path("/dev/full").write_text("rest")))
    assert error.value.errno == errno.ENOSPC and path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_batch_of_few_rows_that_does_not_divide_is_refused(tiny, cache_dir, tmp_path):
    cell = tiny(optim={"batch_size": 90})  # of 60 rows
    net, rows = make(cell, cache_dir)
    with pytest.raises(ValueError, match=r"optim\.batch_size 60 does not divide by the 9 processes"):
        fit(net, scorer(cell, cell.build_task()), cell, rows, rows, tmp_path, accelerator="cpu", team=Team(world=9))


def dtypes(net: nn.Module) -> list[torch.dtype]:
    """Collects the types that the linear maps of the blocks put out from now on."""
    seen: list[torch.dtype] = []
    for module in net.body.backbone.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    return seen


@pytest.mark.parametrize("regime", ["scratch", "pretrain"])
def test_bf16_computes_products_so_in_training_and_evaluation(tiny, cache_dir, tmp_path, regime):
    cell = tiny(regime=regime, compute={"precision": "bf16"}, budget={"steps": 4, "pretrain_share": 0.5})
    net, rows = make(cell, cache_dir)
    seen = dtypes(net)
    fit(net, scorer(cell, cell.build_task()), cell, rows, rows, tmp_path, accelerator="cpu")
    accuracies(net, rows)
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_bf16_ends_near_float32(tiny, run):
    exact, _ = run(tiny(model={"dropout": 0.0}))
    near, _ = run(tiny(model={"dropout": 0.0}, compute={"precision": "bf16"}))
    assert exact["key"] != near["key"] and curve(exact) != curve(near)
    np.testing.assert_allclose(curve(near), curve(exact), rtol=2e-2)  # 8 bits: 2^-8 a product, of some in a row


def compiled(monkeypatch, backend: str) -> list[tuple[int, ...]]:
    """Compiles by `backend`; collects the lengths that the compiled part meets."""
    lengths: list[int] = []

    def compile_(module, **options):
        eager = module.forward
        module._compiled_call_impl = torch.compile(
            lambda x, **rest: (lengths.append(x.shape[1]), eager(x, **rest))[1], backend=backend, **options
        )

    monkeypatch.setattr(nn.Module, "compile", compile_)
    return lengths


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own, which it hides elsewhere
def test_a_compiled_network_has_the_same_curve_and_names(tiny, run, monkeypatch):
    """Its sequences are padded to few lengths, and nobody sees it in the result."""
    change = {
        "model": {"dropout": 0.0},
        "task": {"min_length": 4, "max_tree_length": 300, "max_args": 8},
        "budget": {"steps": 6, "evaluations": 2},
    }
    plain, folder = run(tiny(**change), "plain")
    lengths = compiled(monkeypatch, "eager")
    same, other = run(tiny(**change, compute={"compile": True}), "compiled")
    np.testing.assert_allclose(curve(same), curve(plain), rtol=1e-5)
    assert same["test"]["accuracy"] == plain["test"]["accuracy"] and lengths
    assert load_file(folder / BEST).keys() == load_file(other / BEST).keys()
    longest = {part["max"] for name, part in plain["data"].items() if name in ("train", "val", "test")}
    assert all(length % 128 == 0 or length in {*longest, *WINDOWS} for length in lengths)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.parametrize("mixer", ["lru", "attention", "linear_attention"])
def test_inductor_has_the_same_curve(tiny, run, mixer):
    change = {"model": {"dropout": 0.0, "mixer": mixer}}
    plain, _ = run(tiny(**change))
    same, _ = run(tiny(**change, compute={"compile": True}))
    np.testing.assert_allclose(curve(same), curve(plain), rtol=1e-4)


def test_data_stay_where_they_are_without_a_gpu(tiny, cache_dir):
    _, rows = make(tiny(), cache_dir)
    assert resident(rows, torch.device("cpu")) is rows


@pytest.mark.gpu
def test_data_go_to_the_gpu_if_they_take_a_quarter_of_it(tiny, cache_dir, monkeypatch):
    _, rows = make(tiny(), cache_dir)
    gpu = torch.device("cuda")
    for free, device in ((4 * rows.nbytes, "cuda"), (4 * rows.nbytes - 4, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a, free=free: (free, free))
        assert resident(rows, gpu).device.type == device


TASKS = {
    "tokens": {"name": "listops", "n_train": 40, "n_val": 10, "n_test": 10, "max_tree_length": 40, "min_length": 4},
    "levels": {"name": "digits", "n_train": 40, "n_val": 10, "n_test": 10},
    "grays": {"name": "digits", "n_train": 40, "n_val": 10, "n_test": 10, "pretrain_loss": "ce"},
}


@pytest.mark.gpu
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("regime", "bidirectional"), [("scratch", True), ("pretrain", True), ("pretrain", False)])
def test_a_step_on_a_gpu_waits_for_nothing(tiny, cache_dir, task, regime, bidirectional):
    """Every objective, from the batch to the optimiser, in bf16, with the data there and with them on the CPU."""
    cell = replace(tiny(model={"bidirectional": bidirectional}, compute={"precision": "bf16"}), regime=regime)
    cell = replace(cell, task=TASKS[task])
    net, rows = make(cell, cache_dir, "cuda")
    score, gpu = scorer(cell, cell.build_task()), torch.device("cuda")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    sums = torch.zeros(8, dtype=torch.float64, device=gpu)

    def step(stream, t):
        batch = next(iter(stream)).to(gpu)
        optimizer.zero_grad()
        scored = score(net, batch, torch.Generator().manual_seed(t))
        scored.mean.backward()
        optimizer.step()
        sums.add_(scored.sums())

    streams = [BatchStream(rows, 8, 0), BatchStream(rows.to(torch.device("cpu")), 8, 0)]
    for stream in streams:
        step(stream, 0)  # compiles kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for stream in streams:
            step(stream, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sums.isfinite().all() and sums[1] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("compute", [{}, {"precision": "bf16"}, {"precision": "bf16", "compile": True}])
def test_a_gpu_ends_near_the_cpu(tiny, run, compute):
    cell = tiny(regime="finetune", model={"dropout": 0.0}, compute=compute)
    here, _ = run(replace(cell, compute=Compute()), "cpu")
    there, _ = run(cell, "gpu", accelerator="gpu")
    assert there["device"] != "cpu"
    np.testing.assert_allclose(curve(there), curve(here), rtol=2e-2 if compute else 1e-3)
