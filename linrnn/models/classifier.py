"""Sequence classification: embed, mix, pool, read out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linrnn.layers.base import accumulation_dtype, describe, positive_int
from linrnn.models.backbone import SequenceBackbone
from linrnn.models.pretrained import Pretrained
from linrnn.models.tokens import check_ids, embed_ids

POOLINGS = ("mean", "last", "max", "cls", "none")


class SequenceClassifier(Pretrained):
    """Maps token ids (B, T) or reals (B, T, d_input) to logits (B, n_classes), of each token if asked.

    Pooling and mixing see real tokens only (`mask` True); what is written at padded places does not matter. A row
    without any real token pools to zeros. "cls" appends one learned token behind the last real one, where a causal
    model has seen everything, and pools its features.

    Args:
        n_classes: number of classes.
        vocab_size: number of token ids (exactly one of vocab_size and d_input is given).
        d_input: width of real inputs.
        mixer, d_model, n_layers, mixer_kwargs, ffn_expand, norm, prenorm, dropout, bidirectional: the backbone's.
        pooling: "mean", "last" (the last real token), "max" or "cls"; "none" classifies every token.
        two_inputs: compare two sequences a, b: a multilayer perceptron reads their pooled a, b, a - b and a * b.
        max_length: longer inputs are refused; None takes any length.
    """

    def __init__(
        self,
        n_classes: int,
        *,
        vocab_size: int | None = None,
        d_input: int | None = None,
        mixer: str | Sequence[str] = "lru",
        d_model: int = 64,
        n_layers: int = 2,
        pooling: str = "mean",
        two_inputs: bool = False,
        max_length: int | None = None,
        bidirectional: bool = False,
        dropout: float = 0.0,
        mixer_kwargs: Mapping[str, Any] | None = None,
        ffn_expand: float = 2.0,
        norm: str = "rms",
        prenorm: bool = True,
    ):
        super().__init__()
        self.config = self.constructor_arguments(locals())
        positive_int("n_classes", n_classes)
        if (vocab_size is None) == (d_input is None):
            raise ValueError(
                f"vocab_size, d_input: expected exactly one (token ids or real inputs), got {vocab_size}, {d_input}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
        if pooling == "none" and two_inputs:
            raise ValueError('pooling: expected one vector per sequence for two inputs, got "none"')
        self.max_length = None if max_length is None else positive_int("max_length", max_length)
        self.vocab_size, self.d_input, self.pooling, self.two_inputs = vocab_size, d_input, pooling, two_inputs
        self.backbone = SequenceBackbone(
            mixer,
            d_model,
            n_layers,
            mixer_kwargs=mixer_kwargs,
            ffn_expand=ffn_expand,
            norm=norm,
            prenorm=prenorm,
            dropout=dropout,
            bidirectional=bidirectional,
        )
        self.embed: nn.Module
        if vocab_size is not None:
            self.embed = nn.Embedding(positive_int("vocab_size", vocab_size), d_model)
        elif d_input is not None:
            self.embed = nn.Linear(positive_int("d_input", d_input), d_model)
        self.cls = nn.Parameter(torch.randn(d_model)) if pooling == "cls" else None
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Module
        if two_inputs:
            self.head = nn.Sequential(nn.Linear(4 * d_model, d_model), nn.GELU(), nn.Linear(d_model, n_classes))
        else:
            self.head = nn.Linear(d_model, n_classes)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, x2: Tensor | None = None, mask2: Tensor | None = None
    ) -> Tensor:
        """Maps inputs (and their masks (B, T) bool, True on real tokens) to logits (B, n_classes).

        Without pooling they are (B, T, n_classes).

        Raises:
            ValueError: a wrong shape, an id outside the vocabulary, a sequence longer than max_length, or a second
                input where none is expected or none where one is.
        """
        if (x2 is not None) != self.two_inputs:
            raise ValueError(f"x2: expected {'a second input' if self.two_inputs else 'None'}, got {describe(x2)}")
        if mask2 is not None and x2 is None:
            raise ValueError("mask2: expected None without x2, got a mask")
        pooled = self.pool(x, mask)
        if x2 is None:
            return self.read_out(pooled)
        second = self.pool(x2, mask2)
        if pooled.shape != second.shape:
            raise ValueError(f"x2: expected the batch size of x, {pooled.shape[0]}, got {second.shape[0]}")
        return self.read_out(pooled, second)

    def read_out(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Maps what `pool` returns of an input, or of both, to logits: (B, d_model) to (B, n_classes).

        Without pooling it takes any number of tokens: (B, n, d_model) to (B, n, n_classes).
        """
        return self.head(self.dropout(a if b is None else torch.cat((a, b, a - b, a * b), -1)))

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps inputs to the features of each token behind the last norm, (B, T, d_model)."""
        return self.backbone(self.embed_inputs(x, mask), mask=mask)[0]

    def pool(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps inputs to one vector per sequence, (B, d_model), or per token without pooling, (B, T, d_model)."""
        if self.pooling == "none":
            return self.features(x, mask)
        if self.cls is None:
            return pool(self.features(x, mask), mask, self.pooling)
        e = self.embed_inputs(x, mask)
        e = torch.cat((e, self.cls.to(e.dtype).expand(e.shape[0], 1, -1)), 1)  # (B, T + 1, D)
        # padded tokens change no state and count no position: behind them is behind the last real token
        mask = None if mask is None else torch.cat((mask, mask.new_ones(mask.shape[0], 1)), 1)
        return self.backbone(e, mask=mask)[0][:, -1]

    def embed_inputs(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps inputs to embeddings (B, T, d_model); padded ones become those of id 0, or of zeros."""
        self.check_inputs(x, mask)
        if isinstance(self.embed, nn.Embedding):
            return embed_ids("x", x, self.embed, mask)
        return self.embed(x if mask is None else x.masked_fill(~mask[..., None], 0))

    def check_inputs(self, x: Tensor, mask: Tensor | None) -> None:
        """Raises ValueError or TypeError for inputs that the model cannot take."""
        if self.d_input is None:
            check_ids("x", x)
        elif not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {describe(x)}")
        elif not x.is_floating_point():
            raise ValueError(f"x: expected floating point inputs, got {x.dtype}")
        elif x.ndim != 3 or x.shape[-1] != self.d_input:
            raise ValueError(f"x: expected shape (batch, time, {self.d_input}), got {tuple(x.shape)}")
        if self.max_length is not None and x.shape[1] > self.max_length:
            raise ValueError(f"x: expected at most max_length = {self.max_length} tokens, got {x.shape[1]}")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                raise ValueError(f"mask: expected a bool tensor, True on real tokens, got {describe(mask)}")
            if mask.shape != x.shape[:2]:
                raise ValueError(f"mask: expected shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")


def pool(h: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """Pools features (B, T, D) over the real tokens ("mean", "last" or "max"); zeros where there are none."""
    B, T, D = h.shape
    if T == 0:
        return h.new_zeros(B, D)
    if mask is None:
        return h.mean(1) if pooling == "mean" else h[:, -1] if pooling == "last" else h.amax(1)
    count = mask.sum(1, keepdim=True)  # (B, 1)
    if pooling == "mean":
        # weights first, since a sum of thousands of features overflows fp16
        weight = mask.to(accumulation_dtype(h.dtype)) / count.clamp(min=1)  # (B, T)
        return (weight.to(h.dtype)[:, None] @ h)[:, 0]
    if pooling == "max":
        best = h.masked_fill(~mask[..., None], float("-inf")).amax(1)
        return best.masked_fill(count == 0, 0)
    last = torch.where(mask, torch.arange(T, device=h.device), 0).amax(1)  # (B)
    return h[torch.arange(B, device=h.device), last].masked_fill(count == 0, 0)
