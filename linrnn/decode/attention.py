"""Exact decoding of softmax attention with a chosen memory (kexue.fm 10017): from a KV cache to a constant state.

A causal attention layer at one token is a scan over the tokens before it, with a state of constant size: the running
softmax (m, z, y) of "Self-attention does not need O(n²) memory" (Rabe and Staats 2021, arXiv:2112.05682). Its keys and
values are functions of the layer below at those tokens, which is such a scan again: whoever refuses every cache makes
them again, from the token ids, with one frame (x, q, m, z, y) a layer.
"""

import torch
from torch import Tensor

from linrnn.decode._memories import MEMORIES
from linrnn.decode._stack import AttentionStack
from linrnn.layers.base import positive_int
from linrnn.models.language import LanguageModel
from linrnn.models.tokens import check_ids, check_vocabulary

BLOCK_SIZE = 256


def attention(
    model: LanguageModel, ids: Tensor, memory: str = "kv", *, block_size: int | None = None, positions: str = "last"
) -> Tensor:
    """Maps ids (B, T) to next-token logits (B, V) behind the last one, or (B, T, V) behind each (positions="all").

    Args:
        model: a LanguageModel whose mixers are causal softmax attention with any options, in evaluation mode.
        memory, block_size: as for `AttentionDecoder`.
        positions: "last" or "all".

    Raises:
        TypeError: model is no LanguageModel, ids no tensor.
        ValueError: another mixer, an unknown memory, no tokens, or an id outside the vocabulary.
    """
    if positions not in ("last", "all"):
        raise ValueError(f'positions: expected "last" or "all", got {positions!r}')
    return AttentionDecoder(model, memory=memory, block_size=block_size).extend(ids, positions=positions)


class AttentionDecoder:
    """Reads tokens, in pieces or one by one, and gives the next-token logits: equal for every memory.

    With N layers of width D, L tokens and nb = ceil(L / block_size), what is held between or within two tokens is

        "kv"         keys and values of every layer                   2 N L D     fewer with grouped queries, a window
        "inputs"     inputs of every layer; k, v made on the fly        N L D
        "layerwise"  one layer at a time: input, keys, values           3 L D     recomputes the prefix for each token
        "block"      a frame of block_size tokens a layer    N block_size O(D)    evaluates C(nb + N - 1, N) blocks
        "constant"   "block" at block_size 1: N frames                N O(D)      evaluates C(L + N - 1, N) tokens

    The last three hold the token ids besides, 8 bytes each, and read them again for each token. There is no gradient.

    Args:
        model: a LanguageModel whose mixers are causal softmax attention, in evaluation mode.
        memory: one of the above.
        block_size: tokens evaluated together ("kv": in a prefill; "inputs": also of a page); 256 if None. It changes no
            result. "constant" takes none but 1.

    Attributes:
        length: tokens read so far.
        evaluations: blocks evaluated since `reset_counts`, at each level: embeddings first, the last layer last.
        pairs: blocks of keys that met a block of queries ("kv": none, the layer's own attention runs).
        most_frames: the most frames alive at once.
    """

    def __init__(self, model: LanguageModel, *, memory: str = "kv", block_size: int | None = None):
        if memory not in MEMORIES:
            raise ValueError(f"memory: expected one of {', '.join(MEMORIES)}, got {memory!r}")
        if memory == "constant":
            if block_size not in (None, 1):
                raise ValueError(
                    f'block_size: memory="constant" evaluates single tokens, expected None, got {block_size}'
                )
            block_size = 1
        self.memory, self.model = memory, model
        self.batch_size: int | None = None
        self.block_size = BLOCK_SIZE if block_size is None else positive_int("block_size", block_size)
        self.stack = AttentionStack(model)
        self._memory = MEMORIES[memory](self.stack, self.block_size)

    @torch.no_grad()
    def extend(self, ids: Tensor, *, positions: str = "last") -> Tensor:
        """Reads n >= 1 tokens ids (B, n): the logits behind the last, (B, V), or behind each, (B, n, V).

        A call that fails, or is interrupted, has read nothing: the same one can be made again.
        """
        check_ids("ids", ids)
        if ids.shape[1] == 0:
            raise ValueError(f"ids: expected at least one token, got shape {tuple(ids.shape)}")
        if self.length and self.batch_size != ids.shape[0]:
            raise ValueError(f"ids: expected {self.batch_size} sequences, like the tokens before, got {ids.shape[0]}")
        check_vocabulary("ids", ids, self.model.vocab_size)
        self.stack.check_mode()
        self.stack.live_frames = self.stack.live_frame_bytes = 0  # an interrupted call has left its frames open
        features, kept = self._memory.read(ids.long(), every=positions == "all")
        logits = self.model.read_out(features)
        # last of all: a call that fails, anywhere, leaves the decoder as it was
        self.batch_size = ids.shape[0]
        self._memory.commit(ids.shape[1], kept)
        return logits if positions == "all" else logits[:, -1]

    def step(self, ids_t: Tensor) -> Tensor:
        """Reads one token ids_t (B,) and gives the logits (B, V) of the next."""
        if not isinstance(ids_t, Tensor) or ids_t.ndim != 1:
            raise ValueError(f"ids_t: expected a tensor of shape (batch,), got {ids_t!r}")
        return self.extend(ids_t[:, None])

    def reset_counts(self) -> None:
        """Sets evaluations, pairs and most_frames back to zero."""
        self.stack.reset_counts()

    @property
    def length(self) -> int:
        return self._memory.length

    @property
    def evaluations(self) -> tuple[int, ...]:
        return tuple(self.stack.evaluations)

    @property
    def pairs(self) -> int:
        return self.stack.pairs

    @property
    def most_frames(self) -> int:
        return self.stack.most_frames

    @property
    def state_bytes(self) -> int:
        """Bytes of caches, or of the open frames at their most: what `plan` predicts. Weights and ids come on top."""
        return self._memory.state_bytes

    @property
    def id_bytes(self) -> int:
        """Bytes of the token ids, where the memory reads them again."""
        return self._memory.id_bytes
