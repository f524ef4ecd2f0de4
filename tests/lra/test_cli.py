"""The command line as a newcomer meets it: light help, merged presets, errors of one line with exit code 2."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lra.data
from lra.__main__ import COMMANDS, main
from lra.arguments import prepare
from lra.config import cell_from_dict
from lra.presets import configs_dir, presets, read, read_sweep


def refused(capsys, *argv: str) -> str:
    """Runs `lra` with bad arguments: exit code 2, nothing but a short message."""
    try:
        code = main(list(argv))
    except SystemExit as stop:  # raised by the parser
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and "Traceback" not in captured.err and len(captured.err.splitlines()) <= 3, captured.err
    return captured.err


def test_help_lists_the_commands_and_imports_nothing_heavy():
    code = (
        "import sys, lra.__main__ as m\n"
        "try: m.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([x for x in ('torch', 'lightning', 'datasets', 'numpy', 'rich', 'matplotlib') if x in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[]")
    assert all(name in run.stdout for name in COMMANDS)


def test_version(capsys):
    import linrnn

    assert main(["--version"]) == 0 and linrnn.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_explains_its_options(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "default" in out
    if command == "run":
        assert "Peak learning rate of classification" in out and "Width of the residual stream" in out


def test_prepare_merges_files_and_normalises_flags(tiny_yaml, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("optim: {lr: 0.5}\nmodel: {mixer: attention}\n")
    words = [
        "sweep",
        tiny_yaml,
        "--dry-run",
        "--seeds",
        "0,1",
        "--config",
        str(other),
        "--optim.lr=0.25",
        "--jobs",
        "2",
    ]
    [[command, config, *flags]] = prepare(words)
    assert command == "sweep"
    merged = json.loads(config.removeprefix("--config="))
    assert merged["optim"] == {"batch_size": 8, "lr": 0.5}
    assert merged["model"] == {"d_model": 16, "n_layers": 1, "dropout": 0.1, "mixer": "attention"}
    assert flags == ["--dry_run=true", "--seeds=[0,1]", "--optim.lr=0.25", "--jobs=2"]
    assert prepare(["report", "somewhere"]) == [["report", "--runs_dir=somewhere"]]


def merged(line: list[str]) -> dict:
    return json.loads(line[1].removeprefix("--config="))


def test_presets_that_name_a_task_multiply_in_a_sweep(tiny_yaml, tmp_path):
    """All other files hold for every task; `--config` never multiplies; elsewhere the later task replaces."""
    wide = tmp_path / "wide.yaml"
    wide.write_text("model: {d_model: 32}\n")
    first, second = map(merged, prepare(["sweep", "masked", tiny_yaml, str(wide), "listops_quick"]))
    assert first["task"]["n_train"] == 60 and second["task"]["n_train"] == 30000
    assert first["model"] == {"bidirectional": True, "d_model": 32, "n_layers": 1, "dropout": 0.1}
    assert second["model"]["d_model"] == 32 and second["model"]["n_layers"] == 2
    [both] = prepare(["sweep", tiny_yaml, "--config", "listops_quick"])
    assert merged(both)["task"]["n_train"] == 30000
    assert len(prepare(["run", tiny_yaml, "listops_quick"])) == 1


def test_a_sweep_preset_is_presets_and_options_that_flags_override(tiny_yaml, tmp_path):
    sweep = tmp_path / "mine.yaml"
    section = {"presets": [tiny_yaml, "listops_quick"], "mixers": ["lru"], "seeds": [0, 1], "choose": "lr"}
    sweep.write_text(yaml.safe_dump({"sweep": section, "optim": {"lr": 0.5}}))
    for words in (["sweep", str(sweep)], ["sweep", "--preset", str(sweep)]):
        lines = prepare([*words, "--seeds", "3"])
        assert [merged(line)["task"]["n_train"] for line in lines] == [60, 30000]
        for line in lines:
            assert merged(line)["optim"]["lr"] == 0.5
            assert {'--mixers=["lru"]', "--seeds=[0, 1]", "--choose=lr"} == set(line[2:5]) and line[-1] == "--seeds=[3]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sweep: {mixerz: [lru]}", "unknown key 'sweep.mixerz'; allowed: sweep.presets"),
        ("sweep: [lru]", "sweep must be a mapping"),
        ("sweep: {presets: listops}", "sweep.presets must be a list of presets"),
        ("sweep: {presets: [gpu-short]}", "lists another sweep"),
    ],
)
def test_bad_sweep_presets_are_refused(tmp_path, capsys, text, expected):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert expected in refused(capsys, "sweep", str(path))


@pytest.mark.parametrize("name", presets("sweep"))
def test_the_sweeps_of_the_library_are_plans(name, capsys, tmp_path):
    assert main(["sweep", name, "--dry-run", "--runs-dir", str(tmp_path), "--match", "false"]) == 0
    assert "0 of them done" in capsys.readouterr().out


def test_checkpoints_of_the_short_gpu_sweep_stay_small():
    """A slice's checkpoints are carried between machines: weights and AdamW's two moments, 16 MiB at most."""
    from lra.networks import sizes

    _, configs = read_sweep([("gpu-short", True)])
    assert len(configs) == 3
    for config in configs:
        cell = cell_from_dict(config)
        assert 3 * 4 * sizes(cell.model, cell.build_task())["total"] * 1.1 < 16 * 2**20, "10 % for matched widths"


def test_one_sweep_of_two_tasks(tiny_yaml, cache_dir, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    tiny = yaml.safe_load(Path(tiny_yaml).read_text())
    other.write_text(yaml.safe_dump({**tiny, "task": {**tiny["task"], "max_depth": 4}}))
    argv = ["sweep", tiny_yaml, str(other), "--mixers", "lru", "--regimes", "scratch", "--seeds", "0", "--cache-dir"]
    assert main([*argv, cache_dir, "--runs-dir", str(tmp_path / "runs"), "--accelerator", "cpu"]) == 0
    assert "2 cells, 0 of them done" in capsys.readouterr().out
    depths = [json.loads(p.read_text())["config"]["task"]["max_depth"] for p in tmp_path.rglob("result.json")]
    assert sorted(depths) == [3, 4]


def test_a_sweep_out_of_time_says_so_and_exits_with_75(tiny_yaml, cache_dir, tmp_path, capsys):
    argv = ["sweep", tiny_yaml, "--minutes", "1e-9", "--runs-dir", str(tmp_path), "--cache-dir", cache_dir]
    assert main(argv) == 75
    error = capsys.readouterr().err
    assert "unfinished" in error and "0 of 18 cells are done" in error and f"lra sweep {tiny_yaml}" in error


def test_flags_override_files_wherever_they_stand(tiny_yaml, monkeypatch):
    seen = []
    monkeypatch.setattr("lra.cell.run_cell", lambda cell, *a, **k: seen.append(cell))
    monkeypatch.setattr("lra.listing.show_result", lambda *a: None)
    main(["run", "--optim.lr", "0.25", tiny_yaml, "masked", "--task.max_depth", "4", "--seed=7"])
    main(["run", tiny_yaml, "--model.mixer_kwargs", "{r_min: 0.5}", "--config", "causal_scratch"])
    assert seen[0].optim.lr == 0.25 and seen[0].optim.batch_size == 8 and seen[0].seed == 7
    assert seen[0].task["max_depth"] == 4 and seen[0].task["n_train"] == 60
    assert seen[0].regime == "finetune" and seen[0].objective == "masked"
    assert seen[1].model.mixer_kwargs == {"r_min": 0.5} and not seen[1].model.bidirectional


def test_printed_configuration_runs_again(tiny_yaml, tmp_path, monkeypatch, capsys):
    argv = [tiny_yaml, "masked", "--seed", "7", "--runs-dir", "elsewhere"]
    with pytest.raises(SystemExit) as stop:
        main(["run", *argv, "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert stop.value.code == 0 and yaml.safe_load(printed.read_text())["runs_dir"] == "elsewhere"
    seen = []
    monkeypatch.setattr("lra.cell.run_cell", lambda cell, runs_dir, **k: seen.append((cell.key, runs_dir)))
    monkeypatch.setattr("lra.listing.show_result", lambda *a: None)
    main(["run", str(printed)])
    main(["run", *argv])
    assert seen[0] == seen[1]
    assert main(["params", str(printed)]) == 0, "what a subcommand does not take is left aside"


def test_no_two_presets_share_a_name():
    files = [path.stem for path in configs_dir().rglob("*.yaml")]
    assert len(set(files)) == len(files)


def test_every_preset_is_a_valid_part_of_a_cell():
    from lra.config import cell_from_dict

    names = presets()
    assert {"listops", "listops_quick", "lru", "attention", "scratch", "masked", "causal"} <= set(names)
    for name, path in names.items():
        assert path.read_text().startswith("# lra "), f"{name}: a preset opens with the command that runs it"
        if path.parent.name == "sweep":
            continue
        cell_from_dict({"task": {"name": "listops"}, **read([name])}).plan()


def test_another_task_replaces_the_task_whole(tmp_path, tiny_yaml):
    (tmp_path / "b.yaml").write_text("task: {name: other, length: 3}\n")
    assert read([tiny_yaml, str(tmp_path / "b.yaml")])["task"] == {"name": "other", "length": 3}
    (tmp_path / "c.yaml").write_text("task: {name: listops, seed: 3}\n")
    merged = read([tiny_yaml, str(tmp_path / "c.yaml")])["task"]
    assert merged["seed"] == 3 and merged["n_train"] == 60


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["runn"], ["runn", "run"]),
        (["run", "listopz"], ["unknown preset 'listopz'", "allowed: listops"]),
        (["run", "no/such.yaml"], ["no configuration file 'no/such.yaml'"]),
        (["run", "--task.name", "listopz"], ["unknown task 'listopz'", "listops"]),
        (["run", "--task.depth", "3"], ["unknown option 'depth'", "max_depth"]),
        (["run", "--task.n_train", "lots"], ["n_train", "lots"]),
        (["run", "listops_quick", "--model.mixer", "lstm"], ["unknown model.mixer 'lstm'", "attention, lru"]),
        (["run", "--optim.lrr", "3"], ["optim.lrr", "--optim.lr, --optim.pretrain_lr"]),
        (["run", "--lr", "3"], ["--lr", "allowed: --optim.lr\n"]),
        (["run", "--sed", "3"], ["--sed", "--seed"]),
        (["data", "--forse"], ["--forse", "--force"]),
        (["run", "--optimm.lr", "3"], ["optimm.lr"]),
        (["run", "--optim.lr", "fast"], ["--optim.lr: expected float; got fast"]),
        (["run", "--optim.clip", "no"], ["--optim.clip: expected float or null; got no"]),
        (["quick", "--steps", "x"], ["--steps: expected int or null; got x"]),
        (["run", "--optim.lr", "-1"], ["optim.lr must be positive"]),
        (["run", "--regime", "warm"], ["scratch", "pretrain", "finetune", "warm"]),
        (["run", "--objective", "causal"], ["model.bidirectional"]),
        (["run", "--threads", "0"], ["threads must be at least 1"]),
        (["run", "--devices", "0"], ["devices must be at least 1; got 0"]),
        (["run", "gpu-short"], ["'gpu-short' is a sweep of several runs: lra sweep gpu-short"]),
        (["run", "listops_quick", "--compute.precision", "64"], ["compute.precision", "bf16", "64"]),
        (["sweep", "listops_quick", "--mixers", "lru,gru"], ["gru", "attention"]),
        (["sweep", "listops_quick", "--shares", "0,1.5"], ["pretrain_share", "1.5"]),
        (["sweep", "listops_quick", "--scales", "2"], ["budget.data", "2"]),
        (["sweep", "listops_quick", "--shares", "0.4", "--regimes", "scratch"], ["regimes or shares, not both"]),
        (["sweep", "listops_quick", "--launcher", "slrum"], ["launcher", "slurm", "slrum"]),
        (["sweep", "listops_quick", "--launcher", "slurm", "--minutes", "9"], ["--slurm.time"]),
        (["sweep", "listops_quick", "--slurm.gpus", "-1"], ["slurm.gpus must be at least 0"]),
        (["params", "listops_quick", "--mixers", "gru"], ["gru", "attention"]),
        (["sweep", "listops_quick", "--seeds", ""], ["seeds"]),
        (["report", "a", "b"], ["report takes one folder", "'b'"]),
        (["report", "no_such_folder"], ["no folder 'no_such_folder'"]),
        (["quick", "--steps", "1"], ["steps must be at least 2"]),
    ],
)
def test_bad_input_is_named_with_what_is_allowed(argv, expected, capsys):
    error = refused(capsys, *argv)
    assert all(part in error for part in expected), error


def test_bad_keys_in_a_file_name_the_file(tmp_path, capsys):
    for text, expected in [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; allowed: optim.lr"),
        ("modle: {}", "unknown key 'modle'; allowed: task"),
        ("- a list", "must hold a mapping"),
        ("a: [", "is not YAML"),
        ("optim: 3", "optim must be a mapping of keys; got 3"),
        ("optim: {lr: -1}", "optim.lr must be positive"),
        ('seed: "x"', "seed must be an integer; got 'x'"),
        ("seed: true", "seed must be an integer; got True"),
        ('model: {d_model: "64"}', "model.d_model must be an integer; got '64'"),
        ("optim: {lr: 1e-3}", "optim.lr must be a number such as 0.001; got '1e-3'"),
        ("task: 3", "task must be a mapping with the key `name` (`lra tasks` lists the names); got 3"),
    ]:
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        error = refused(capsys, "run", str(path))
        assert "bad.yaml" in error and expected in error, error


def test_a_picture_of_what_has_none_is_refused(tiny_yaml, cache_dir, capsys):
    error = refused(capsys, "data", tiny_yaml, "--cache-dir", cache_dir, "--picture", "p.png")
    assert "task 'listops' has no picture" in error


def test_a_corrupted_cache_is_named_with_the_cure(tiny_yaml, tmp_path, capsys):
    cache = tmp_path / "cache"
    assert main(["data", tiny_yaml, "--cache-dir", str(cache)]) == 0
    assert "majority" in capsys.readouterr().out
    arrow = next(cache.rglob("train/*.arrow"))
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[:-100] + bytes(100))
    argv = ["run", tiny_yaml, "--cache-dir", str(cache), "--runs-dir", str(tmp_path / "runs")]
    error = refused(capsys, *argv)
    assert str(arrow) in error and "--force" in error
    assert main(["data", tiny_yaml, "--cache-dir", str(cache), "--force"]) == 0
    assert arrow.read_bytes() == whole
    shutil.rmtree(tmp_path / "runs")


def half_written(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if "tmp" in path.relative_to(folder).as_posix()]


@pytest.mark.parametrize("name", ["result.json", "last.ckpt", "config.yaml", "dataset_info.json"])
def test_a_full_disk_is_named_and_leaves_nothing_half_written(tiny_yaml, tmp_path, capsys, monkeypatch, name):
    """Whatever is written last: the files of a cell by renaming, those of a data set in a folder that is renamed."""
    argv = ["run", tiny_yaml, "--accelerator", "cpu"]
    argv += ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_replace, real_save = os.replace, lra.data._save

    def replace(source, target):
        if Path(target).name == name:
            raise full
        real_replace(source, target)

    def save(split, folder):
        real_save(split, folder)
        if (folder / name).exists():
            raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(lra.data, "_save", save)
        error = refused(capsys, *argv)
    assert "disk" in error and "is full" in error and "free some space" in error, error
    assert name == "dataset_info.json" or name in error
    assert not list((tmp_path / "runs").rglob(name)) and not half_written(tmp_path / "cache")
    assert not half_written(tmp_path / "runs")
    assert main(argv) == 0 and len(list(tmp_path.rglob("result.json"))) == 1


def test_a_foreign_checkpoint_is_refused_in_one_line(tiny_yaml, cache_dir, tmp_path, capsys):
    argv = ["run", tiny_yaml, "--cache-dir", cache_dir, "--runs-dir", str(tmp_path), "--accelerator", "cpu"]
    assert main([*argv, "--optim.lr", "0.002"]) == 0
    [theirs] = tmp_path.rglob("last.ckpt")
    assert main([*argv, "--seed", "1"]) == 0
    [ours] = [path for path in tmp_path.rglob("last.ckpt") if "seed1" in str(path)]
    shutil.copy(theirs, ours)
    (ours.parent / "result.json").unlink()
    error = refused(capsys, *argv, "--seed", "1")
    assert str(ours) in error and "another run" in error and "lr" in error and "move it away" in error


def test_a_data_folder_without_the_data_is_refused_and_leaves_no_data(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    argv = ["data", "image", "--data-dir", str(tmp_path / "data"), "--cache-dir", str(tmp_path / "cache")]
    error = refused(capsys, *argv)
    assert str(tmp_path / "data") in error and "train" in error
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 cut off")
    (tmp_path / "data" / "test.parquet").write_bytes(b"PAR1 cut off")
    assert "train.parquet" in refused(capsys, *argv)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_report_of_an_empty_or_damaged_folder(tmp_path, capsys):
    assert "no finished cell" in refused(capsys, "report", str(tmp_path))
    (tmp_path / "result.json").write_text("{")
    assert "result.json is damaged" in refused(capsys, "report", str(tmp_path))


def test_from_data_to_report(tiny_yaml, cache_dir, tmp_path, capsys):
    """The commands of the README, in their order, on the smallest task."""
    runs = str(tmp_path / "runs")
    common = ["--cache-dir", cache_dir, "--runs-dir", runs, "--accelerator", "cpu"]
    assert main(["tasks", "--cache-dir", cache_dir]) == 0
    out = capsys.readouterr().out
    assert "listops" in out and "96,000 / 2,000 / 2,000" in out and "listops_quick" in out
    assert main(["params", tiny_yaml, "--mixers", "lru,attention,nystrom", "--both"]) == 0
    out = capsys.readouterr().out
    assert "both directions, matched to lru" in out and "causal, matched to lru" in out
    assert "nystrom: model.bidirectional" in out, "what fits no width is said below its table"
    for extra in (["--dry-run"], []):
        assert main(["sweep", tiny_yaml, "--seeds", "0,1", "--mixers", "lru", *extra, *common]) == 0
        out = capsys.readouterr().out
        assert "6 cells, 0 of them done" in out
        assert len(list(Path(runs).rglob("result.json"))) == (0 if extra else 6)
    assert main(["run", tiny_yaml, "masked", *common]) == 0
    assert "after pretraining for 8 steps" in capsys.readouterr().out
    assert main(["report", runs]) == 0
    out = capsys.readouterr().out
    assert "masked + finetune" in out and "(root operator)" in out and (tmp_path / "runs" / "report.png").exists()


def test_the_written_config_runs_the_same_cell(tiny_yaml, cache_dir, tmp_path, capsys):
    argv = ["--cache-dir", cache_dir, "--runs-dir", str(tmp_path), "--accelerator", "cpu"]
    main(["run", tiny_yaml, "--seed", "5", *argv])
    config = next(tmp_path.rglob("config.yaml"))
    assert yaml.safe_load(config.read_text())["seed"] == 5
    capsys.readouterr()
    main(["run", str(config), *argv])
    assert "starting" not in capsys.readouterr().out, "found as computed"
