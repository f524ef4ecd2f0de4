"""What a prefix cache finds, forgets and refuses, against a plain list; and that decoding goes on from it."""

import random
import threading
from typing import Any

import pytest
import torch

from linrnn.decode import state as states
from linrnn.decode.prefill import prefill_alone
from linrnn.decode.prefix_cache import PrefixCache, Statistics
from linrnn.models import LanguageModel

MIXERS: list[Any] = ["lru", "mamba", "attention", ["rglru", "attention"], "rwkv4", "gated_deltanet"]


def language_model(mixer: Any, seed: int = 0, **kwargs: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(11, mixer=mixer, d_model=16, n_layers=2, **kwargs).double().eval()


def number(ids: list[int]) -> float:
    """Another one for every list of bits."""
    return float(int("1" + "".join(map(str, ids)), 2))


def some_state(n: float = 0.0, numbers: int = 4) -> tuple[torch.Tensor, ...]:
    return (torch.full((1, numbers), n),)


class Everything:
    """The same rules as a plain list of prefixes, least recently used first."""

    def __init__(self, entries: int):
        self.entries, self.kept = entries, []

    def get(self, ids: list[int]) -> int:
        found = [p for p in self.kept if len(p) < len(ids) and ids[: len(p)] == p]
        if not found:
            return 0
        best = max(found, key=len)
        self.kept.append(self.kept.pop(self.kept.index(best)))
        return len(best)

    def put(self, ids: list[int]) -> None:
        if ids in self.kept:
            self.kept.remove(ids)
        self.kept = [*self.kept, ids][-self.entries :]


def test_the_model_moves() -> None:
    """States stay where they were put, and are brought to the model."""
    model, cache = language_model("lru"), PrefixCache(1 << 20)
    cache.put([1, 2, 3], prefill_alone(model, torch.tensor([1, 2, 3]), None, 8))
    state = prefill_alone(model.to("meta"), torch.tensor([1, 2, 3]), None, 8, cache)
    assert cache.statistics.hits == 1 and all(leaf.is_meta for leaf in states.leaves(state))


@pytest.mark.parametrize("entries", [1, 3, 50])
def test_finds_what_a_list_finds(entries: int) -> None:
    """16 bytes a state, so that max_bytes says how many."""
    cache, plain = PrefixCache(16 * entries + 15), Everything(entries)
    hits = 0
    for turn in range(1500):
        ids = [random.randrange(2) for _ in range(random.randrange(1, 8))]
        if random.random() < 0.5:
            assert cache.put(ids, some_state(number(ids)))
            plain.put(ids)
        else:
            length, state = cache.get(torch.tensor(ids) if turn % 2 else ids)
            assert length == plain.get(ids)
            assert (state is None) == (length == 0)
            if state is not None:
                assert torch.equal(state[0], some_state(number(ids[:length]))[0])
                hits += 1
        assert len(cache) == len(plain.kept) and set(cache._lengths) == set(map(len, plain.kept))
        assert cache.statistics.nbytes == 16 * len(cache) <= cache.max_bytes
    assert cache.statistics.hits == hits > 50
    assert cache.statistics.evicted > 100 or entries == 50


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_a_prompt_goes_on_from_its_prefix(mixer: Any, every: int | None) -> None:
    """The same prompt again, a longer one, and one that only begins alike: as if each was read from its start."""
    model = language_model(mixer)
    cache = PrefixCache(1 << 20, model=model, every=every)
    first = torch.randint(11, (10,))
    other = torch.cat((first[:9], (first[9:] + 1) % 11, first))
    prompts = [first, first, torch.cat((first, first)), other, first[:1], other[1:4]]
    for ids, length in zip(prompts, [0, 9, 9, 9, 0, 0], strict=True):
        before = cache.statistics.reused
        with torch.inference_mode():
            state = prefill_alone(model, ids[:-1], None, 4096, cache)
            logits, state = model.step(ids[-1:], state)
        assert cache.statistics.reused - before == length
        expected, expected_state = model(ids[None])
        torch.testing.assert_close(logits, expected[:, -1], rtol=1e-9, atol=1e-9)
        with torch.inference_mode():
            token = logits.argmax(-1)
            after, expected_after = model.step(token, state)[0], model.step(token, expected_state)[0]
        torch.testing.assert_close(after, expected_after, rtol=1e-9, atol=1e-9)


def test_checkpoints_within_a_prompt() -> None:
    model = language_model("lru")
    ids = torch.randint(11, (15,))
    cache = PrefixCache(1 << 20, every=5)
    prefill_alone(model, ids[:-1], None, 4096, cache)
    assert [cache.get(ids[:n])[0] for n in (15, 14, 11, 10, 6, 5)] == [14, 10, 10, 5, 5, 0]
    longer = torch.cat((ids, ids))
    prefill_alone(model, longer[:-1], None, 3, cache)  # from 14 on: 15, 20, 25 and 29
    assert [cache.get(longer[:n])[0] for n in (30, 29, 21, 16, 15)] == [29, 25, 20, 15, 14]


def test_keeps_copies_without_what_they_are_views_of() -> None:
    """A cache of keys grows in a buffer with room behind it: what is counted is what is kept alive, and no more."""
    model = language_model("attention")
    with torch.no_grad():
        _, state = model(torch.randint(11, (1, 40)))
    alive = sum(leaf.untyped_storage().nbytes() for leaf in states.leaves(state))
    assert alive > states.nbytes(state)
    cache = PrefixCache(1 << 20)
    cache.put(range(40), state)
    _, kept = cache.get(range(41))
    assert sum(leaf.untyped_storage().nbytes() for leaf in states.leaves(kept)) == cache.statistics.nbytes
    assert cache.statistics.nbytes == states.nbytes(state)
    with torch.no_grad():
        for leaf in states.leaves(state):
            leaf.zero_()
    assert all(leaf.any() for leaf in states.leaves(kept))


def test_kept_tensors_belong_to_no_graph_and_to_no_mode() -> None:
    model = language_model("lru")
    ids = torch.randint(11, (6,))
    cache = PrefixCache(1 << 20)
    cache.put(ids[:4], model(ids[None, :4])[1])
    with torch.inference_mode():
        cache.put(ids[:5], model(ids[None, :5])[1])
    for n in (5, 6):
        _, state = cache.get(ids[:n])
        assert not any(leaf.requires_grad or leaf.is_inference() for leaf in states.leaves(state))
        model(ids[None], state)[0].sum().backward()


def test_a_state_larger_than_the_cache() -> None:
    cache = PrefixCache(16)
    assert cache.put([1], some_state())
    assert not cache.put([2], some_state(numbers=5))
    assert cache.get([1, 0])[0] == 1
    assert cache.statistics == Statistics(hits=1, misses=0, reused=1, refused=1, evicted=0, entries=1, nbytes=16)
    cache.clear()
    assert len(cache) == 0 and cache.statistics.nbytes == 0 and cache.get([1, 0]) == (0, None)


def test_belongs_to_one_model() -> None:
    model, cache = language_model("lru"), PrefixCache(1 << 20)
    cache.bind(model)
    cache.bind(language_model("lru"))  # the same weights
    with pytest.raises(ValueError, match=r"prefix_cache: holds states of another model.*\(other weights\)"):
        cache.bind(language_model("lru", seed=1))
    with pytest.raises(ValueError, match=r"another model.*\(other architecture and weights\)"):
        PrefixCache(1, model=model).bind(language_model("slru"))
    with torch.no_grad():
        model.head.weight += 1
    with pytest.raises(ValueError, match=r"or of this one before it changed \(other weights\)"):
        cache.bind(model)
    cache.clear()
    cache.bind(model)
    unbound = PrefixCache(16)
    unbound.put([1], some_state())
    with pytest.raises(ValueError, match="prefix_cache: holds states of an unknown model"):
        unbound.bind(model)


def test_threads() -> None:
    """Whatever interleaves: a state found is that of its prefix, bytes add up, nothing is lost or raised."""
    cache, failures = PrefixCache(16 * 5), []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(400):
                ids = [choose.randrange(2) for _ in range(choose.randrange(1, 6))]
                cache.put(ids, some_state(number(ids)))
                length, state = cache.get([*ids, 0])
                if length:
                    assert state[0][0, 0] == number([*ids, 0][:length])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cache.statistics.nbytes == 16 * len(cache) == 80
    assert cache.statistics.hits + cache.statistics.misses == 1600


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PrefixCache(0), ValueError, "max_bytes: expected an integer >= 1, got 0"),
        (lambda: PrefixCache(1, every=0), ValueError, "every: expected an integer >= 1, got 0"),
        (lambda: PrefixCache(1).get([0.5]), TypeError, "ids: expected integer token ids, got torch.float32"),
        (
            lambda: PrefixCache(1).get([[1]]),
            ValueError,
            r"ids: expected one prompt, of shape \(time,\), got .*\(1, 1\)",
        ),
        (lambda: PrefixCache(1).put([], some_state()), ValueError, "ids: expected at least one token, got none"),
        (
            lambda: PrefixCache(1).put([1], (torch.ones(2, 3),)),
            ValueError,
            "state: expected that of one sequence, got 2",
        ),
        (lambda: PrefixCache(1).put([1], ()), ValueError, "state: expected tensors .* got none"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
