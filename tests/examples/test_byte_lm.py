"""examples/byte_lm.py: what it compares is comparable, and the whole of it runs, in seconds."""

import json
import re
import runpy
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch

import linrnn


@pytest.fixture(scope="module")
def trained(examples, tmp_path_factory):
    """The folder of a run of the shortest preset on the default text: every mixer, two windows, one seed."""
    import byte_lm

    folder = tmp_path_factory.mktemp("byte_lm")
    byte_lm.main(["train", "--preset", "test", "--seeds", "1", "--out", str(folder), "--no-samples"])
    return folder


def small(**changes):
    """Settings of three steps an evaluation."""
    from byte_language_model.settings import Settings

    settings = Settings(
        d_model=16,
        n_layers=1,
        lengths=(8, 16),
        batch_bytes=32,
        cell_bytes=960,
        rates=(1e-2,),
        trial_bytes=320,
        test_bytes=64,
        validation_bytes=64,
    )
    return replace(settings, **changes)


def text(size: int = 4000) -> bytes:
    generator = torch.Generator().manual_seed(7)
    return bytes(torch.randint(97, 123, (size,), generator=generator).tolist())


def test_every_mixer_learns_more_than_frequencies_of_bytes(trained):
    from byte_language_model import report
    from byte_language_model.mixers import MIXERS

    results = report.read(trained)
    assert {(r["cell"]["mixer"], r["cell"]["length"]) for r in results} == {(m, n) for m in MIXERS for n in (16, 64)}
    for result in results:
        assert result["test"] < result["unigram"], result["cell"]
        assert result["curve"][-1][2] < result["curve"][0][2], result["cell"]
        assert len(result["by_position"]) == result["cell"]["length"]
        assert sum(result["by_position"]) / result["cell"]["length"] == pytest.approx(result["test"], rel=1e-12)


def test_the_report_shows_every_mixer_and_says_what_ran(trained, tmp_path):
    import byte_lm
    from byte_language_model.mixers import LABELS

    byte_lm.main(["report", "--out", str(trained), "--write", str(tmp_path / "sub" / "table")])
    table = (tmp_path / "sub" / "table.md").read_text()
    for label in LABELS.values():
        assert table.count(f"\n| {label} |") == 3  # the losses, and those by position in each of two windows
    assert table.count("\n- Seen at window ") == 2 and "](table.png)" in table
    assert linrnn.__version__ in table and "fingerprint" in table and "d_model 32" in table
    assert "`python examples/byte_lm.py train --preset test --seeds 1`" in table and "not whole" not in table
    assert re.search(r"; \d+\.\d% of the long lines of test stand in train\n", table)
    assert (tmp_path / "sub" / "table.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(trained, monkeypatch):
    import byte_lm
    from byte_language_model import training

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "train", refuse)
    command = ["train", "--preset", "test", "--out", str(trained), "--no-samples"]
    byte_lm.main([*command, "--seeds", "1"])
    with pytest.raises(AssertionError, match="trained again"):
        byte_lm.main([*command, "--seeds", "2"])
    with pytest.raises(ValueError, match="belongs to another cell, settings; take another --out"):
        byte_lm.main([*command, "--seeds", "1", "--cell-bytes", "51200"])


def test_samples_continue_the_prompt(trained, capsys):
    import byte_lm

    byte_lm.main(["sample", "--out", str(trained), "--mixer", "lru", "--prompt", "import ", "--bytes", "9"])
    assert capsys.readouterr().out.startswith("--- LRU\nimport ")
    with pytest.raises(ValueError, match=r"--mixer: expected one of attention, .*got 'nosuch'"):
        byte_lm.main(["sample", "--out", str(trained), "--mixer", "nosuch"])
    with pytest.raises(ValueError, match="--prompt: expected at least one byte"):
        byte_lm.main(["sample", "--out", str(trained), "--prompt", ""])


def test_an_interrupted_cell_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    from byte_language_model import corpus, training

    parts = corpus.split({"a": text()})
    settings, cell = small(), training.Cell("lru", 8, 0, 1e-2, 960)
    whole = training.run(cell, settings, parts, tmp_path / "whole.json", checkpoint_seconds=0.0)

    batch, steps = corpus.training_batch, []

    def interrupted(text, seed, step, *sizes):
        steps.append(step)
        if len(steps) == 17:  # between two points of the curve
            raise KeyboardInterrupt
        return batch(text, seed, step, *sizes)

    monkeypatch.setattr(corpus, "training_batch", interrupted)
    path = tmp_path / "cut.json"
    with pytest.raises(KeyboardInterrupt):
        training.run(cell, settings, parts, path, checkpoint_seconds=0.0)
    assert not path.exists()
    with pytest.raises(ValueError, match=r"cut\.ckpt: belongs to another settings"):
        training.run(cell, small(clip=2.0), parts, path)
    cut = training.run(cell, settings, parts, path, checkpoint_seconds=0.0)
    assert steps == [*range(17), *range(16, 30)]
    for result in (whole, cut):
        result.pop("seconds")
    assert cut == whole
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "cut.json", "whole", "whole.json"]


@pytest.mark.parametrize("preset", ["cpu", "gpu", "test"], ids="preset_{}".format)  # "gpu" alone is a mark
def test_models_have_the_same_number_of_parameters(preset):
    import byte_lm
    from byte_language_model import mixers

    settings = byte_lm.PRESETS[preset]
    with torch.device("meta"):
        models = {name: mixers.build(name, settings.d_model, settings.n_layers) for name in mixers.MIXERS}
    counts = {name: linrnn.models.count_params(model) for name, model in models.items()}
    assert all(abs(count / counts["attention"] - 1) <= 0.02 for count in counts.values()), counts
    blocks = {name: len(model.backbone.blocks) for name, model in models.items()}
    assert blocks.pop("gau") == 2 * settings.n_layers and set(blocks.values()) == {settings.n_layers}


def test_held_out_files_are_held_out():
    from byte_language_model import corpus

    contents = {f"{i}.txt": f"file {i} ".encode() * 9 for i in range(300)}
    parts = corpus.split(contents)
    for part in corpus.PARTS:
        whole = b"".join(contents[name] + b"\0" for name in parts.names[part])
        assert bytes(getattr(parts, part).tolist()) == whole
    names = [name for part in corpus.PARTS for name in parts.names[part]]
    assert sorted(names) == sorted(contents)
    assert 4 < len(parts.names["test"]) < 35 and 4 < len(parts.names["validation"]) < 35

    more = corpus.split({**contents, **{f"{i}.md": f"{i}".encode() for i in range(100)}})
    assert all(set(parts.names[part]) <= set(more.names[part]) for part in corpus.PARTS)
    assert more.fingerprint != parts.fingerprint == corpus.split(dict(reversed(contents.items()))).fingerprint


def test_folders_of_tests_are_left_out_of_the_standard_library_alone(tmp_path):
    from byte_language_model import corpus

    for name in ("a.txt", "copy.txt", "tests/b.txt", "__pycache__/c.pyc", ".d/e.txt", ".f.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"a" if name == "copy.txt" else name[:1].encode())
    assert corpus.read([tmp_path]) == {"a.txt": b"a", "tests/b.txt": b"t"}
    assert corpus.read([tmp_path], without={"tests"}) == {"a.txt": b"a"}
    assert not [name for name in corpus.standard_library() if "test" in name.split("/")[:-1]]


def test_lines_of_test_that_stand_in_training_are_counted():
    from byte_language_model import corpus

    long, other = b"a line of more than 25 characters", b"another, which is not in training"
    train, test = (
        corpus.joined(documents)
        for documents in ([b"x = 1\n" + long, other[:-1]], [b"\t" + long + b"\r\n" + other, b"x = 1", long])
    )
    parts = corpus.Corpus(train, test, test, {}, "")
    assert parts.repeated == 2 * len(long) / (2 * len(long) + len(other))
    assert corpus.Corpus(train, test, corpus.joined([b"short"]), {}, "").repeated == 0


def test_one_file_is_cut_into_pieces():
    from byte_language_model import corpus

    contents = {"a.txt": text()}
    parts = corpus.split(contents)
    pieces = {part: parts.names[part] for part in corpus.PARTS}
    assert sum(map(len, pieces.values())) == 200 and all(pieces.values())
    assert sum(getattr(parts, part).numel() for part in corpus.PARTS) == 4000 + 200


def test_windows_of_every_length_predict_the_same_bytes():
    from byte_language_model import corpus

    data = torch.arange(200).to(torch.uint8)
    chunks = corpus.training_batch(data, seed=0, step=3, chunks=5, length=16)
    assert torch.equal(chunks, corpus.training_batch(data, seed=0, step=3, chunks=5, length=16))
    assert not torch.equal(chunks, corpus.training_batch(data, seed=1, step=3, chunks=5, length=16))
    assert not torch.equal(chunks, corpus.training_batch(data, seed=0, step=4, chunks=5, length=16))
    for length in (4, 16):
        inputs, targets = corpus.windows(chunks, length)
        assert inputs.shape == targets.shape == (80 // length, length)
        assert torch.equal(targets, inputs + 1)  # of numbers in order
        assert torch.equal(targets.flatten(), chunks[:, 1:].flatten())

    held = corpus.held_out_chunks(data, 100, 16)
    assert held.shape == (6, 17)
    assert held[:, 1:].unique().numel() == 96, "no byte is predicted twice"
    assert corpus.held_out_chunks(data, 10**9, 16).shape == (12, 17)
    assert corpus.held_out_chunks(data[:17], 10**9, 16).shape == (1, 17)


def test_the_curve_is_of_the_batches_between_its_points(tmp_path):
    from byte_language_model import corpus, mixers, training

    parts, settings = corpus.split({"a": text()}), small(evaluations=4)
    cell = training.Cell("slru", 8, 5, 1e-20, 320)  # ten steps that change nothing
    result = training.train(cell, settings, parts, tmp_path / "a.json")
    torch.manual_seed(5)
    model = mixers.build("slru", 16, 1)
    batches = [corpus.training_batch(parts.train, 5, step, 2, 16) for step in range(10)]
    costs = [float(training.bits(model, b, 8, 2, "cpu", nullcontext()).mean()) for b in batches]
    assert [seen for seen, _, _ in result["curve"]] == [64, 160, 256, 320]
    for (_, trained, _), some in zip(
        result["curve"], (slice(0, 2), slice(2, 5), slice(5, 8), slice(8, 10)), strict=True
    ):
        assert trained == pytest.approx(sum(costs[some]) / len(costs[some]), rel=1e-5)


def test_the_best_rate_is_chosen_and_one_that_diverges_is_not(tmp_path, capsys):
    import byte_lm

    (tmp_path / "a.txt").write_bytes(text())
    command = ["train", str(tmp_path / "a.txt"), "--preset", "test", "--mixers", "slru", "--seeds", "1", "--lengths"]
    command += ["16", "--batch-bytes", "32", "--cell-bytes", "320", "--trial-bytes", "320", "--no-samples"]
    byte_lm.main([*command, "--rates", "1e30", "1e-2", "1e-6", "--out", str(tmp_path / "one")])
    assert "the loss is not finite" in capsys.readouterr().out
    result = json.loads((tmp_path / "one" / "slru-16-seed0.json").read_text())
    assert result["cell"]["rate"] == 1e-2
    with pytest.raises(byte_lm.DivergedError, match="slru: none of the rates"):
        byte_lm.main([*command, "--rates", "1e30", "1e31", "--out", str(tmp_path / "two")])


def test_reports_compare_whole_seeds_of_one_setting(tmp_path):
    from byte_language_model import report

    def result(mixer, length, seed, d_model=16):
        return {"cell": {"mixer": mixer, "length": length, "seed": seed}, "settings": d_model, "corpus": 0}

    cells = [result(mixer, length, seed) for mixer in ("lru", "gau") for length in (8, 16) for seed in (0, 1)]
    assert report.whole_seeds(cells) == cells
    assert [r["cell"]["seed"] for r in report.whole_seeds(cells[:-1])] == [0, 0, 0, 0]
    assert report.whole_seeds(cells[:1]) == cells[:1]

    for cell in cells:
        cell["settings"] = {"lengths": [8, 16]}
    assert report.unfinished(cells, []) == []
    half = "- **seed 1 is not whole:** 3 of 4 cells are done; it is left out here"
    assert report.unfinished(cells[:-1], []) == [half]
    trials = [result("gau", 8, 0)]  # of a mixer that has no cell yet
    assert report.unfinished(cells[:1], trials) == ["- **seed 0 is not whole:** 1 of 4 cells are done"]
    with pytest.raises(FileNotFoundError, match="no results there"):
        report.read(tmp_path)
    for seed, d_model in ((0, 16), (1, 32)):
        (tmp_path / f"{seed}.json").write_text(json.dumps(result("lru", 8, seed, d_model)))
    with pytest.raises(ValueError, match="results of different settings cannot be compared"):
        report.read(tmp_path)


def test_the_ranking_marks_what_the_spread_does_not_part():
    from byte_language_model import report

    losses = {"gau": (2.0, 2.1, 2.3), "lru": (2.1, 2.2, 2.4), "slru": (2.2, 2.2, 2.5), "attention": (3.0,)}
    groups = {
        (mixer, 8): [{"cell": {"seed": seed}, "test": value} for seed, value in enumerate(values)]
        for mixer, values in losses.items()
    }
    shown = "GAU > LRU +0.100 ± 0.000 (3) > SLRU +0.067 ± 0.058 (3) ≈ attention +0.800 (1)"
    assert report.distances(groups, list(losses), 8) == shown
    groups["slru", 8][0]["test"] = 2.05
    assert " ≈ SLRU +0.017 ± 0.076 (3)" in report.distances(groups, list(losses), 8)


def test_rates_at_the_edge_of_what_was_tried_are_named():
    from byte_language_model import report

    bits = {"lru": (3.0, 2.0, 1.0), "gau": (3.0, 2.0, 2.5), "slru": (1.0, 2.0, 3.0)}
    trials = [
        {"cell": {"mixer": name, "rate": rate, "bytes": 1, "length": 8, "seed": 0}, "curve": [[1, 0.0, value]]}
        for name, values in bits.items()
        for rate, value in zip((0.1, 0.2, 0.3), values, strict=True)
    ]
    page = "\n".join(report.rates(trials, list(bits)))
    assert re.findall(r"Best at the (\w+) rate .*: (.*)\.$", page, re.M) == [("largest", "LRU"), ("smallest", "SLRU")]


@pytest.mark.parametrize("change", [{}, {"lengths": (64, 256)}, {"d_model": 96, "cell_bytes": 4_096_000}])
def test_the_command_of_a_report_gives_its_settings(change):
    import byte_lm
    from byte_language_model import settings

    wanted = replace(byte_lm.PRESETS["cpu"], **change)
    held = json.loads(json.dumps(asdict(wanted)))
    line = settings.options(held)
    assert line.startswith("--preset cpu") and len(re.findall("--", line)) == 1 + len(change)
    assert byte_lm.settings_of(byte_lm.parser().parse_args(["train", *line.split()])) == wanted
    assert settings.options({**held, "clip": 7.0}) is None


@pytest.mark.parametrize(
    ("content", "extra", "message"),
    [
        (None, [], r"nosuch.* does not exist"),
        (b"", [], r"a\.txt is empty"),
        (b"ab", [], r"too short, 2 documents leave none for"),
        (text(600), [], r"too short, \w+ holds \d+ bytes; windows of 64 need 65"),
        (text(), ["--mixers", "lru", "nosuch"], r"--mixers: expected some of attention, .*got nosuch"),
        (text(), ["--seeds", "0"], r"--seeds: expected at least 1, got 0"),
        (text(), ["--lengths", "16", "24"], r"lengths: expected divisors of the longest, >= 1, got \(16, 24\)"),
        (text(), ["--lengths", "0"], r"lengths: expected divisors"),
        (text(), ["--batch-bytes", "100"], r"batch_bytes: expected a multiple of 64, got 100"),
        (text(), ["--cell-bytes", "100"], r"cell_bytes: expected at least 2048 \(4 steps\), got 100"),
        (text(), ["--rates", "-1"], r"rates: expected learning rates > 0, got \(-1\.0,\)"),
    ],
)
def test_bad_arguments(tmp_path, content, extra, message):
    import byte_lm

    path = tmp_path / ("nosuch.txt" if content is None else "a.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        byte_lm.main(["train", str(path), "--preset", "test", "--out", str(tmp_path / "out"), *extra])
    assert not (tmp_path / "out").exists()


def test_bad_folders_and_names(tmp_path):
    from byte_language_model import corpus, mixers

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    with pytest.raises(ValueError, match=r"no file that matches '\*\.py'"):
        corpus.read([tmp_path], "*.py")
    with pytest.raises(ValueError, match=r"two files are called 'a\.txt', .*one.*two.*; rename one"):
        corpus.read([tmp_path / "one", tmp_path / "two"])
    with pytest.raises(ValueError, match=r"mixers: expected some of .*got 'nosuch'"):
        mixers.build("nosuch", 16, 1)


def test_the_command_line_says_what_is_wrong_in_a_line(examples, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["byte_lm.py", "report", "--out", str(tmp_path / "nosuch")])
    with pytest.raises(SystemExit, match=r"^error: .*nosuch: no results there; `train` writes them$"):
        runpy.run_path(str(examples / "byte_lm.py"), run_name="__main__")


def test_the_commands_of_the_docs_are_understood(examples):
    import byte_lm

    page = (examples.parent / "docs" / "language_models.md").read_text() + byte_lm.__doc__
    commands = re.findall(r"^ *python examples/byte_lm\.py (.*)$", page, re.M)
    assert len(commands) >= 8
    for command in commands:
        byte_lm.parser().parse_args(shlex.split(command, comments=True))
