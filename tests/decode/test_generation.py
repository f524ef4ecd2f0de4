"""Generated text against the whole forward, rows against each alone, and what ends, streams and is refused."""

import gc
import inspect
import io
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linrnn.decode import LiveBytes, generate, speculative
from linrnn.decode import generation as module
from linrnn.decode import state as states
from linrnn.decode.sampling import Sampling, row_seed
from linrnn.layers import LRUState
from linrnn.models import LanguageModel, SequenceBackbone

V = 23


def some_model(dtype: torch.dtype = torch.float64, **options: Any) -> LanguageModel:
    """In float64 no two logits are nearly equal."""
    return LanguageModel(V, **{"mixer": "lru", "d_model": 16, "n_layers": 2, **options}).to(dtype)


def text(model: LanguageModel, ids: Any, n: int, **options: Any) -> Tensor:
    out = generate(model, ids, n, **options)
    assert isinstance(out, Tensor) and out.dtype == torch.int64 and not out.is_inference()
    return out


def by_formula(model: LanguageModel, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids)[0][:, -1].argmax(1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": ["mamba2", "attention"], "tie_embeddings": True},
        {"mixer": "lru", "embed_scale": 4.0, "logit_soft_cap": 0.5, "norm": "layer"},
        {"mixer": "mamba", "ffn": None},
        {"mixer": "rwkv4", "ffn": "channel_mix", "embed_norm": True},
        {"mixer": "slru", "prenorm": False},
        {"mixer": "attention", "mixer_kwargs": {"window": 5, "sink": 2}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_greedy_is_the_argmax_of_the_whole_forward(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = some_model(dtype, **options)
    ids = torch.randint(V, (3, 7))
    out = text(model, ids, 12)
    assert torch.equal(out, by_formula(model, ids, 12))
    assert torch.equal(out, model.generate(ids.int(), 12)) and torch.equal(model.generate(ids, 0), ids)


@pytest.mark.parametrize("mixer", ["lru", ["mamba", "attention"]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ragged_prompts(mixer: Any, temperature: float) -> None:
    """Padded left, right, with holes, or lists: each row is what it is alone."""
    model = some_model(mixer=mixer)
    ids = torch.randint(V, (4, 9))
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    mask[2:] = mask[2:].flip(1)
    mask[3, 5] = False
    how: dict[str, Any] = {"temperature": temperature, "top_p": 0.95, "repetition_penalty": 1.1}
    out = text(model, ids.masked_fill(~mask, -1), 10, mask=mask, seed=7, **how)
    assert torch.equal(out[:, :9], ids.masked_fill(~mask, -1))
    prompts = [row[real] for row, real in zip(ids, mask, strict=True)]
    for i, prompt in enumerate(prompts):
        alone = text(model, prompt[None], 10, seed=[row_seed(7, i)], **how)
        assert torch.equal(out[i, 9:], alone[0, len(prompt) :])
    listed = text(model, [prompts[0], *(prompt.tolist() for prompt in prompts[1:])], 10, pad_id=-7, seed=7, **how)
    assert torch.equal(listed[:, 9:], out[:, 9:])
    for row, prompt in zip(listed, prompts, strict=True):
        assert torch.equal(row[9 - len(prompt) : 9], prompt) and (row[: 9 - len(prompt)] == -7).all()


def test_rows_end_apart() -> None:
    model = some_model()
    ids = torch.randint(V, (4, 3))
    free = by_formula(model, ids, 12)[:, 3:].tolist()
    eos, stop = free[0][4], free[1][1:4]
    unsaid = min({*range(V)} - {token for row in free for token in row})
    # columns are spent until the last row has ended, and what follows an end is padding
    for pad_id in (None, -5):
        out = text(model, ids, 12, eos_id=[eos, unsaid], stop=[stop], pad_id=pad_id)[:, 3:].tolist()
        lengths = []
        for row, whole in zip(out, free, strict=True):
            ends = [n for n in range(1, 13) if whole[n - 1] == eos or whole[max(0, n - 3) : n] == stop]
            lengths.append(min([*ends, 12]))
            assert row[: lengths[-1]] == whole[: lengths[-1]]
            assert set(row[lengths[-1] :]) <= {eos if pad_id is None else pad_id}
        assert {len(row) for row in out} == {max(lengths)} and len(set(lengths)) > 1
    assert text(model, ids[:1], 12, eos_id=eos).shape[1] == 3 + free[0].index(eos) + 1
    assert text(model, ids[1:2], 12, stop=[stop]).shape[1] <= 3 + 4


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_going_on_from_a_state(mixer: str) -> None:
    model = some_model(mixer=mixer)
    ids = torch.randint(V, (3, 8))
    with torch.no_grad():
        state = model(ids[:, :5])[1]
    out = text(model, ids[:, 5:], 6, state=state)
    assert torch.equal(out, by_formula(model, ids, 6)[:, 5:])
    mask = torch.tensor([[False, False, True]] * 3)  # one token, no prefill
    with torch.no_grad():
        state = model(ids[:, :7])[1]
    assert torch.equal(text(model, ids[:, 5:], 6, state=state, mask=mask), out)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 9, "min_p": 0.02}])
def test_streams(options: dict[str, Any]) -> None:
    model = some_model()
    ids = torch.randint(V, (3, 4))
    whole = text(model, ids, 15, seed=1, eos_id=3, **options)
    stream = generate(model, ids, 15, seed=1, eos_id=3, stream=True, **options)
    columns = list(stream)
    assert all(column.shape == (3,) and column.dtype == torch.int64 for column in columns)
    assert torch.equal(torch.stack(columns, 1), whole[:, 4:])
    assert list(generate(model, ids, 0, stream=True)) == []


def test_a_stream_is_lazy_and_frees_what_it_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = some_model()
    held: list[weakref.ref] = []
    read, features = [], LanguageModel.features

    def watched(self: LanguageModel, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        read.append(ids)
        h, state = features(self, ids, *args, **kwargs)
        held.extend(weakref.ref(leaf) for leaf in states.leaves(state))
        return h, state

    monkeypatch.setattr(LanguageModel, "features", watched)
    gc.disable()  # counting references has to be enough
    try:
        stream = generate(model, torch.randint(V, (1, 4)), 10**9, stream=True)
        assert isinstance(stream, Iterator) and not read
        next(stream), next(stream)
        assert len(read) == 1 and model.training
        decoders = [o for o in gc.get_objects() if type(o).__name__ == "Decoder"]
        (decoder,) = (weakref.ref(o) for o in decoders)
        del decoders
        stream.close()  # type: ignore[attr-defined]
        assert decoder() is None and not any(leaf() is not None for leaf in held)
    finally:
        gc.enable()


@pytest.mark.parametrize("mixer", ["lru", "mamba", "rwkv4", "deltanet"])
def test_memory_does_not_grow(mixer: str) -> None:
    """Bytes alive behind 10 tokens and behind 80, and the most at any moment between."""
    model = some_model(mixer=mixer)
    stream = iter(generate(model, torch.randint(V, (2, 5)), 1000, stream=True))
    with LiveBytes() as live:
        next(stream)
        peaks, now = [], []
        for n in (10, 70):
            live.peak = live.now
            for _ in range(n):
                next(stream)
            peaks.append(live.peak)
            now.append(live.now)
    assert now[0] == now[1] > 0 and peaks[0] == peaks[1]


def test_samples_have_the_probabilities_of_the_model() -> None:
    """Chi square of the first two tokens of 4000 rows: above its mean by less than 5 standard deviations."""
    model = LanguageModel(5, mixer="lru", d_model=8, n_layers=1)
    how: dict[str, Any] = {"temperature": 1.7, "top_p": 0.93}
    n = 4000
    new = text(model, torch.ones(n, 1, dtype=torch.int64), 2, seed=11, **how)[:, 1:]
    counts = (new[:, 0] * 5 + new[:, 1]).bincount(minlength=25)
    with torch.no_grad():
        first = Sampling(**how).probabilities(model(torch.tensor([[1]]))[0][:, -1])
        pairs = torch.stack((torch.ones(5), torch.arange(5))).T.long()
        second = Sampling(**how).probabilities(model(pairs)[0][:, -1])
    p = (first.T * second).flatten()
    kept = p > 0
    assert not counts[~kept].any() and kept.sum() > 9
    chi_square = ((counts - n * p) ** 2 / (n * p))[kept].sum().item()
    free = int(kept.sum()) - 1
    assert chi_square < free + 5 * (2 * free) ** 0.5


def test_seeds() -> None:
    model = some_model()
    ids = torch.ones(3, 2, dtype=torch.int64)
    one = text(model, ids, 20, temperature=2.0, seed=5)
    assert torch.equal(one, text(model, ids, 20, temperature=2.0, seed=5))
    assert torch.equal(one, text(model, ids, 20, temperature=2.0, seed=[row_seed(5, i) for i in range(3)]))
    assert not torch.equal(one, text(model, ids, 20, temperature=2.0, seed=6))
    assert len({tuple(row) for row in one.tolist()}) == 3
    torch.manual_seed(0)
    free = text(model, ids, 20, temperature=2.0)
    assert not torch.equal(free, text(model, ids, 20, temperature=2.0))
    torch.manual_seed(0)
    assert torch.equal(free, text(model, ids, 20, temperature=2.0))


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was asked for; by itself on a terminal, and then only if it takes long."""
    model, ids = some_model(), torch.ones(1, 1, dtype=torch.int64)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown(where: io.StringIO, **options: Any) -> str:
        monkeypatch.setattr(sys, "stderr", where)
        list(generate(model, ids, 4, **options))
        return where.getvalue()

    line = shown(io.StringIO(), progress=True)
    assert (
        "generate: 1 of 4 tokens" in line and line.rstrip(" \n").endswith("0 s left") and "\rgenerate: 4 of 4" in line
    )
    assert shown(Terminal()) == shown(io.StringIO()) == shown(Terminal(), progress=False) == ""
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    assert "4 of 4" in shown(Terminal()) and shown(io.StringIO()) == shown(Terminal(), progress=False) == ""
    assert shown(Terminal(), stream=True) == ""


def test_the_mode_of_the_model() -> None:
    model = some_model(dropout=0.5)
    ids = torch.randint(V, (2, 3))
    out = text(model, ids, 8)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(out, by_formula(model.eval(), ids, 8))
    text(model, ids, 8)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_any_default_device(mixer: str) -> None:
    """The model's counts, and the CPU where numbers are drawn."""
    model = some_model(mixer=mixer)
    how: dict[str, Any] = {"temperature": 1.0, "repetition_penalty": 1.1, "eos_id": 3, "stop": [[1]], "pad_id": 0}
    state = model.init_state(3)
    prompts, expected = [[1, 2], [3], [4, 5, 6]], []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(device):
            expected.append(text(model, prompts, 20, state=state, **how))
            expected.append(speculative(model, model, prompts, 20, **how))  # type: ignore[arg-type]
    assert expected[0].equal(expected[2]) and expected[1].equal(expected[3]) and expected[1].shape[1] > 5


def test_arguments_of_other_libraries() -> None:
    """Integers and compiled models."""
    model, ids = some_model(), torch.randint(V, (2, 3))
    how: dict[str, Any] = {"max_new_tokens": 9, "temperature": 1.0, "eos_id": 3, "pad_id": 5, "seed": 7, "top_k": 9}
    expected = text(model, ids, how.pop("max_new_tokens"), **how)
    for convert in (np.int64, torch.tensor):
        other = {name: convert(value) if isinstance(value, int) else value for name, value in how.items()}
        assert torch.equal(expected, text(model, ids, convert(9), **other))
    assert torch.equal(expected, text(model, ids, 9, **{**how, "eos_id": np.array([3])}))
    assert torch.equal(expected, text(model, [[np.int64(i) for i in row] for row in ids.tolist()], 9, **how))
    assert torch.equal(expected, text(torch.compile(model), ids, 9, **how))  # type: ignore[arg-type]


def test_nothing_is_allocated_ahead() -> None:
    model = some_model()
    ids = torch.randint(V, (1, 3))
    eos = by_formula(model, ids, 6)[0, -1]
    assert torch.equal(text(model, ids, 10**15, eos_id=eos), text(model, ids, 6, eos_id=eos))


def test_no_rows() -> None:
    assert text(some_model(), torch.zeros(0, 4, dtype=torch.int64), 5).shape == (0, 4)


IDS = torch.ones(2, 3, dtype=torch.int64)
NO_BOS = "expected at least one token, got none; begin with a BOS token"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": torch.zeros(2, 0).long()}, ValueError, f"ids, row 0: {NO_BOS}"),
        ({"mask": torch.tensor([[True] * 3, [False] * 3])}, ValueError, f"ids, row 1: {NO_BOS}"),
        ({"ids": [[1], []]}, ValueError, f"ids, row 1: {NO_BOS}"),
        ({"ids": []}, ValueError, "ids: expected at least one prompt, got an empty list"),
        ({"ids": [1, 2]}, TypeError, r"ids: expected a tensor \(batch, time\) or a list of prompts, got list"),
        ({"ids": IDS[0]}, ValueError, r"ids: expected token ids of shape \(batch, time\), got \(3,\)"),
        ({"ids": IDS + V}, ValueError, f"ids, row 0: .* to {V - 1}, got {V + 1}; mark padding with mask"),
        ({"ids": [[1], [-1]], "pad_id": 0}, ValueError, f"ids, row 1: expected ids from 0 to {V - 1}, got -1"),
        ({"ids": [[1], [1, 2]]}, ValueError, "pad_id: expected an integer, since the prompts differ in length"),
        ({"ids": [[1]], "mask": IDS[:1, :1] > 0}, ValueError, "mask: expected None with a list of prompts"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask: expected a bool tensor of shape \(2, 3\), got torch.float32"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
        ({"max_new_tokens": True}, ValueError, "max_new_tokens: expected an integer >= 0, got True"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1"),
        ({"top_p": 0.0}, ValueError, "top_p: expected a number in"),
        ({"eos_id": V}, ValueError, f"eos_id: expected ids from 0 to {V - 1}, got {V}"),
        ({"eos_id": 0.5}, ValueError, f"eos_id: expected ids from 0 to {V - 1}, got 0.5"),
        ({"eos_id": torch.tensor(V)}, ValueError, f"eos_id: expected ids from 0 to {V - 1}, got {V}"),
        ({"ids": [[1], [V]]}, ValueError, f"ids, row 1: expected ids from 0 to {V - 1}, got {V}$"),
        ({"ids": [[2**70]]}, ValueError, f"ids, row 0: expected ids from 0 to {V - 1}, got {2**70}"),
        ({"stop": [[]]}, ValueError, "stop: expected at least one token, got none$"),
        ({"pad_id": 0.5}, ValueError, "pad_id: expected an integer or None, got 0.5"),
        ({"stop": [[1]]}, ValueError, "pad_id: expected an integer, since stop ends rows apart"),
        ({"seed": 0.5, "temperature": 1.0}, ValueError, "seed: expected an integer .*, got 0.5"),
        ({"seed": [1]}, ValueError, "seed: expected one for each of 2 rows, got 1"),
        ({"state": some_model().init_state(3)}, ValueError, "state: expected 2 sequences like ids, got 3"),
        ({"state": (LRUState(torch.zeros(2, 8)),)}, TypeError, "state: expected a tuple of 2 .* states or None"),
        ({"model": SequenceBackbone("lru", 8, 1, bidirectional=True)}, TypeError, "model: expected a LanguageModel"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input(arguments: dict[str, Any], error: type[Exception], message: str, stream: bool) -> None:
    """At once, also for a stream nobody has read from."""
    with pytest.raises(error, match=message):
        generate(**{"model": some_model(), "ids": IDS, "max_new_tokens": 2, "stream": stream, **arguments})


def test_logits_that_are_no_numbers() -> None:
    """With the row and the token: a state that overflows does so in the middle of a text."""
    model = some_model()
    with torch.no_grad():
        model.embed.weight[7] = torch.nan
    ids = torch.randint(6, (3, 4))
    ids[2, -1] = 7
    with pytest.raises(ValueError, match=r"logits: .* for sequence 2 \(in generate: row 2\) at its new token 0"):
        generate(model, ids, 5)
    with torch.no_grad():
        model.head.weight.zero_()  # all logits equal, and the third token is drawn sooner or later
    with pytest.raises(ValueError, match=r"logits: .* row 0\) at its new token [1-9]"):
        generate(model, ids[:1], 1000, temperature=1.0, seed=0)
    assert model.training


def test_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    docs = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", docs, re.S):
        exec(compile(block, "generation.md", "exec"), namespace)
    assert len(capsys.readouterr().out.splitlines()) == 3
    defaults = {name: p.default for name, p in inspect.signature(generate).parameters.items()}
    table = docs[docs.index("## Options") : docs.index("## Prompts")]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", table, re.M))
    assert rows.keys() | {"model", "ids"} == defaults.keys()
    assert all(str(defaults[name]).removesuffix(".0") == shown for name, shown in rows.items() if shown.isalnum())
