"""benchmarks/decode.py at a size that takes no time: its table, its files, and that unequal tokens stop it."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("transformers")


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch):
    import decode

    monkeypatch.setattr(decode.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(decode.common, "keep_memory_warm", lambda: None)
    return decode


@pytest.mark.filterwarnings("ignore")  # transformers' about its own kernels
def test_a_run(decode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--size", "tiny", "--contexts", "4", "9", "--tokens", "2", "--turns", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["decode.py", *options])
    decode.main()
    text = (tmp_path / "decode_cpu_2threads.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    speed, ratios = rows[: len(rows) // 2 + 1], rows[len(rows) // 2 + 1 :]
    assert [row[0] for row in speed[2:]][1:] == [row[0] for row in ratios[2:]]
    state = {row[0]: [cell.split("(")[1] for cell in row[2:]] for row in speed[2:]}
    for name, (short, long) in state.items():
        assert (short == long) == ("KV cache" not in name), (name, short, long)
        assert short != "0 B)"
    assert (tmp_path / "decode_cpu_2threads.png").stat().st_size > 10_000


def test_unequal_tokens_stop_it(decode) -> None:
    model = decode.LanguageModel(16, mixer="lru")

    class Other:
        def generate(self, ids: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.zeros(1, 24, dtype=torch.int64)

    with pytest.raises(SystemExit, match="Mamba generates"):
        decode.agree(model, Other(), 16)
