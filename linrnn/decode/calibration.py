"""What the pieces of a model cost on this machine, in seconds and bytes: measured once, in some seconds."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from linrnn.decode._counts import Counts, count, tiles
from linrnn.decode._memories import MEMORIES, BlockRecursion, InputCache
from linrnn.decode._stack import LOGITS, AttentionStack
from linrnn.decode.live import LiveBytes
from linrnn.decode.state import nbytes
from linrnn.layers.base import State, positive_int
from linrnn.models.language import LanguageModel

LONG = 0.02  # seconds of one call from which on larger blocks are extrapolated
LARGE = 1024  # tokens of the largest block whose bytes are measured
TRIAL = 0.02  # seconds of a recursion on a few blocks
CACHES = 32, 4096  # tokens of a short cache and of a long one, of so many bytes at most
CACHE_BYTES = 2**26


@dataclass(frozen=True)
class Units:
    """Costs of one block: seconds of embedding it, of opening and closing a frame, of projecting keys and values, of
    letting a frame meet them."""

    leaf: float
    open: float
    project: float
    attend: float
    close: float

    def seconds(self, counts: Counts, projections: int | None = None) -> float:
        """Adds up what evaluations and pairs cost; keys and values are projected for each pair unless told."""
        frames = sum(counts.evaluations[1:])
        pairs = counts.pairs - frames  # a frame opens with the keys of its own block
        projections = pairs if projections is None else projections
        numbers = counts.evaluations[0], frames, pairs, projections
        costs = self.leaf, self.open + self.close, self.attend, self.project
        return sum(times(number, cost) for number, cost in zip(numbers, costs, strict=True))

    def slower(self, factor: float) -> "Units":
        """The same work, taking so many times as long."""
        leaf, open, project = factor * self.leaf, factor * self.open, factor * self.project
        return Units(leaf, open, project, factor * self.attend, factor * self.close)

    def scaled(self, rows: float, keys: float) -> "Units":
        """Extrapolates to blocks with `rows` times as many queries and `keys` times as many keys."""
        return Units(
            leaf=self.leaf * rows,
            open=self.open * rows * rows,  # a frame opens with the keys of its own block
            project=self.project * keys,
            attend=self.attend * rows * keys,
            close=self.close * rows,
        )


def tile_logits(size: int) -> int:
    """Counts the logits of a head that are held at once where a block meets another."""
    return size * min(size, max(LOGITS // size, 32))


def times(number: int, seconds: float) -> float:
    """Multiplies, where the number may be larger than any float."""
    try:
        return number * seconds
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Cached:
    """Costs of the model's own forward on a few tokens: linear in the tokens that its cache holds."""

    seconds: float
    seconds_per_token: float


class Calibration:
    """Measures a model's pieces when they are asked for, and remembers them.

    Args:
        model: as for `AttentionDecoder`.
        batch_size: sequences decoded together.
    """

    def __init__(self, model: LanguageModel, *, batch_size: int = 1):
        self.stack, self.batch_size = AttentionStack(model), positive_int("batch_size", batch_size)
        self.device = model.embed.weight.device
        self.levels = range(1, self.stack.n_layers + 1)
        self.units, self.cached, self.head = cache(self._units), cache(self._cached), cache(self._head)
        self.working, self.call_bytes = cache(self._working), cache(self._call_bytes)

    @torch.no_grad()
    def _units(self, rows: int, keys: int) -> Units:
        """Returns the costs of blocks of `rows` queries and `keys` keys."""
        small = (max(1, rows // 4), max(1, keys // 4))
        if max(rows, keys) > 64:
            below = self.units(*small)
            if max(below.attend, below.open, below.close) > LONG:
                return below.scaled(rows / small[0], keys / small[1])
        stack, level = self.stack, 1
        ids, earlier = self.ids(rows), self.ids(keys)
        frame = stack.open(level, stack.embed(ids), keys)
        k, v = stack.keys_values(level, stack.mixed(level, stack.embed(earlier)), 0)
        x, u = frame.x, stack.mixed(level, stack.embed(earlier))
        units = Units(
            leaf=self.seconds(lambda: stack.embed(ids)),
            open=self.seconds(lambda: stack.open(level, x, keys)),
            project=self.seconds(lambda: stack.keys_values(level, stack.mixed(level, u), 0)),
            attend=self.seconds(lambda: stack.attend(level, frame, k, v, 0)),
            close=self.seconds(lambda: stack.close(level, frame)),
        )
        # pieces among others take longer than over and over: try a few blocks
        if rows == keys:
            jobs = {nb: count(stack, "block", rows, nb * rows, nb * rows) for nb in range(1, 17)}
            nb = max(nb for nb, job in jobs.items() if nb <= 2 or units.seconds(job) < TRIAL)
            trial = self.ids(nb * rows)
            taken = self.seconds(lambda: BlockRecursion(stack, rows).extend(trial, False))
            units = units.slower(max(1.0, taken / units.seconds(jobs[nb])))
        else:
            pages = InputCache(stack, keys)
            pages.extend(self.ids(2 * keys), False)
            # of a token behind two pages and a bit
            job = Counts((1,) * (stack.n_layers + 1), sum(1 + tiles(stack, n, 2 * keys + 1, keys) for n in self.levels))
            taken = self.seconds(lambda: pages.read(ids, False))
            units = units.slower(max(1.0, taken / units.seconds(job)))
        stack.reset_counts()
        return units

    @torch.no_grad()
    def _cached(self, rows: int) -> Cached:
        """Returns the costs of the model's forward on `rows` tokens behind a cache."""
        model, ids = self.stack.model, self.ids(rows)
        short, long = CACHES[0], self.long
        points = []
        for tokens in (short, long):
            state = tuple(self.filled(level, tokens) for level in self.levels)

            def call() -> None:
                nonlocal state  # each call appends to the state of the one before: to an older one it would copy
                state = model.features(ids, state)[1]

            points.append(self.seconds(call))
        near, far = points
        slope = max(0.0, (far - near) / (long - short))
        return Cached(max(0.0, far - slope * long), slope)

    @property
    def long(self) -> int:
        """Tokens of the longest cache that is tried."""
        row = sum(nbytes(self.filled(level, 1)) for level in self.levels)
        return min(CACHES[1], max(2 * CACHES[0], CACHE_BYTES // row))

    @torch.no_grad()
    def _working(self, memory: str, size: int, tokens: int, step: bool) -> int:
        """Returns the bytes that reading `tokens` tokens in blocks of `size` takes beside state and ids, in two layers.

        With `step` of the last of them alone. More layers hold more state; what one evaluation needs is the same.
        """
        if size > 64:
            small = size // 4
            below = self.units(small, small)
            if size > LARGE or max(below.attend, below.open, below.close) > LONG:
                more = max(size / small, tile_logits(size) / tile_logits(small))
                return math.ceil(more * self.working(memory, small, -(-tokens * small // size), step))
        stack = AttentionStack(self.stack.model)
        stack.n_layers = min(2, stack.n_layers)
        reader, ids = MEMORIES[memory](stack, size), self.ids(tokens)
        held = 0
        if step and tokens > 1:
            reader.extend(ids[:, :-1], False)
            ids, held = ids[:, -1:], reader.state_bytes
        with LiveBytes() as live:
            stack.model.read_out(reader.extend(ids, False))
        return max(0, live.peak - (reader.state_bytes - held) - reader.id_bytes)

    @torch.no_grad()
    def _call_bytes(self, rows: int, tokens: int) -> int:
        """Returns the bytes that the model's forward on `rows` tokens makes, behind a cache of so many or none.

        New buffers are among them: the cache has no room.
        """
        state = tuple(self.filled(level, tokens) for level in self.levels) if tokens else None
        ids = self.ids(rows)
        with LiveBytes() as live:
            self.stack.model.features(ids, state)
        return live.peak

    def filled(self, level: int, tokens: int) -> State:
        """Returns a state of layer `level` that holds `tokens` tokens of zeros."""
        mixer, weight = self.stack.mixer(level), self.stack.model.embed.weight
        fields = {}
        for name, (shape, dtype) in mixer.state_spec().items():
            size = (self.batch_size, *(tokens if n is None else n for n in shape))
            fields[name] = weight.new_full(size, tokens if name == "position" else 0, dtype=dtype or weight.dtype)
        return mixer.state_type(**fields)

    @torch.no_grad()
    def _head(self) -> tuple[float, int]:
        """Returns seconds and bytes of the logits of one token."""
        model = self.stack.model
        h = model.embed(self.ids(1))
        with LiveBytes() as live:
            model.read_out(h)
        return self.seconds(lambda: model.read_out(h)), live.peak

    def ids(self, n: int) -> Tensor:
        """Returns ids (batch_size, n), the same each time and without touching torch's global random numbers."""
        numbers = torch.arange(self.batch_size * n, device=self.device) * 7919
        return numbers.remainder(self.stack.model.vocab_size).view(self.batch_size, n)

    def seconds(self, function: Callable[[], object]) -> float:
        """Returns the median time of a call, of at least three and some thirty milliseconds together."""
        times: list[float] = []
        function()
        while len(times) < 3 or (sum(times) < 0.03 and len(times) < 50):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
