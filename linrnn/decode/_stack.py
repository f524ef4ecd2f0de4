"""A causal softmax attention model in pieces: blocks of tokens are embedded, opened, meet keys, and are closed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from linrnn.decode.state import nbytes
from linrnn.layers.attention import Attention
from linrnn.layers.base import RecurrentLayer
from linrnn.layers.online_softmax import SoftmaxSum, absorb, read_out, softmax_sum
from linrnn.models.block import Block
from linrnn.models.language import LanguageModel

# for each head, how many are held at once where that leaves 32 keys: few beside a frame, many for a call
LOGITS = 2**15


@dataclass(slots=True)
class Frame:
    """A block of C tokens in the middle of one layer: its input x (B, C, D), its queries q (B, C, H, K), from position
    `start` on, and the running softmax (m, z, y) of each, at least float32."""

    start: int
    x: Tensor
    q: Tensor
    total: SoftmaxSum

    @property
    def nbytes(self) -> int:
        return nbytes((self.x, self.q, self.total))


class AttentionStack:
    """The pieces of a `LanguageModel` whose mixers are all causal softmax attention, and what has been done with them.

    Level 0 is the embedding, level l the output of layer l. `evaluations[l]` counts the blocks evaluated at level l,
    `pairs` the blocks of keys that met a block of queries; `live_frames` are the frames open now, `most_frames` and
    `most_frame_bytes` the most there have been.
    """

    def __init__(self, model: LanguageModel):
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
        for i, mixer in enumerate(model.backbone.mixers):
            if not isinstance(mixer, Attention):
                raise ValueError(
                    f"model: expected softmax attention in every layer, got {type(mixer).__name__} in layer {i}; "
                    "a recurrent layer has a small state by itself: use model.step"
                )
        if any(isinstance(block.ffn, RecurrentLayer) for block in model.backbone.blocks):
            raise ValueError("model: expected feed-forward networks without a state, got ffn='channel_mix'")
        self.model = model
        self.droppers = [(m, "p" if isinstance(m, nn.Dropout) else "dropout") for m in model.modules() if drops(m)]
        self.check_mode()
        self.n_layers = len(model.backbone.blocks)
        self.reset_counts()

    def check_mode(self) -> None:
        """Raises ValueError if something would be dropped at random: no two memories would agree."""
        if any(module.training and getattr(module, rate) > 0 for module, rate in self.droppers):
            raise ValueError("model: expected evaluation mode, got training mode with dropout; call model.eval()")

    def reset_counts(self) -> None:
        self.evaluations = [0] * (self.n_layers + 1)
        self.pairs = self.live_frames = self.most_frames = self.live_frame_bytes = self.most_frame_bytes = 0

    def block(self, level: int) -> Block:
        """Returns the block of layer `level`, counted from 1."""
        return cast(Block, self.model.backbone.blocks[level - 1])

    def mixer(self, level: int) -> Attention:
        """Returns the attention of layer `level`."""
        return cast(Attention, self.block(level).mixer)

    def spans(self, level: int, start: int) -> list[tuple[int, int]]:
        """Returns the spans of tokens before `start` that the queries from `start` on see in layer `level`."""
        mixer = self.mixer(level)
        if mixer.window is None:
            return [(0, start)]
        return [(0, min(mixer.sink, start)), (max(0, start - mixer.window + 1), start)]

    def embed(self, ids: Tensor) -> Tensor:
        """Maps a block of ids (B, C), int64 and checked, to level 0, (B, C, D)."""
        self.evaluations[0] += 1
        return self.model.prepare(self.model.embed(ids))

    def mixed(self, level: int, x: Tensor) -> Tensor:
        """Returns what the attention of layer `level` reads, given the layer's input x."""
        return self.block(level).mixer_input(x)

    def project(self, level: int, u: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maps what the attention reads, (B, C, D) at positions start ..., to q, k, v (B, C, H or H_kv, K)."""
        return self.mixer(level).project(u, places(u, start)[None])

    def keys_values(self, level: int, u: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Maps what the attention reads, (B, W, D) at positions start ..., to k, v (B, W, H_kv, K)."""
        return self.project(level, u, start)[1:]

    def open(self, level: int, x: Tensor, start: int) -> Frame:
        """Begins layer `level` on a block x (B, C, D): its queries have met the keys of their own block."""
        q, k, v = self.project(level, self.mixed(level, x), start)
        q = q.clone()  # a view would keep the keys alive, or all that was projected, as long as the frame
        frame = Frame(start, x, q, softmax_sum(q, v.shape[-1]))
        self.evaluations[level] += 1
        self.live_frames += 1
        self.live_frame_bytes += frame.nbytes
        self.most_frames = max(self.most_frames, self.live_frames)
        self.most_frame_bytes = max(self.most_frame_bytes, self.live_frame_bytes)
        self.attend(level, frame, k, v, start)
        return frame

    def attend(self, level: int, frame: Frame, k: Tensor, v: Tensor, start: int) -> None:
        """Lets the queries of a frame meet keys and values (B, W, H_kv, K) at positions start ...: it moves on."""
        self.pairs += 1
        mixer, query = self.mixer(level), places(frame.q, frame.start)
        size = max(LOGITS // len(query), 32)
        for tile in range(0, k.shape[1], size):
            k_tile, v_tile = k[:, tile : tile + size], v[:, tile : tile + size]
            key = places(k_tile, start + tile)
            logits = mixer.scores(frame.q, k_tile, query, key)  # (B, H, C, W), at least float32
            if mixer.window is not None or start + tile + len(key) > frame.start:
                logits.masked_fill_(~mixer.visible(query, key), -torch.inf)
            frame.total = absorb(frame.total, logits, v_tile)

    def close(self, level: int, frame: Frame) -> Tensor:
        """Ends layer `level` on a block whose queries have met all they see: its output (B, C, D)."""
        self.live_frames -= 1
        self.live_frame_bytes -= frame.nbytes
        o = read_out(frame.total).to(frame.x.dtype)  # (B, C, H, K)
        return self.block(level).finish(frame.x, self.mixer(level).merge(o))

    def normed(self, h: Tensor) -> Tensor:
        """Maps the last layer's output (B, C, D) to what the head reads."""
        return self.model.backbone.norm(h)


def drops(module: nn.Module) -> bool:
    """Whether a module has a probability of dropping something, be it zero."""
    return isinstance(module, (nn.Dropout, Attention))


def places(x: Tensor, start: int) -> Tensor:
    """Returns the positions of the tokens of x (B, C, ...), the first of which is at `start`."""
    return torch.arange(start, start + x.shape[1], device=x.device)


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the parts of start ... stop - 1 that multiples of `size` cut off."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end


def tile_ranges(spans: list[tuple[int, int]], start: int, size: int) -> list[tuple[int, int]]:
    """Returns the blocks of `size` tokens that spans before `start` touch, as ranges of block numbers, each once."""
    ranges, seen = [], 0
    for low, high in spans:
        first, last = max(seen, low // size), -(-min(high, start) // size)
        if first < last:
            ranges.append((first, last))
            seen = last
    return ranges
