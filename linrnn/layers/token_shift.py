"""What RWKV's layers share: the token before each token, and an initialisation that depends on the layer's place."""

import torch
from torch import Tensor

from linrnn.layers.base import positive_int


def token_shift(x: Tensor, last: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Maps x (B, T, D) to the token before each, (B, T, D), and to the last real token of the open document, (B, D).

    `last` (B, D) is the token before the first, None or zero at the start of a document. Padded tokens are passed
    over; a reset makes the token before zero.
    """
    B, T, D = x.shape
    zero = x.new_zeros(B, D)
    carried = zero if last is None else last.to(x.dtype)
    if T == 0:
        return x, carried.clone()
    window = torch.cat((carried[:, None], x), 1)  # (B, T + 1, D): x_t is at t + 1
    if mask is None:
        before = window[:, :-1]
        return before if reset is None else torch.where(reset[..., None], 0, before), x[:, -1].clone()

    time = torch.arange(T, device=x.device)
    latest = torch.where(mask, time + 1, 0).cummax(1).values  # (B, T): where in the window the last real token is
    latest = torch.cat((torch.zeros_like(latest[:, :1]), latest), 1)  # (B, T + 1): of those before t, and at the end
    found = window.gather(1, latest[..., None].expand(B, T + 1, D))
    if reset is not None:
        # the window's index just before a document's first token; -1, which is before all, in the carried one
        start = torch.where(reset, time, -1).cummax(1).values
        start = torch.cat((start, start[:, -1:]), 1)
        found = torch.where((latest > start)[..., None], found, 0)
    return found[:, :-1], found[:, -1].clone()


def layer_ratios(layer_index: int, n_layers: int) -> tuple[float, float]:
    """Returns how deep a layer lies: from 0 (first) to 1 (last), and from 1 to just above 0.

    Raises:
        ValueError: n_layers is no positive integer, or layer_index none from 0 to n_layers - 1.
    """
    positive_int("n_layers", n_layers)
    if not isinstance(layer_index, int) or isinstance(layer_index, bool) or not 0 <= layer_index < n_layers:
        raise ValueError(
            f"layer_index: expected an integer from 0 to n_layers - 1 = {n_layers - 1}, got {layer_index!r}"
        )
    return layer_index / max(n_layers - 1, 1), 1 - layer_index / n_layers
