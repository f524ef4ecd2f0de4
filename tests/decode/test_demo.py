"""The demo shows equal logits and true predictions, and says what is wrong with an option."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from linrnn.decode import demo
from linrnn.models import LanguageModel


@pytest.mark.parametrize("more", ["", "--positions alibi --layers 1 --dtype float32", "--kv-heads 1 --window 3"])
def test_five_memories_one_answer(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--length", "7", "--d-model", "16", "--block-size", "3", *more.split()]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^(kv|inputs|layerwise|block|constant)  +(\S.*)$", out, re.M)
    assert [row[0] for row in rows] == ["kv", "inputs", "layerwise", "block", "constant"]
    for _, rest in rows:
        _, state, predicted_state, _, evaluations, predicted, *_ = re.split(r"  +", rest)
        assert (state, evaluations) == (predicted_state, predicted)
    assert "Equal logits at all 7 places" in out


def test_unequal_logits_are_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    decode = demo.decode

    def wrong(model: LanguageModel, ids: torch.Tensor, choice: Any) -> Any:
        logits, *rest = decode(model, ids, choice)
        return logits + (1e-6 if choice.memory == "layerwise" else 0), *rest

    monkeypatch.setattr(demo, "decode", wrong)
    assert demo.main(["--length", "3", "--d-model", "16"]) == 1
    assert "error: the logits differ by 1.0e-06" in capsys.readouterr().err


def test_what_would_not_finish_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--length", "400", "--d-model", "16", "--layers", "3", "--time-limit", "1"]) == 2
    captured = capsys.readouterr()
    assert re.search(r"--time-limit 1 s\. '\w+' evaluates \S+ blocks: take a smaller", captured.err)
    assert "Expected to take" in captured.out


def test_refuses_before_it_makes_ids(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "bytes_of", None)
    assert demo.main(["--length", "1000000000", "--d-model", "16", "--layers", "8"]) == 2
    assert "take a smaller --length or --layers" in capsys.readouterr().err


def test_reads_a_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc")
    assert demo.bytes_of(tmp_path / "text", 5).tolist() == [[97, 98, 99, 97, 98]]
    assert bytes(demo.bytes_of(None, 6)[0].tolist()) == b"Refuse"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--length 0", "--length: expected an integer >= 1, got 0"),
        ("--text missing", "--text: expected a file with something in it, got missing"),
        ("--d-model 17", "--d-model, --kv-heads, --window: n_heads: no even head width"),
        ("--window 0", "window: expected an integer >= 1, got 0"),
        ("--time-limit nan", "--time-limit: expected seconds > 0, got nan"),
        ("--time-limit -1", "--time-limit: expected seconds > 0, got -1.0"),
        ("--seed 99999999999999999999", "--seed: expected an integer from -2^63 to 2^64 - 1, got 99999999999999999999"),
        ("--kv-heads 3", "n_kv_heads: expected a divisor of"),
    ],
)
def test_bad_options(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(line.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--help"])
    assert stop.value.code == 0 and "(default: 40)" in capsys.readouterr().out
