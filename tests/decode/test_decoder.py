"""Sequences that come and go in one batch say what each says alone."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn import layers
from linrnn.decode import graph
from linrnn.decode import state as states
from linrnn.decode._in_use import evaluating
from linrnn.decode.decoder import Decoder
from linrnn.decode.prefill import prefill_alone, prefill_together
from linrnn.decode.prefix_cache import PrefixCache
from linrnn.decode.sampling import Sampling
from linrnn.layers import LRUState
from linrnn.models import LanguageModel, SequenceBackbone

V = 19
MIXERS: list[Any] = ["lru", "mamba", "rwkv4", "attention", ["gated_deltanet", "attention"], "gau"]
MODELS = [({"mixer": mixer}, str(mixer)) for mixer in MIXERS] + [({"mixer": "rwkv4", "ffn": "channel_mix"}, "rwkv")]
every_model = pytest.mark.parametrize("options", [m for m, _ in MODELS], ids=[name for _, name in MODELS])


def some_model(**options: Any) -> LanguageModel:
    """In float64, where no two logits are nearly equal."""
    return LanguageModel(V, **{"mixer": "lru", "d_model": 16, "n_layers": 2, **options}).double()


def some_requests(n: int) -> list[dict[str, Any]]:
    requests = []
    for i in range(n):
        sampling = [Sampling(), Sampling(1.0, top_p=0.9), Sampling(0.8, top_k=7, repetition_penalty=1.3)][i % 3]
        ids = torch.randint(V, (random.choice([1, 2, 5, 11]),))
        requests.append(
            {"ids": ids, "max_new_tokens": random.choice([1, 3, 8, 13]), "sampling": sampling, "seed": i, "eos_id": 4}
        )
    return requests


def alone(model: LanguageModel, request: dict[str, Any]) -> list[int]:
    decoder = Decoder(model)
    sequence = decoder.admit(**request)
    tokens = []
    while decoder.active or decoder.waiting:
        (event,) = decoder.step()
        tokens.append(event.token)
    assert decoder.retire(sequence).tokens[len(request["ids"]) :].tolist() == tokens
    return tokens


def by_formula(model: LanguageModel, ids: Tensor, n: int, eos: int) -> list[int]:
    """Greedy, the whole text read again for each token."""
    tokens: list[int] = []
    while len(tokens) < n and eos not in tokens:
        with torch.no_grad():
            logits, _ = model(torch.cat((ids, torch.tensor(tokens, dtype=torch.int64)))[None])
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


@pytest.fixture
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps run as if they were CUDA graphs, in buffers that the next one writes to, if the test asks for it."""
    if request.param:
        request.getfixturevalue("uncaptured")
        monkeypatch.setattr(graph, "PATIENCE", 0)


with_and_without_graphs = pytest.mark.parametrize("graphs", [False, True], indirect=True, ids=["eager", "graphs"])


@every_model
@with_and_without_graphs
@pytest.mark.parametrize("capacity", [None, 3])
def test_random_arrivals_and_departures(options: dict[str, Any], capacity: int | None, graphs: None) -> None:
    model = some_model(**options)
    requests = some_requests(9)
    decoder = Decoder(model, capacity=capacity, prefill_chunk=4)
    said: dict[int, list[int]] = {}
    pending, gone = list(enumerate(requests)), set()
    while pending or decoder.active or decoder.waiting:
        while pending and random.random() < 0.5:
            i, request = pending.pop(0)
            assert decoder.admit(**request) == i
            said[i] = []
        if random.random() < 0.1 and decoder.active:
            victim = random.choice(decoder.active + decoder.waiting)
            assert decoder.retire(victim).reason == "retired"
            gone.add(victim)
        before = decoder.active + decoder.waiting
        events = decoder.step()
        assert [event.sequence for event in events] == list(before)[:capacity]
        for event in events:
            said[event.sequence].append(event.token)
            assert event.finished == (event.sequence not in decoder.active) == (event.reason is not None)
        if decoder.active:
            assert states.batch_size(decoder.state) == len(decoder.active) <= (capacity or 9)
        else:
            assert decoder.state is None
    for i, request in enumerate(requests):
        whole = alone(model, request)
        if request["sampling"].greedy:
            assert whole == by_formula(model, request["ids"], request["max_new_tokens"], 4)
        assert said[i] == whole[: len(said[i])] and (i in gone or len(said[i]) == len(whole))


def both_ways(model: LanguageModel, device: str, together: bool) -> tuple[list[list[int]], list[list[int]]]:
    """What is said of requests in three groups, on a device, and what each says alone, on the CPU."""
    requests = some_requests(6)
    lonely = [alone(model, request) for request in requests]
    decoder = Decoder(model.to(device), capacity=5, prefill_chunk=8)
    decoder._together = together
    for request in requests:
        decoder.admit(**request)
        if request["seed"] % 2:
            decoder.step()
    while decoder.active or decoder.waiting:
        decoder.step()
    said = [decoder.retire(i) for i in range(6)]
    return [d.tokens[-d.n_new :].tolist() for d in said], lonely


@every_model
def test_prompts_that_enter_together(options: dict[str, Any]) -> None:
    """In one padded batch, as on a GPU."""
    together, lonely = both_ways(some_model(**options), "cpu", together=True)
    assert together == lonely


@pytest.mark.gpu
@every_model
def test_on_a_gpu(options: dict[str, Any]) -> None:
    together, lonely = both_ways(some_model(**options), "cuda", together=True)
    assert together == lonely


@pytest.mark.exhaustive
@pytest.mark.parametrize("mixer", sorted({*layers.available()} - {"nystrom"}))  # that one looks ahead
@pytest.mark.parametrize("together", [False, True])
def test_every_layer(mixer: str, together: bool) -> None:
    in_a_batch, lonely = both_ways(some_model(mixer=mixer), "cpu", together)
    assert in_a_batch == lonely
    model, ids = some_model(mixer=mixer), torch.randint(V, (6,))
    assert alone(model, {"ids": ids, "max_new_tokens": 9}) == by_formula(model, ids, 9, -1)


@every_model
@with_and_without_graphs
def test_a_sequence_goes_on_from_its_state(options: dict[str, Any], graphs: None) -> None:
    """In another batch, with gradients if wanted: what `retire` returns are ordinary tensors."""
    model = some_model(**options)
    decoder = Decoder(model)
    prompt = torch.randint(V, (9,))
    other, first = decoder.admit([1, 2, 3]), decoder.admit(prompt, max_new_tokens=6)
    events = [decoder.step() for _ in range(6)]
    tokens, n_new, state, reason = decoder.retire(first)
    assert (n_new, reason) == (6, "length") and tokens[:9].equal(prompt)
    assert tokens[9:].tolist() == [step[1].token for step in events]
    assert not any(leaf.is_inference() for leaf in states.leaves(state))
    _, whole = model(tokens[None, :-1])
    for ours, theirs in zip(states.leaves(state), states.leaves(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    model(tokens[None, -1:], state)[0].sum().backward()
    again = decoder.admit(tokens[-1:], max_new_tokens=3, state=state, keep_state=False)
    new = [event.token for _ in range(3) for event in decoder.step() if event.sequence == again]
    assert new == by_formula(model, tokens, 3, -1)
    assert decoder.retire(again).state is None
    assert decoder.retire(other).reason == "retired" and decoder.step() == []


def test_the_penalty_knows_the_prompt_and_the_new_tokens() -> None:
    model, sampling = some_model(), Sampling(repetition_penalty=3.0)
    text = torch.tensor([3, 1, 4])
    for _ in range(12):
        with torch.no_grad():
            logits = model(text[None])[0][0, -1]
        logits[text] = torch.where(logits > 0, logits / 3, logits * 3)[text]
        text = torch.cat((text, logits.argmax()[None]))
    assert alone(model, {"ids": [3, 1, 4], "max_new_tokens": 12, "sampling": sampling}) == text[3:].tolist()
    seen = torch.tensor([3, 1, 4, *by_formula(model, torch.tensor([3, 1, 4]), 12, -1)])
    assert not torch.equal(text, seen)


def test_how_sequences_end() -> None:
    model = some_model()
    free = alone(model, {"ids": [3, 1], "max_new_tokens": 12})
    assert len(set(free[3:6])) > 1  # the stop below is no accident
    decoder = Decoder(model)
    ends: list[dict[str, Any]] = [
        {"max_new_tokens": 5},
        {"eos_id": free[4]},
        {"eos_id": [free[4], free[7]]},
        {"stop": [free[2:6], [0] * 9]},
        {"stop": [[3, 1, free[0]]], "max_new_tokens": 6},  # a part of it in the prompt does not count
        {"eos_id": free[4], "stop": [free[3:5]], "max_new_tokens": 5},
    ]
    sequences = [decoder.admit([3, 1], **how) for how in ends]
    while decoder.active or decoder.waiting:
        decoder.step()
    first = free.index(free[4])
    assert [(d.n_new, d.reason) for d in map(decoder.retire, sequences)] == [
        (5, "length"),
        (first + 1, "eos"),
        (min(first, free.index(free[7])) + 1, "eos"),
        (6, "stop"),
        (6, "length"),
        (first + 1, "eos"),
    ]


def test_a_batch_has_no_rows_of_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sequence that enters costs one concatenation."""
    model = some_model()
    frozen, sizes, joined = model.frozen_step(), [], []
    monkeypatch.setattr(
        model, "frozen_step", lambda: lambda ids, state: (sizes.append(len(ids)), frozen(ids, state))[1]
    )
    decoder = Decoder(model)
    concatenate = states.concatenate
    monkeypatch.setattr(states, "concatenate", lambda parts: (joined.append(len(parts)), concatenate(parts))[1])
    for n in (2, 2, 4):
        decoder.admit([1, 2], max_new_tokens=n)
    decoder.step()
    decoder.admit([1], max_new_tokens=9)
    for _ in range(9):
        decoder.step()
    assert sizes == [3, 4, 2, 2, 1, 1, 1, 1, 1, 1] and joined == [3, 2]


def test_what_a_long_sequence_took_leaves_with_it() -> None:
    """Caches that grow are as long as the longest text in the batch, also behind a retirement."""
    decoder = Decoder(some_model(mixer="attention", n_layers=1))
    long, short = decoder.admit([1] * 50, max_new_tokens=2), decoder.admit([2, 3], max_new_tokens=3)
    other = decoder.admit([1] * 20)
    columns = []
    for _ in range(4):
        decoder.step()
        columns.append(decoder.state[0].k.shape[:2])
    decoder.admit([1])
    decoder.step()
    decoder.retire(other)
    columns.append(decoder.state[0].k.shape[:2])
    assert columns == [(3, 50), (2, 21), (1, 22), (1, 23), (1, 1)]
    assert decoder.retire(long).state[0].k.shape[1] == 51 and decoder.retire(short).state[0].k.shape[1] == 4


@pytest.mark.parametrize("mixer", ["lru", "mamba"])
def test_neighbours_change_no_bit(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of one size, float32: the logits of a row, whatever the others read and how they draw."""
    model = LanguageModel(61, mixer=mixer, d_model=32, n_layers=2)
    frozen, seen = model.frozen_step(), []

    def recording(ids: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = frozen(ids, state)
        seen.append(logits[1].clone())
        return logits, state

    monkeypatch.setattr(model, "frozen_step", lambda: recording)
    runs = []
    for run in range(3):
        seen.clear()
        decoder = Decoder(model)
        for row in range(3):
            own = row == 1
            ids = [5, 6, 7] if own else torch.randint(61, (1 + 8 * run,))
            sampling = Sampling(1.0, top_p=0.9) if own else Sampling(float(run))
            decoder.admit(ids, max_new_tokens=20, sampling=sampling, seed=1 if own else run)
        tokens = [decoder.step()[1].token for _ in range(20)]
        runs.append((torch.stack(seen), tokens))
    assert all(torch.equal(runs[0][0], logits) and runs[0][1] == tokens for logits, tokens in runs[1:])


@every_model
def test_prompts_read_together(options: dict[str, Any]) -> None:
    """As on a GPU: one padded batch, in chunks, behind states or nothing, equals each prompt alone."""
    model = some_model(**options).eval()
    prompts = [torch.randint(V, (n,)) for n in (7, 0, 3, 12)]
    with torch.inference_mode():
        begun = model(torch.randint(V, (1, 4)))[1]
        for starts in ([None] * 4, [None, begun, begun, None]):
            rows = [prefill_alone(model, ids, s, 100) for ids, s in zip(prompts, starts, strict=True)]
            for chunk in (1, 8, 1000):
                together = prefill_together(model, prompts, starts, chunk)
                for i, alone in enumerate(rows):
                    own = states.trim(states.select(together, [i]), model)
                    for a, b in zip(states.leaves(own), states.leaves(alone), strict=True):
                        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = some_model(), []
    features = LanguageModel.features
    monkeypatch.setattr(
        LanguageModel,
        "features",
        lambda self, ids, *a, **k: (read.append(tuple(ids.shape)), features(self, ids, *a, **k))[1],
    )
    for together, expected in ((False, [(1, 8), (1, 8), (1, 3), (1, 8)]), (True, [(2, 4)] * 4 + [(2, 3)])):
        decoder = Decoder(model, prefill_chunk=8)
        decoder._together = together
        decoder.admit([1] * 20)
        decoder.admit([1] * 9)
        decoder.step()
        assert read == expected
        read.clear()


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_known_prefixes_are_not_read_again(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = some_model(mixer=mixer)
    cache, read, features = PrefixCache(1 << 20, every=4), [], LanguageModel.features
    monkeypatch.setattr(
        LanguageModel,
        "features",
        lambda self, ids, *a, **k: (read.append(ids.shape[1]), features(self, ids, *a, **k))[1],
    )
    decoder = Decoder(model, prefix_cache=cache)

    def decode(ids: list[int], **how: Any) -> tuple[list[int], list[int]]:
        read.clear()
        sequence = decoder.admit(ids, max_new_tokens=5, **how)
        for _ in range(5):
            decoder.step()
        own = list(read)
        tokens = decoder.retire(sequence).tokens
        assert tokens[len(ids) :].tolist() == by_formula(model, torch.tensor(ids), 5, -1)
        return own, tokens.tolist()

    prompt = torch.randint(V, (11,)).tolist()
    own, text = decode(prompt)
    assert own == [4, 4, 2]
    assert decode(prompt)[0] == []  # all but the last token, which is read by the step
    assert decode([*prompt[:9], *((t + 1) % V for t in prompt[9:])])[0] == [2]
    assert decode([*text, 5, 6])[0] == [1, 1]  # the conversation goes on, past a multiple of four
    assert decode(prompt[:1])[0] == []
    with torch.no_grad():
        begun = model(torch.tensor([[1, 2]]))[1]
    entries = len(cache)
    for ids in (prompt, prompt[:3]):  # no prefix of any text: neither looked up nor kept
        sequence = decoder.admit(ids, max_new_tokens=3, state=begun)
        for _ in range(3):
            decoder.step()
        tokens = decoder.retire(sequence).tokens[len(ids) :].tolist()
        assert tokens == by_formula(model, torch.tensor([1, 2, *ids]), 3, -1) and len(cache) == entries
    with pytest.raises(ValueError, match="prefix_cache: holds states of another model"):
        Decoder(some_model(mixer=mixer), prefix_cache=cache)


@with_and_without_graphs
def test_states_wait_for_those_who_retire_them(graphs: None) -> None:
    """Others go on in the meantime, and write to none of what is kept."""
    model = some_model()
    decoder = Decoder(model)
    first = decoder.admit([1, 2, 3], max_new_tokens=2)
    while decoder.active or decoder.waiting:
        decoder.step()
    decoder.admit([4, 5])
    for _ in range(3):
        decoder.step()
    tokens, _, state, _ = decoder.retire(first)
    expected = model(tokens[None, :-1])[1]
    for a, b in zip(states.leaves(state), states.leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@with_and_without_graphs
def test_a_step_that_fails_changes_nothing(graphs: None) -> None:
    model = some_model()
    decoder = Decoder(model)
    request = {"ids": [1, 2, 3], "max_new_tokens": 8, "sampling": Sampling(1.0), "seed": 3}
    good = decoder.admit(**request)
    others = [decoder.admit([7 + i]) for i in range(2)]
    decoder.step()
    with torch.no_grad():
        broken = states.map_leaves(lambda leaf: leaf * torch.nan, model(torch.tensor([[1]]))[1])
    bad = decoder.admit([5], state=broken)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"logits: .* NaN, inf or only -inf for sequence 3 .* at its new token 0"):
            decoder.step()
        assert decoder.active == (good, *others) and decoder.waiting == (bad,)
    assert decoder.retire(bad).reason == "retired"
    while good in decoder.active:
        decoder.step()
    assert decoder.retire(good).tokens[3:].tolist() == alone(model, request)


@with_and_without_graphs
def test_a_step_that_fails_late_changes_nothing(monkeypatch: pytest.MonkeyPatch, graphs: None) -> None:
    model = some_model()
    requests = [{"ids": [1, 2], "max_new_tokens": 2}, {"ids": [3], "max_new_tokens": 6}]
    decoder = Decoder(model)
    first, second = (decoder.admit(**request) for request in requests)
    decoder.step()
    with monkeypatch.context() as patch:
        patch.setattr(states, "select", lambda *_: 1 / 0)  # as if memory ran out when the first leaves
        with pytest.raises(ZeroDivisionError):
            decoder.step()
    assert decoder.active == (first, second)
    while decoder.active:
        decoder.step()
    assert [decoder.retire(i).tokens.tolist() for i in (first, second)] == [
        [*request["ids"], *alone(model, request)] for request in requests
    ]


@with_and_without_graphs
def test_the_state_of_the_batch_stays_as_it_was(graphs: None) -> None:
    model = some_model()
    decoder = Decoder(model)
    assert decoder.state is None
    decoder.admit([1, 2, 3])
    for _ in range(4):
        decoder.step()
    held = decoder.state
    kept = states.clone(held)
    decoder.step()
    assert all(a.equal(b) for a, b in zip(states.leaves(held), states.leaves(kept), strict=True))


def test_who_is_taken_out_while_waiting_has_no_state() -> None:
    model = some_model()
    decoder = Decoder(model, capacity=1)
    decoder.admit([1])
    waiting = decoder.admit([2, 3], state=model.init_state(1))
    decoder.step()
    assert decoder.waiting == (waiting,)
    tokens, n_new, state, reason = decoder.retire(waiting)
    assert (tokens.tolist(), n_new, state, reason) == ([2, 3], 0, None, "retired")


def write(model: LanguageModel) -> None:
    model(torch.tensor([[1]]))[0].sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "change",
    [
        write,
        lambda model: model.load_state_dict(some_model().state_dict()),
        lambda model: model.load_state_dict(some_model().state_dict(), assign=True),
        lambda model: model.bfloat16(),
    ],
    ids=["written", "loaded", "replaced", "converted"],
)
def test_a_model_that_changes(change: Any) -> None:
    """Old constants beside new parameters would say what neither model says."""
    model = some_model()
    decoder = Decoder(model)
    sequence = decoder.admit([1, 2])
    decoder.step()
    change(model)
    with pytest.raises(
        RuntimeError, match="model: its parameters were written to or moved since this decoder was made"
    ):
        decoder.step()
    assert decoder.retire(sequence).n_new == 1
    decoder = Decoder(model)
    decoder.admit([1])
    assert len(decoder.step()) == 1
    with torch.inference_mode():  # its tensors count no writes
        unwatched = some_model()
    alone(unwatched, {"ids": [1], "max_new_tokens": 2})


def test_the_mode_is_that_of_the_last_user() -> None:
    """As with threads, whose uses overlap."""
    model = some_model()
    model.embed.eval()
    modules, before = list(model.modules()), [module.training for module in model.modules()]
    first, second = evaluating(modules), evaluating(modules)
    for use, training in (
        (first.__enter__, False),
        (second.__enter__, False),
        (lambda: first.__exit__(None, None, None), False),
    ):
        use()
        assert any(module.training for module in modules) == training
    second.__exit__(None, None, None)
    assert [module.training for module in modules] == before


def test_the_mode_of_the_model() -> None:
    """Dropout is off in a step, and all modules are as they were behind it."""
    model = some_model(dropout=0.5)
    model.backbone.blocks[0].eval()
    before = [module.training for module in model.modules()]
    said = alone(model, {"ids": [1, 2, 3], "max_new_tokens": 8})
    assert [module.training for module in model.modules()] == before and True in before and False in before
    assert said == alone(model.eval(), {"ids": [1, 2, 3], "max_new_tokens": 8})


def test_seeds() -> None:
    model = some_model()
    request = {"ids": [1], "max_new_tokens": 20, "sampling": Sampling(2.0)}
    torch.manual_seed(1)
    first = alone(model, request)
    assert alone(model, request) != first
    torch.manual_seed(1)
    assert alone(model, request) == first
    before = torch.get_rng_state()
    assert alone(model, {**request, "seed": 1}) == alone(model, {**request, "seed": 1})
    alone(model, {**request, "sampling": None})  # draws nothing
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ids": []}, ValueError, "ids: expected at least one token, got none; begin with a BOS token"),
        ({"ids": [0, V]}, ValueError, f"ids: expected ids from 0 to {V - 1}, got {V}"),
        ({"ids": "abc"}, TypeError, r"ids: expected a tensor \(time,\) or a list of integers, got str 'abc'"),
        ({"ids": torch.zeros(2)}, ValueError, r"ids: expected integer token ids of shape \(time,\), got torch.float32"),
        ({"ids": torch.zeros(1, 2).long()}, ValueError, r"ids: .* of shape \(time,\), got torch.int64 \(1, 2\)"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an integer >= 1, got 0"),
        ({"sampling": 0.5}, TypeError, "sampling: expected a Sampling or None, got float 0.5"),
        ({"sampling": Sampling(1.0), "seed": 0.5}, ValueError, "seed: expected an integer .*, got 0.5"),
        ({"eos_id": V}, ValueError, f"eos_id: expected ids from 0 to {V - 1}, got {V}"),
        ({"eos_id": [1, -1]}, ValueError, f"eos_id: expected ids from 0 to {V - 1}, got -1"),
        ({"stop": [1, 2]}, TypeError, "stop: expected sequences of token ids, got int 1 among them"),
        ({"stop": [[]]}, ValueError, "stop: expected at least one token, got none"),
        ({"stop": [[V]]}, ValueError, f"stop: expected ids from 0 to {V - 1}, got {V}"),
        ({"state": (LRUState(torch.zeros(1, 8)),)}, TypeError, "state: expected a tuple of 2 .* states or None"),
        ({"state": some_model().init_state(2)}, ValueError, "state: expected one sequence, got 2"),
    ],
)
def test_bad_requests(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    decoder = Decoder(some_model())
    with pytest.raises(error, match=message):
        decoder.admit(**{"ids": [1, 2], **arguments})
    assert decoder.waiting == () and decoder.step() == []


def test_bad_decoders() -> None:
    with pytest.raises(TypeError, match="model: expected a LanguageModel, got SequenceBackbone"):
        Decoder(SequenceBackbone("lru", 16, 1, bidirectional=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity: expected an integer >= 1, got 0"):
        Decoder(some_model(), capacity=0)
    with pytest.raises(ValueError, match="prefill_chunk: expected an integer >= 1, got 0"):
        Decoder(some_model(), prefill_chunk=0)
    decoder = Decoder(some_model())
    sequence = decoder.admit([1])
    assert decoder.retire(sequence).tokens.tolist() == [1]
    with pytest.raises(ValueError, match="sequence: expected one that was admitted and not retired yet, got 0"):
        decoder.retire(sequence)
