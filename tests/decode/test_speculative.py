"""Speculative decoding: the tokens of `generate`, or tokens distributed like them, and states that are rolled back."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn import layers
from linrnn.decode import _speculation
from linrnn.decode import state as states
from linrnn.decode._speculation import Speculation
from linrnn.decode.generation import generate
from linrnn.decode.sampling import Sampling, generator, row_seed
from linrnn.decode.speculative import Acceptance, speculative
from linrnn.models import LanguageModel

V = 11
MIXERS: list[Any] = ["lru", "attention", ["rglru", "attention"], "mamba"]
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 0]]


def language_model(
    mixer: Any, seed: int = 0, vocab_size: int = V, sharpness: float = 3.0, **kwargs: Any
) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(vocab_size, mixer=mixer, d_model=16, n_layers=2, **kwargs).double().eval()
    with torch.no_grad():
        model.head.weight *= sharpness
    return model


def good_draft(model: LanguageModel, mixer: Any = "lru", noise: float = 0.3, **kwargs: Any) -> LanguageModel:
    """The model with noise on its weights."""
    draft = language_model(mixer, seed=7, **kwargs)
    draft.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in draft.parameters():
            p += noise * p.abs().mean() * torch.randn_like(p)
    return draft


@pytest.mark.parametrize(("kind", "n_draft"), [("same", 4), ("good", 3), ("bad", 1), ("bad", 5), ("attention", 2)])
@pytest.mark.parametrize("mixer", MIXERS[:3], ids=str)
def test_greedy_tokens_are_those_of_generate(mixer: Any, kind: str, n_draft: int) -> None:
    model = language_model(mixer)
    draft = {
        "same": lambda: model,
        "good": lambda: good_draft(model, mixer),
        "bad": lambda: language_model("slru", seed=1),
        "attention": lambda: language_model("attention", seed=1),
    }[kind]()
    counts = Acceptance()
    options: dict[str, Any] = {"eos_id": 3, "stop": [[1, 1]], "pad_id": -1, "repetition_penalty": 1.2}
    for prompts, chosen in ((PROMPTS, options), (PROMPTS[:1], {})):
        ours = speculative(model, draft, prompts, 24, n_draft=n_draft, acceptance=counts, **chosen)
        assert torch.equal(ours, generate(model, prompts, 24, **chosen))
    assert counts.judged <= counts.drafted == n_draft * counts.rounds
    assert (counts.accepted == counts.judged) == (kind == "same")
    assert counts.accepted > 0 or kind in ("bad", "attention")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [n for n in layers.available() if n != "nystrom"])
def test_every_layer_is_rolled_back(name: str) -> None:
    model = language_model(name, ffn="channel_mix")
    for draft in (good_draft(model, name, ffn="channel_mix"), language_model("lru", seed=1)):
        ours = speculative(model, draft, PROMPTS, 30, pad_id=0, n_draft=3)
        assert torch.equal(ours, generate(model, PROMPTS, 30, pad_id=0))


def test_padded_prompts() -> None:
    model, draft = language_model("lru"), language_model("lru", seed=1)
    ids, mask = torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, 7, dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), True
    ours = speculative(model, draft, ids, 12, mask=mask)
    assert torch.equal(ours, generate(model, ids, 12, mask=mask))


def begun(
    model: LanguageModel, draft: LanguageModel, ids: Tensor, seed: int, sampling: Sampling, n_draft: int
) -> Speculation:
    """Starts many rows at once, which `speculative` reads one by one."""
    seen = torch.zeros(len(ids), model.vocab_size, dtype=torch.bool).scatter(1, ids, True)
    with torch.inference_mode():
        return Speculation(
            model,
            draft,
            model(ids[:, :-1])[1],
            draft(ids[:, :-1])[1],
            ids[:, -1],
            seen if sampling.penalises else None,
            sampling=sampling,
            generators=[generator(row_seed(seed, row)) for row in range(len(ids))],
            n_draft=n_draft,
            acceptance=Acceptance(),
        )


@pytest.mark.parametrize(
    ("mixer", "dtype", "longest_tail"),
    [
        *((mixer, torch.float64, 3) for mixer in MIXERS),
        *((mixer, torch.float64, 1) for mixer in MIXERS[:2]),
        *((mixer, torch.float32, 3) for mixer in ("lru", "mamba")),  # with compiled steps
    ],
    ids=str,
)
def test_states_go_back_to_the_accepted_tokens(
    mixer: Any, dtype: torch.dtype, longest_tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every round, in every row, both models go on as if they had read the accepted tokens and no others."""
    monkeypatch.setattr(_speculation, "LONGEST_TAIL", longest_tail)
    model = language_model(mixer)
    draft = good_draft(model, mixer).to(dtype)
    model.to(dtype)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    texts = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 0, 1]]
    speculation = begun(model, draft, torch.tensor(texts), 0, Sampling(1.0), 3)
    counts = speculation.acceptance
    lengths = set()
    for turn in range(10):
        new = speculation.round()
        if turn == 4:
            speculation.keep([3, 1])
            texts, new = [texts[3], texts[1]], [new[3], new[1]]
        lengths |= set(map(len, new))
        for row, tokens in enumerate(new):
            texts[row] = texts[row] + tokens
            tail = speculation.tails[row]
            assert tail == texts[row][-len(tail) :] and len(tail) <= longest_tail
            with torch.inference_mode():
                whole = torch.tensor([texts[row]])
                target, guess = (states.select(s, [row]) for s in (speculation.target, speculation.guess))
                ours, theirs = model(torch.tensor([tail]), target)[0][:, -1], model(whole)[0][:, -1]
                torch.testing.assert_close(ours, theirs, **tolerance)
                ours, theirs = draft.step(whole[:, -1], guess)[0], draft(whole)[0][:, -1]
                torch.testing.assert_close(ours, theirs, **tolerance)
    assert lengths == {1, 2, 3, 4}  # all that can be accepted was, and rows differed
    assert counts.replays >= {1: 4, 3: 1}[longest_tail] and counts.calls == 10 + counts.replays
    for owner, state in ((model, speculation.target), (draft, speculation.guess)):
        if owner.state_size is None:  # rolling back leaves no columns behind
            columns = {leaf.shape[1] for leaf in states.leaves(state) if leaf.ndim == 4}
            assert max(columns) <= max(map(len, texts))


SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.5, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.7},
]


@pytest.mark.parametrize(
    ("kind", "options", "n_draft"),
    [
        *(("bad", options, 3) for options in SAMPLINGS),
        *(("good", options, 2) for options in SAMPLINGS[2:]),
        ("same", SAMPLINGS[0], 2),
        ("bad", SAMPLINGS[3], 1),
    ],
)
def test_three_tokens_are_distributed_as_the_model_says(kind: str, options: dict[str, Any], n_draft: int) -> None:
    """Chi square of 4^3 outcomes in many rows against the product of the model's conditional probabilities."""
    model, draft, prompt = pair(kind)
    rows, sampling = 1500, Sampling(**options)
    speculation = begun(model, draft, torch.tensor([prompt] * rows), 5, sampling, n_draft)
    drawn: list[list[int]] = [[] for _ in range(rows)]
    while min(map(len, drawn)) < 3:
        for row, tokens in zip(drawn, speculation.round(), strict=True):
            row += tokens
    outcomes = torch.cartesian_prod(*3 * [torch.arange(4)])  # (64, 3)
    expected = torch.ones(64, dtype=torch.float64)
    for t in range(3):
        before = torch.cat((torch.tensor([prompt]).expand(64, -1), outcomes[:, :t]), 1)
        expected *= distribution(model, before, sampling).gather(1, outcomes[:, t : t + 1])[:, 0]
    observed = torch.tensor([16 * row[0] + 4 * row[1] + row[2] for row in drawn]).bincount(minlength=64)
    assert chi_square(observed, rows * expected) > 1e-3


@pytest.mark.parametrize("kind", ["same", "good", "bad"])
def test_acceptance_is_what_two_distributions_share(kind: str) -> None:
    model, draft, prompt = pair(kind)
    rows = 3000
    speculation = begun(model, draft, torch.tensor([prompt] * rows), 1, Sampling(1.0), 1)
    speculation.round()
    counts = speculation.acceptance
    p, q = (distribution(m, torch.tensor([prompt]), Sampling(1.0)) for m in (model, draft))
    shared = torch.minimum(p, q).sum().item()  # one minus the total variation distance
    assert counts.judged == counts.rounds == rows
    assert abs(counts.rate - shared) <= 4 * math.sqrt(max(shared * (1 - shared), 1e-6) / rows)
    assert {"same": shared > 0.999, "good": 0.9 < shared < 0.995, "bad": shared < 0.7}[kind]


def pair(kind: str) -> tuple[LanguageModel, LanguageModel, list[int]]:
    """A model of four tokens, a draft that is the same, good, or bad, and a prompt."""
    model = language_model("lru", seed=3, vocab_size=4, sharpness=1.5)
    if kind == "same":
        return model, model, [0, 2]
    draft = language_model("attention", seed=4, vocab_size=4, sharpness=1.5)
    if kind == "good":
        draft = language_model("lru", seed=3, vocab_size=4, sharpness=1.2)
    return model, draft, [0, 2]


def distribution(model: LanguageModel, ids: Tensor, sampling: Sampling) -> Tensor:
    """Returns the probabilities (B, V) of the token behind ids (B, T)."""
    with torch.no_grad():
        logits = model(ids)[0][:, -1]
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    return sampling.probabilities(logits, seen).double()


def chi_square(observed: Tensor, expected: Tensor) -> float:
    """Returns the probability of counts as far from the expected ones, those below 5 together in one cell."""
    assert observed[expected == 0].sum() == 0
    few = expected < 5
    cells = [(o, e) for o, e in zip(observed[~few].tolist(), expected[~few].tolist(), strict=True)]
    rest = observed[few].sum().item(), expected[few].sum().item()
    if rest[1] >= 5:
        cells.append(rest)
    else:
        cells[-1] = (cells[-1][0] + rest[0], cells[-1][1] + rest[1])
    assert len(cells) > 5
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    return torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2), torch.tensor(statistic / 2)).item()


def test_rows_do_not_depend_on_their_neighbours() -> None:
    model = language_model("lru")
    draft, options = good_draft(model), {"temperature": 1.0, "eos_id": 3}
    together = speculative(model, draft, PROMPTS, 25, seed=9, pad_id=3, **options)
    assert torch.equal(together, speculative(model, draft, PROMPTS, 25, seed=9, pad_id=3, **options))
    assert not torch.equal(together, speculative(model, draft, PROMPTS, 25, seed=8, pad_id=3, **options))
    for i, prompt in enumerate(PROMPTS):
        alone = speculative(model, draft, [prompt], 25, seed=[row_seed(9, i)], **options)[0, len(prompt) :]
        assert together[i, 7:].tolist() == [*alone.tolist(), *[3] * (together.shape[1] - 7 - len(alone))]


def test_stream() -> None:
    model = language_model("lru")
    draft, options = good_draft(model), {"temperature": 1.0, "eos_id": 3, "seed": 2}
    whole = speculative(model, draft, torch.tensor([[1, 2], [3, 4]]), 20, **options)
    counts = Acceptance()
    columns = speculative(model, draft, torch.tensor([[1, 2], [3, 4]]), 20, stream=True, acceptance=counts, **options)
    assert counts.calls == 0  # nothing is read before it is asked for
    first = next(columns)
    assert counts.calls == 1 and first.dtype == torch.int64
    assert torch.equal(torch.stack([first, *columns], 1), whole[:, 2:])
    assert list(speculative(model, draft, [[1]], 0, stream=True)) == []
    assert speculative(model, draft, [[1]], 0).tolist() == [[1]]


def test_calls_are_saved() -> None:
    """One call for n_draft + 1 tokens where all is accepted."""
    model, counts = language_model("lru"), Acceptance()
    speculative(model, model, [[1]], 30, n_draft=4, acceptance=counts)
    assert counts == Acceptance(rounds=6, drafted=24, judged=24, accepted=24, calls=6, replays=0)
    assert counts.rate == 1 and counts.tokens_per_round == 5
    assert math.isnan(Acceptance().rate) and math.isnan(Acceptance().tokens_per_round)


def test_models_are_left_in_their_mode() -> None:
    model, draft = language_model("lru").train(), language_model("lru", seed=1)
    model.backbone.blocks[0].eval()
    before = [module.training for m in (model, draft) for module in m.modules()]
    speculative(model, draft, [[1]], 3)
    next(speculative(model, draft, [[1]], 3, stream=True))
    assert before == [module.training for m in (model, draft) for module in m.modules()]


def test_the_docs_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speculative.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "speculative.md", "exec"), namespace)


@pytest.mark.parametrize("which", ["model", "draft"])
def test_logits_that_are_no_numbers(which: str) -> None:
    models = {"model": language_model("lru"), "draft": language_model("lru", seed=1)}
    with torch.no_grad():
        models[which].embed.weight[5] = torch.nan
    place = (
        "logits: .* row 1, at its new token 0$"
        if which == "model"
        else "logits of the draft: .* token 0 or one of the 3"
    )
    with pytest.raises(ValueError, match=place):
        speculative(**models, ids=[[1, 2], [5]], max_new_tokens=3, pad_id=0)


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_what_nobody_says_may_be_no_numbers(mixer: str) -> None:
    """Behind a refused guess, and behind the end of a row; but not behind a token that is read."""
    model, draft, plain = (language_model(mixer, vocab_size=101) for _ in range(3))
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model.embed.weight[0], draft.head.weight[:] = torch.nan, 0  # the draft guesses 0 every time
        model.head.weight[0] = plain.head.weight[0] = 0
    counts = Acceptance()
    ours = speculative(model, draft, prompt, 8, acceptance=counts)
    assert torch.equal(ours, generate(plain, prompt, 8)) and counts.accepted == 0 and 0 not in ours
    text = ours[0, 3:].tolist()
    last = next(n for n in range(8) if text[n] not in [*text[:n], 1, 2, 3])
    with torch.no_grad():
        model.embed.weight[text[last]] = torch.nan
    ours = speculative(model, plain, prompt, 8, eos_id=text[last])
    assert ours[0, 3:].tolist() == text[: last + 1]
    for ended in (generate, lambda *args: speculative(args[0], plain, *args[1:])):
        with pytest.raises(ValueError, match=rf"logits: .* at its new token {last + 1}$"):
            ended(model, prompt, 8)


@pytest.mark.parametrize("mixer", ["lru", "mamba"])
def test_the_draft_in_a_graph(mixer: str, uncaptured: None) -> None:
    """Its buffers are written to by each guess, and the states around the guesses are kept."""
    model = language_model(mixer)
    counts = Acceptance()
    ours = speculative(model, good_draft(model, mixer), PROMPTS, 20, n_draft=3, pad_id=0, acceptance=counts)
    assert torch.equal(ours, generate(model, PROMPTS, 20, pad_id=0, graphs=False))
    whole = Acceptance()
    speculative(model, good_draft(model, mixer), PROMPTS, 20, n_draft=3, pad_id=0, acceptance=whole, graphs=False)
    assert counts == whole and counts.accepted > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a LanguageModel, got int"),
        ({"draft": None}, TypeError, "draft: expected a LanguageModel, got NoneType"),
        ({"vocab_size": 12}, ValueError, "draft: expected the model's vocabulary of 11 ids, got 12"),
        ({"device": "meta"}, ValueError, "draft: expected a model on cpu like the other, got one on meta"),
        ({"n_draft": 0}, ValueError, "n_draft: expected an integer >= 1, got 0"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens: expected an integer >= 0, got -1"),
        ({"acceptance": 1}, TypeError, "acceptance: expected an Acceptance or None, got int 1"),
        ({"temperature": -1}, ValueError, "temperature: expected a finite number >= 0"),
        ({"eos_id": 11}, ValueError, "eos_id: expected ids from 0 to 10, got 11"),
        ({"ids": [[]]}, ValueError, "ids, row 0: expected at least one token, got none"),
        ({"ids": [[11]]}, ValueError, "ids, row 0: expected ids from 0 to 10, got 11"),
        ({"ids": [[1], [1]], "stop": [[1]]}, ValueError, "pad_id: expected an integer, since stop ends rows apart"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    draft = language_model("lru", vocab_size=change.pop("vocab_size", V)).to(change.pop("device", "cpu"))
    arguments = {"model": language_model("lru"), "draft": draft, "ids": [[1]], "max_new_tokens": 3, **change}
    with pytest.raises(error, match=message):
        speculative(**arguments)
