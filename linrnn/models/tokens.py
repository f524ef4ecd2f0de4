"""Token ids on their way into an embedding."""

import torch
from torch import Tensor, nn

from linrnn.layers.base import describe
from linrnn.ops._backend import unwatched


def check_ids(name: str, ids: Tensor) -> None:
    """Raises TypeError or ValueError, naming the argument, unless `ids` is an integer tensor (B, T)."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(ids)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer token ids, got {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"{name}: expected token ids of shape (batch, time), got {tuple(ids.shape)}")


def embed_ids(name: str, ids: Tensor, embedding: nn.Embedding, mask: Tensor | None = None) -> Tensor:
    """Maps ids (B, T) to embeddings (B, T, D); a padded one (`mask` False) to that of id 0, whatever stands there.

    Raises:
        ValueError: an id outside the vocabulary, on a CPU; elsewhere the embedding itself raises.
    """
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    check_vocabulary(name, ids, embedding.num_embeddings)
    return embedding(ids.long())


def check_vocabulary(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError, naming the argument, for an id outside the vocabulary where that can be seen for nothing."""
    # reading ids back from a GPU would stop it at every call, and torch.func cannot; there the embedding raises
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() and unwatched((ids,)):
        low, high = (int(v) for v in ids.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"{name}: expected ids from 0 to {vocab_size - 1}, got {low if low < 0 else high}; "
                "mark padding with mask"
            )
