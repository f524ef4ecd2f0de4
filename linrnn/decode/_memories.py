"""What to keep between two tokens of a softmax attention model: five ways, one class each, all of them exact."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from linrnn.decode._stack import AttentionStack, blocks, tile_ranges
from linrnn.decode.state import nbytes
from linrnn.layers.base import State


class Memory:
    """Reads tokens and gives what the head reads at the last of them, or at each.

    `read` changes nothing that a later one builds on, `commit` keeps what it gave: whatever happens in between (out of
    memory, an interrupt), the memory is as it was.

    `state_bytes` is what is held between two calls, or, in the middle of one, the most that is held whatever the
    evaluation at hand needs for itself. `id_bytes` are the token ids, where those are read again.
    """

    def __init__(self, stack: AttentionStack, block_size: int):
        self.stack, self.block_size, self.length = stack, block_size, 0
        self.kept: Any = None

    def read(self, ids: Tensor, every: bool) -> tuple[Tensor, Any]:
        """Maps n more ids (B, n) to the features of the last (B, 1, D), or of every one of them (B, n, D).

        Besides, what is to be kept.
        """
        raise NotImplementedError

    def commit(self, n: int, kept: Any) -> None:
        """Keeps what reading n more tokens gave."""
        self.length, self.kept = self.length + n, kept

    def extend(self, ids: Tensor, every: bool) -> Tensor:
        """Reads and commits."""
        features, kept = self.read(ids, every)
        self.commit(ids.shape[1], kept)
        return features

    @property
    def state_bytes(self) -> int:
        raise NotImplementedError

    @property
    def id_bytes(self) -> int:
        return 0

    def tiles(self, level: int, start: int) -> Iterator[tuple[int, int]]:
        """Yields the blocks of tokens before `start` that queries from there on see, each once."""
        for first, last in tile_ranges(self.stack.spans(level, start), start, self.block_size):
            yield from blocks(first * self.block_size, min(last * self.block_size, start), self.block_size)


class KVCache(Memory):
    """Keys and values of every layer: the model's own state."""

    def read(self, ids: Tensor, every: bool) -> tuple[Tensor, State]:
        stack, state, end = self.stack, self.kept, ids.shape[1]
        features: list[Tensor] = []
        for low, high in blocks(0, end, self.block_size):
            h, state = stack.model.features(ids[:, low:high], state)
            for level in range(stack.n_layers + 1):
                stack.evaluations[level] += 1
            if every or high == end:
                features.append(h if every else h[:, -1:].clone())
            del h  # before the next block is evaluated
        return torch.cat(features, 1), state

    @property
    def state_bytes(self) -> int:
        return nbytes(self.kept)


class InputCache(Memory):
    """What the attention of every layer reads, in pages of block_size tokens: keys and values are made of it again."""

    def read(self, ids: Tensor, every: bool) -> tuple[Tensor, list[list[Tensor]]]:
        stack, end = self.stack, self.length + ids.shape[1]
        # lists of its own; of a page that is shared with what is kept, columns behind its end are all that is written
        pages = [list(layer) for layer in self.kept or [[]] * stack.n_layers]
        features: list[Tensor] = []
        for low, high in blocks(self.length, end, self.block_size):
            x = self.block(ids[:, low - self.length : high - self.length], low, pages, every or high == end)
            if every or high == end:
                features.append(x if every else x[:, -1:].clone())
            del x  # before the next block is evaluated
        return stack.normed(torch.cat(features, 1)), pages

    def block(self, ids: Tensor, low: int, pages: list[list[Tensor]], asked: bool) -> Tensor:
        """Returns the last layer's output on one block, or its input unless asked; adds the block to the pages."""
        stack = self.stack
        x = stack.embed(ids)
        for level in range(1, stack.n_layers + 1):
            self.keep(pages[level - 1], stack.mixed(level, x), low)
            if level < stack.n_layers or asked:
                x = self.layer(level, x, low, pages[level - 1])
        return x

    def layer(self, level: int, x: Tensor, low: int, pages: list[Tensor]) -> Tensor:
        frame = self.stack.open(level, x, low)
        for start, stop in self.tiles(level, low):
            page = pages[start // self.block_size][:, : stop - start]
            self.stack.attend(level, frame, *self.stack.keys_values(level, page, start), start)
        return self.stack.close(level, frame)

    def keep(self, pages: list[Tensor], u: Tensor, start: int) -> None:
        if start % self.block_size == 0:
            pages.append(u.new_zeros(u.shape[0], self.block_size, u.shape[2]))
        pages[-1][:, start % self.block_size :][:, : u.shape[1]] = u

    @property
    def state_bytes(self) -> int:
        return nbytes(self.kept)


class IdsOnly(Memory):
    """Nothing but the token ids between two calls."""

    def read(self, ids: Tensor, every: bool) -> tuple[Tensor, Tensor]:
        # a copy: the caller may write other ids into the tensor
        ids = ids.clone() if self.kept is None else torch.cat((self.kept, ids), 1)
        return self.stack.normed(self.features(ids, self.length if every else ids.shape[1] - 1)), ids

    def features(self, ids: Tensor, start: int) -> Tensor:
        """Returns the last layer's output at the tokens from `start` on."""
        raise NotImplementedError

    @property
    def id_bytes(self) -> int:
        return nbytes(self.kept)


class Layerwise(IdsOnly):
    """The prefix recomputed layer by layer: inputs, keys and values of one layer at a time."""

    held = 0

    def features(self, ids: Tensor, start: int) -> Tensor:
        stack, length = self.stack, ids.shape[1]
        parts = list(blocks(0, length, self.block_size))
        x = self.embedded(ids, parts)
        for level in range(1, stack.n_layers + 1):
            k, v = self.keys_values(level, x, parts)
            self.held = nbytes((x, k, v))
            for low, high in parts:
                if level == stack.n_layers and high <= start:
                    continue  # of the last layer only what is asked for
                frame = stack.open(level, x[:, low:high], low)
                for at, stop in self.tiles(level, low):
                    stack.attend(level, frame, k[:, at:stop], v[:, at:stop], at)
                x[:, low:high] = stack.close(level, frame)  # its keys are made: nothing reads the input again
            del k, v  # before those of the next layer are made
        return x[:, start:].clone()

    def embedded(self, ids: Tensor, parts: list[tuple[int, int]]) -> Tensor:
        """Returns level 0, (B, L, D): the one buffer that every layer then overwrites."""
        weight = self.stack.model.embed.weight
        x = weight.new_zeros(*ids.shape, weight.shape[1])
        for low, high in parts:
            x[:, low:high] = self.stack.embed(ids[:, low:high])
        return x

    def keys_values(self, level: int, x: Tensor, parts: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Projects a whole layer's input, block by block, into buffers."""
        k = v = x
        for low, high in parts:
            k_part, v_part = self.stack.keys_values(level, self.stack.mixed(level, x[:, low:high]), low)
            if low == 0:
                k, v = (t.new_zeros(t.shape[0], x.shape[1], *t.shape[2:]) for t in (k_part, v_part))
            k[:, low:high], v[:, low:high] = k_part, v_part
        return k, v

    @property
    def state_bytes(self) -> int:
        return self.held


class BlockRecursion(IdsOnly):
    """One frame a layer, of block_size tokens: what a frame needs of the layer below is evaluated when it is needed."""

    def features(self, ids: Tensor, start: int) -> Tensor:
        outputs = []
        for low, high in blocks(start // self.block_size * self.block_size, ids.shape[1], self.block_size):
            output = self.evaluate(self.stack.n_layers, ids, low, high)
            outputs.append(output[:, start - low :].clone() if start > low else output)
            del output
        return torch.cat(outputs, 1)

    def evaluate(self, level: int, ids: Tensor, low: int, high: int) -> Tensor:
        """Returns layer `level` at tokens low ... high - 1: a recursion as deep as there are layers below."""
        stack = self.stack
        if level == 0:
            return stack.embed(ids[:, low:high])
        frame = stack.open(level, self.evaluate(level - 1, ids, low, high), low)
        for start, stop in self.tiles(level, low):
            # no name for what comes from below: it must be gone when the next block is evaluated
            u = stack.mixed(level, self.evaluate(level - 1, ids, start, stop))
            k, v = stack.keys_values(level, u, start)
            stack.attend(level, frame, k, v, start)
            del u, k, v
        return stack.close(level, frame)

    @property
    def state_bytes(self) -> int:
        return self.stack.most_frame_bytes


MEMORIES: dict[str, type[Memory]] = {
    "kv": KVCache,
    "inputs": InputCache,
    "layerwise": Layerwise,
    "block": BlockRecursion,
    "constant": BlockRecursion,
}
