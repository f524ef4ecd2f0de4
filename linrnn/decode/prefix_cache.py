"""States behind the prefixes of token ids that were read before, so that no prompt is read twice."""

import hashlib
import threading
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode.fingerprint import differences
from linrnn.decode.sampling import at_least
from linrnn.layers.base import State, describe
from linrnn.models.language import LanguageModel

Key = tuple[int, bytes]  # how many tokens, and their hash


class Statistics(NamedTuple):
    """What a cache was asked and what it holds.

    hits, misses: calls of `get` that found a prefix, and that found none. reused: tokens that hits saved. refused:
    states larger than the whole cache. evicted: states given up for others. entries, nbytes: what is held now.
    """

    hits: int
    misses: int
    reused: int
    refused: int
    evicted: int
    entries: int
    nbytes: int


class PrefixCache:
    """Remembers states by the token ids that led to them, as many as `max_bytes` hold; the least recently used goes.

    ```python
    decoder = Decoder(model, prefix_cache=PrefixCache(1 << 30))  # reads only what no earlier prompt began with

    length, state = cache.get(ids)  # ids (T,): the longest known prefix of ids[:-1]; 0 and None if there is none
    _, state = model(ids[None, length:-1], state)
    cache.put(ids[:-1], state)
    ```

    A state continues exactly the tokens it has read: unlike a cache of keys and values, that of a recurrent layer
    cannot be cut back. So what is found are prefixes that were put, and no others. `get` finds proper prefixes only:
    the last token of a prompt has to be read for its logits. So keep the state *before* the last token of a prompt, as
    `Decoder` does: it serves the same prompt again and every prompt that begins with it.

    Prefixes are known by a cryptographic hash (BLAKE2b, 256 bits), so no prompt can be made to find the state of
    another. The tensors are copies, without whatever larger buffer the originals are views of, and without their graph
    of gradients; those that `get` returns are the cache's own, to be read and not written to (no call of a model
    does). All methods can be called from several threads.

    Args:
        max_bytes: most that the tensors held take together, in bytes.
        model: whose states these are; None: that of the first `bind`.
        every: a Decoder also puts the states behind each multiple of so many tokens of a prompt, for prompts that only
            begin alike.

    Raises:
        ValueError: max_bytes or every is no integer >= 1.
    """

    def __init__(self, max_bytes: int, *, model: LanguageModel | None = None, every: int | None = None):
        self.max_bytes = at_least(1, "max_bytes", max_bytes)
        self.every = None if every is None else at_least(1, "every", every)
        self._lock = threading.RLock()
        self._entries: OrderedDict[Key, tuple[State, int]] = OrderedDict()  # least recently used first
        self._lengths: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._nbytes = 0
        self._fingerprint: str | None = None
        if model is not None:
            self.bind(model)

    def bind(self, model: LanguageModel) -> None:
        """Makes this the cache of a model, for good or until `clear`.

        Raises:
            ValueError: it is that of a model with another architecture or other weights.
        """
        fingerprint = states.fingerprint(model)
        with self._lock:
            if self._fingerprint is None and self._entries:
                raise ValueError(
                    "prefix_cache: holds states of an unknown model; clear() it or build it with model=..."
                )
            if self._fingerprint not in (None, fingerprint):
                other = " and ".join(differences(str(self._fingerprint), fingerprint))
                raise ValueError(
                    f"prefix_cache: holds states of another model, or of this one before it changed (other {other}); "
                    "clear() it or use a cache for each model"
                )
            self._fingerprint = fingerprint

    def get(self, ids: Tensor | Sequence[int]) -> tuple[int, State]:
        """Returns the length of the longest known prefix of ids (T,), T - 1 at most, and the state of one behind it.

        Without any: 0 and None.
        """
        tokens = token_list(ids)
        with self._lock:
            lengths = sorted(n for n in self._lengths if n < len(tokens))
            for key in reversed(list(keys(tokens, lengths))):
                if key in self._entries:
                    self._entries.move_to_end(key)
                    self._counts.update(hits=1, reused=key[0])
                    return key[0], self._entries[key][0]
            self._counts["misses"] += 1
        return 0, None

    def put(self, ids: Tensor | Sequence[int], state: State) -> bool:
        """Keeps a copy of the state behind ids (T,), of a batch of one; False if it is larger than the whole cache.

        Raises:
            TypeError, ValueError: ids are not integers or none, or the state is not that of one sequence.
        """
        tokens = token_list(ids)
        if not tokens:
            raise ValueError("ids: expected at least one token, got none")
        if states.batch_size(state) != 1:
            raise ValueError(f"state: expected that of one sequence, got {states.batch_size(state)}; select() one")
        (key,) = keys(tokens, [len(tokens)])
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return True
        with torch.inference_mode(False), torch.no_grad():
            copy = states.clone(state)
        size = sum(leaf.untyped_storage().nbytes() for leaf in states.leaves(copy))
        with self._lock:
            if size > self.max_bytes:
                self._counts["refused"] += 1
                return False
        with self._lock:
            if key not in self._entries:  # else another thread was faster
                while self._nbytes + size > self.max_bytes:
                    self._evict()
                self._entries[key] = copy, size
                self._lengths[key[0]] += 1
                self._nbytes += size
        return True

    def clear(self) -> None:
        """Forgets all states and whose they were; the counts of hits and misses go on."""
        with self._lock:
            self._entries.clear()
            self._lengths.clear()
            self._nbytes, self._fingerprint = 0, None

    @property
    def statistics(self) -> Statistics:
        """Hits, misses and what is held."""
        with self._lock:
            counts = {name: self._counts[name] for name in ("hits", "misses", "reused", "refused", "evicted")}
            return Statistics(**counts, entries=len(self._entries), nbytes=self._nbytes)

    def __len__(self) -> int:
        return len(self._entries)

    def _evict(self) -> None:
        (length, _), (_, size) = self._entries.popitem(last=False)
        self._nbytes -= size
        self._counts["evicted"] += 1
        self._lengths[length] -= 1
        if not self._lengths[length]:
            del self._lengths[length]


def keys(tokens: Sequence[int], lengths: Iterable[int]) -> Iterable[Key]:
    """Yields the keys of the prefixes of these lengths, which ascend: each token is hashed once."""
    digest, start = hashlib.blake2b(digest_size=32), 0
    for end in lengths:
        digest.update(array("q", tokens[start:end]).tobytes())
        start = end
        yield end, digest.digest()


def token_list(ids: Tensor | Sequence[int]) -> list[int]:
    """Returns ids (T,) as a list, or raises TypeError or ValueError."""
    if not isinstance(ids, Tensor):
        ids = torch.tensor(ids, dtype=None if len(ids) else torch.int64, device="cpu")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids: expected integer token ids, got {describe(ids)}")
    if ids.ndim != 1:
        raise ValueError(f"ids: expected one prompt, of shape (time,), got {describe(ids)}")
    return ids.tolist()
