"""What one memory costs for one job: bytes and evaluations by formula, working bytes and seconds by calibration."""

import math
from dataclasses import dataclass

import torch

from linrnn.decode._counts import Counts, blocks_of, count
from linrnn.decode.calibration import Calibration


@dataclass(frozen=True)
class Choice:
    """One memory, and what decoding with it comes to.

    state_bytes: caches, or the open frames at their most (what `AttentionDecoder.state_bytes` then says). id_bytes: the
    token ids, where they are read again. working_bytes: what the evaluation at hand needs at its worst, as measured on
    this machine for one block. evaluations: blocks at each level, embeddings first, the last layer last. pairs: blocks
    of keys that meet a block of queries. seconds: estimated for the whole job.
    """

    memory: str
    block_size: int
    state_bytes: int
    id_bytes: int
    working_bytes: int
    evaluations: tuple[int, ...]
    pairs: int
    seconds: float

    @property
    def bytes(self) -> int:
        """All of them together: what is held against the budget. The model's weights come on top."""
        return self.state_bytes + self.id_bytes + self.working_bytes


class Job:
    """Reading `first` tokens in one call, then single ones up to `last`."""

    def __init__(self, calibration: Calibration, first: int, last: int):
        self.calibration, self.stack = calibration, calibration.stack
        self.first, self.last = first, last

    def choice(self, memory: str, block_size: int) -> Choice:
        """Returns a memory's formulas and estimates."""
        state = {"kv": self.kv_bytes, "inputs": self.input_bytes, "layerwise": self.layer_bytes}.get(
            memory, self.frame_bytes
        )
        counts = count(self.stack, memory, block_size, self.first, self.last)
        seconds, working = self.cached(block_size) if memory == "kv" else self.pieces(memory, block_size, counts)
        head_seconds, head_bytes = self.calibration.head()
        ids = 0 if memory in ("kv", "inputs") else 8 * self.last * self.calibration.batch_size
        return Choice(
            memory,
            block_size,
            state_bytes=state(block_size),
            id_bytes=ids,
            working_bytes=max(working, head_bytes + self.row_bytes("x")),
            evaluations=counts.evaluations,
            pairs=counts.pairs,
            seconds=seconds + (self.last - self.first + 1) * head_seconds,
        )

    def pieces(self, memory: str, block_size: int, counts: Counts) -> tuple[float, int]:
        """Estimates seconds and working bytes of a memory made of frames and pairs."""
        size, nb = min(block_size, self.last), blocks_of(self.last, block_size)
        whole = self.calibration.units(size, size)
        # after three blocks, all that can be open at once in two layers has been
        working = self.calibration.working(memory, size, self.last if nb == 1 else min(nb, 3) * size, False)
        if memory != "inputs":
            projections = counts.evaluations[0] * self.stack.n_layers if memory == "layerwise" else None
            if self.first < self.last:  # the ids so far, beside those with one more
                working += 8 * self.last * self.calibration.batch_size
            return whole.seconds(counts, projections), working
        # a prefix in blocks, then single queries against pages
        prefix = count(self.stack, memory, block_size, self.first, self.first)
        steps = Counts(
            tuple(a - b for a, b in zip(counts.evaluations, prefix.evaluations, strict=True)),
            counts.pairs - prefix.pairs,
        )
        working = self.calibration.working(memory, size, min(self.first, 3 * size), False)
        if self.first < self.last:
            working = max(working, self.calibration.working(memory, size, min(self.last, 3 * size), True))
        return whole.seconds(prefix) + self.calibration.units(1, size).seconds(steps), working

    def cached(self, block_size: int) -> tuple[float, int]:
        """Estimates seconds and working bytes of the model's own cache."""
        size, steps = min(block_size, self.first), self.last - self.first
        block, single = self.calibration.cached(size), self.calibration.cached(1)
        nb = blocks_of(self.first, block_size)
        seconds = sum(block.seconds + block.seconds_per_token * self.seen(b * block_size) for b in range(nb))
        seconds += steps * (single.seconds + single.seconds_per_token * self.seen((self.first + self.last) // 2))
        return seconds, max(0, self.cache_peak(size) - self.kv_bytes(block_size))

    def cache_peak(self, size: int) -> int:
        """Returns the most that the model's own cache and a call take: a full buffer is copied into one with room."""
        most, end, capacity = self.calibration.call_bytes(size, 0), size, columns_of(size)
        for rows, stop in ((size, self.first), (1, self.last)):
            while end < stop:
                free = capacity - end
                fit = stop if stop - end <= free else end + free // rows * rows
                if fit > end:  # calls that find room
                    call = self.call_bytes(rows, fit - 1) - self.buffer_bytes(columns_of(fit - 1 + rows), grow=True)
                    most, end = max(most, self.buffer_bytes(capacity, size) + call), fit
                else:  # and one that does not
                    most = max(most, self.buffer_bytes(capacity, size) + self.call_bytes(rows, end))
                    end = min(stop, end + rows)
                    capacity = columns_of(end)
        # logits of the last token, and its features twice, beside the buffers; a state's position may be
        # a view of those of a whole block
        head = self.calibration.head()[1] + 2 * self.row_bytes("x") + self.buffer_bytes(capacity, size)
        return max(most, head) + 8 * (size + 2) * self.stack.n_layers * self.calibration.batch_size

    def call_bytes(self, rows: int, tokens: int) -> int:
        """Returns the bytes that a call makes behind so many tokens: measured, but for long caches extrapolated."""
        call, long = self.calibration.call_bytes, self.calibration.long
        if tokens <= long or all(shape[0] is not None for shape, _ in self.caches()):
            return call(rows, min(tokens, long))
        working = call(rows, long) - self.buffer_bytes(columns_of(long + rows), grow=True)
        return -(-working * tokens // long) + self.buffer_bytes(columns_of(tokens + rows), grow=True)

    def caches(self) -> list[tuple[tuple[int | None, ...], torch.dtype | None]]:
        return [spec for spec in self.specs() if len(spec[0]) > 1]

    def buffer_bytes(self, columns: int, size: int = 0, *, grow: bool = False) -> int:
        """Counts the bytes of buffers of so many columns; those of a window hold at most what a call copies there.

        With `grow`, of those alone that grow with the text.
        """
        total = 0
        for spec in self.specs():
            n = spec[0][0] if spec[0] else 0
            if n is None:
                total += self.spec_bytes(spec) // self.last * columns
            elif not grow:
                most = columns_of(n + size) if n else 1
                total += -(-self.spec_bytes(spec) // max(n, 1)) * most
        return total

    def seen(self, tokens: int) -> int:
        """Returns how many tokens a cache holds after so many, in the layer that holds the most."""
        mixers = [self.stack.mixer(level) for level in range(1, self.stack.n_layers + 1)]
        return max(tokens if m.window is None else min(tokens, m.window + m.sink) for m in mixers)

    def specs(self) -> list[tuple[tuple[int | None, ...], torch.dtype | None]]:
        """Returns shape and dtype of each tensor in the model's state."""
        return [
            spec
            for level in range(1, self.stack.n_layers + 1)
            for spec in self.stack.mixer(level).state_spec().values()
        ]

    def spec_bytes(self, spec: tuple[tuple[int | None, ...], torch.dtype | None]) -> int:
        """Counts the bytes of a tensor of the state after the last token."""
        shape, dtype = spec
        numbers = math.prod(self.last if n is None else n for n in shape)
        return self.calibration.batch_size * numbers * (dtype or self.stack.model.embed.weight.dtype).itemsize

    def kv_bytes(self, block_size: int) -> int:
        return sum(self.spec_bytes(spec) for spec in self.specs())

    def input_bytes(self, block_size: int) -> int:
        return self.stack.n_layers * blocks_of(self.last, block_size) * block_size * self.row_bytes("x")

    def layer_bytes(self, block_size: int) -> int:
        return self.last * (self.row_bytes("x") + self.row_bytes("kv"))

    def frame_bytes(self, block_size: int) -> int:
        """Frames of whole blocks, but for the top one, which is as long as its block so far."""
        nb = blocks_of(self.last, block_size)
        frames = min(self.stack.n_layers, nb)  # each stands before the one above it
        ends = [self.last - (nb - 1) * block_size]
        if self.first <= (nb - 1) * block_size:  # some call has ended with a whole block
            ends.append((min(frames, nb - 1) - frames + 1) * block_size)
        return (max(ends) + (frames - 1) * block_size) * self.row_bytes("frame")

    @torch.no_grad()
    def row_bytes(self, what: str) -> int:
        """Counts the bytes of one token: of a layer's input "x", of keys and values "kv", of a "frame"."""
        stack = self.stack
        x = stack.model.prepare(stack.model.embed(self.calibration.ids(1)))
        if what == "x":
            return x.numel() * x.element_size()
        k, v = stack.keys_values(1, stack.mixed(1, x), 0)
        frame = stack.open(1, x, 0)
        stack.reset_counts()
        return frame.nbytes if what == "frame" else (k.numel() + v.numel()) * k.element_size()


def columns_of(tokens: int) -> int:
    """Returns the columns of a cache's new buffer (`layers.append`)."""
    return tokens + tokens // 2 + 8
