"""A causal softmax attention model in pieces: a block of tokens embedded, opened against keys, closed, read out."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from linrnn.layers.attention import Attention, rotate
from linrnn.layers.base import accumulation_dtype
from linrnn.models.backbone import Block
from linrnn.models.language import LanguageModel
from linrnn.models.tokens import embed_ids

TILE = 256  # keys that meet a block of queries at once: it bounds the scores that are held, whatever the block


@dataclass(slots=True)
class Frame:
    """A block of m tokens in the middle of one layer: its input, its queries, and the running softmax of each.

    start: position of the first token; x (B, m, D); q (B, m, H, K); peak, z (B, H, m) and y (B, H, m, V): largest score
    so far, sums of exp(score - peak) and of exp(score - peak) v, at least float32: the (m, z, y) of an online softmax.
    """

    start: int
    x: Tensor
    q: Tensor
    peak: Tensor
    z: Tensor
    y: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.q, self.peak, self.z, self.y))


class AttentionStack:
    """The pieces of a `LanguageModel` whose mixers are all causal softmax attention, and what has been done with them.

    Level 0 is the embedding, level l the output of layer l. `evaluations[l]` counts the blocks evaluated at level l,
    `pairs` the blocks of keys that met a block of queries; `live_frames` the frames open now, with `most_frames` and
    `most_frame_bytes` the most there have been.
    """

    def __init__(self, model: LanguageModel):
        if not isinstance(model, LanguageModel):
            raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
        for i, mixer in enumerate(model.backbone.mixers):
            if not isinstance(mixer, Attention):
                raise ValueError(
                    f"model: expected softmax attention in every layer, got {type(mixer).__name__} in layer {i}; "
                    "a recurrent layer decodes with constant memory by itself: use model.step"
                )
        if model.training and any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules()):
            raise ValueError("model: expected evaluation mode, got training mode with dropout; call model.eval()")
        self.model = model
        self.n_layers = len(model.backbone.blocks)
        self.reset_counts()

    def reset_counts(self) -> None:
        self.evaluations = [0] * (self.n_layers + 1)
        self.pairs = self.live_frames = self.most_frames = self.live_frame_bytes = self.most_frame_bytes = 0

    def block(self, level: int) -> Block:
        """Returns the block of layer `level`, counted from 1."""
        return cast(Block, self.model.backbone.blocks[level - 1])

    def mixer(self, level: int) -> Attention:
        """Returns the attention of layer `level`."""
        return cast(Attention, self.block(level).mixer)

    def spans(self, level: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Returns the spans of earlier tokens that some query at start ... stop - 1 sees in layer `level`."""
        return [(0, start)]

    def embed(self, ids: Tensor) -> Tensor:
        """Maps a block of ids (B, m) to level 0, (B, m, D)."""
        self.evaluations[0] += 1
        return embed_ids("ids", ids, self.model.embed)

    def mixed(self, level: int, x: Tensor) -> Tensor:
        """Returns what the attention of layer `level` reads, given the layer's input x."""
        return self.block(level).mixer_input(x)

    def project(self, level: int, u: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Maps what the attention reads, (B, m, D) at positions start ..., to q, k, v (B, m, H, K)."""
        mixer = self.mixer(level)
        qk, v = mixer.qkv(u).unflatten(-1, (3, mixer.n_heads, mixer.d_head)).split((2, 1), 2)
        if mixer.rope_base is not None:
            qk = rotate(qk, torch.arange(start, start + u.shape[1], device=u.device)[None], mixer.rope_base)
        (q, k), v = qk.unbind(2), v.squeeze(2)
        return q, k, v

    def keys_values(self, level: int, u: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Maps what the attention reads, (B, n, D) at positions start ..., to k, v (B, n, H, K)."""
        return self.project(level, u, start)[1:]

    def scores(self, level: int, q: Tensor, k: Tensor, start: int, at: int) -> Tensor:
        dtype = accumulation_dtype(q.dtype)
        score = torch.einsum("bmhk,bnhk->bhmn", q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype))
        if at + k.shape[1] > start:
            query = torch.arange(start, start + q.shape[1], device=q.device)
            key = torch.arange(at, at + k.shape[1], device=q.device)
            score = score.masked_fill_(key > query[:, None], float("-inf"))
        return score

    def open(self, level: int, x: Tensor, start: int) -> Frame:
        """Begins layer `level` on a block x (B, m, D): its queries have met the keys of their own block."""
        q, k, v = self.project(level, self.mixed(level, x), start)
        B, m, H, _ = q.shape
        dtype = accumulation_dtype(q.dtype)
        # a finite bottom, so that a row that sees nothing of a tile does not become inf - inf
        peak = q.new_full((B, H, m), torch.finfo(dtype).min, dtype=dtype)
        frame = Frame(start, x, q, peak, torch.zeros_like(peak), q.new_zeros((B, H, m, v.shape[-1]), dtype=dtype))
        self.evaluations[level] += 1
        self.live_frames += 1
        self.live_frame_bytes += frame.nbytes
        self.most_frames = max(self.most_frames, self.live_frames)
        self.most_frame_bytes = max(self.most_frame_bytes, self.live_frame_bytes)
        self.attend(level, frame, k, v, start)
        return frame

    def attend(self, level: int, frame: Frame, k: Tensor, v: Tensor, start: int) -> None:
        """Lets the queries of a frame meet keys and values (B, n, H, K) at positions start ...: the frame moves on."""
        self.pairs += 1
        for tile in range(0, k.shape[1], TILE):
            self.meet(level, frame, k[:, tile : tile + TILE], v[:, tile : tile + TILE], start + tile)

    def meet(self, level: int, frame: Frame, k: Tensor, v: Tensor, start: int) -> None:
        score = self.scores(level, frame.q, k, frame.start, start)  # (B, H, m, n), -inf where unseen
        peak = torch.maximum(frame.peak, score.amax(-1))
        p = score.sub_(peak[..., None]).exp_()
        old = (frame.peak - peak).exp_()
        frame.z.mul_(old).add_(p.sum(-1))
        frame.y.mul_(old[..., None]).add_(p @ v.transpose(1, 2).to(p.dtype))
        frame.peak = peak

    def close(self, level: int, frame: Frame) -> Tensor:
        """Ends layer `level` on a block whose queries have met all they see: its output (B, m, D)."""
        o = (frame.y / frame.z[..., None]).transpose(1, 2).to(frame.x.dtype)  # (B, m, H, V)
        self.live_frames -= 1
        self.live_frame_bytes -= frame.nbytes
        return self.block(level).finish(frame.x, self.mixer(level).out(o.flatten(-2)))

    def normed(self, h: Tensor) -> Tensor:
        """Maps the last layer's output (B, m, D) to what the head reads."""
        return self.model.backbone.norm(h)


def blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields the parts of start ... stop - 1 that multiples of `size` cut off."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end
