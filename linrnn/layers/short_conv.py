"""The short causal convolution in front of a recurrence, as a module with a state.

The state of linear attention learns to map k to v. Both come from the same token, so that without a convolution it
learns to predict a token from itself; with one on k, k_{t-1}, k_t -> v_t is an n-gram (kexue.fm 11320).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import StateSpec, accumulation_dtype, positive_int
from linrnn.layers.ring import last_of_document
from linrnn.ops import causal_conv1d

STREAMS = ("none", "k", "qkv")


class ShortConv(nn.Module):
    """y_t = act(bias + sum_j weight[:, W-1-j] * x_{t-j}), j < W: a filter of width W for each channel.

    Its state are the last W - 1 inputs, (B, W-1, D), at least float32. It loads the filters of a torch.nn.Conv1d with a
    group for each channel, (D, 1, W), as well as its own, (D, W).

    Args:
        channels: number D of channels.
        width: length W of the filters.
        bias: whether there is one.
        activation: "silu" or None.
    """

    def __init__(self, channels: int, *, width: int = 4, bias: bool = False, activation: str | None = "silu"):
        super().__init__()
        self.channels, self.width = positive_int("channels", channels), positive_int("conv_width", width)
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(channels, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.register_load_state_dict_pre_hook(take_filters_of_conv1d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±W^-0.5, as torch.nn.Conv1d with a group for each channel."""
        bound = self.width**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def state_spec(self) -> StateSpec:
        return {"conv": ((self.width - 1, self.channels), accumulation_dtype(self.weight.dtype))}

    def forward(
        self, x: Tensor, state: Tensor | None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps x (B, T, D) and a state (None is zero) to y (B, T, D) and the next state."""
        return causal_conv1d(x, self.weight, self.bias, state, activation=self.activation, reset=reset, mask=mask)


def odd_width(name: str, width: int) -> int:
    """Returns the length of a filter with as many taps ahead as behind, or raises ValueError naming the argument."""
    if positive_int(name, width) % 2 == 0:
        raise ValueError(f"{name}: expected an odd number, as a centred filter has, got {width}")
    return width


def centred_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, reset: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """Convolves within documents: y_t = bias + sum_j weight[:, W//2 - j] * x_{t-j}, |j| <= W//2, W odd.

    Maps x (B, T, D) and filters (D, W) to y (B, T, D). Padded tokens are passed over; outputs there mean nothing.
    """
    half = weight.shape[1] // 2
    y, _ = causal_conv1d(x, weight[:, : half + 1], bias, reset=reset, mask=mask)
    if half == 0:
        return y
    later = F.pad(weight[:, half + 1 :].flip(1), (0, 1))  # without the token itself
    ahead = last_of_document(reset)
    flipped, _ = causal_conv1d(
        x.flip(1),
        later,
        reset=None if ahead is None else ahead.flip(1),
        mask=None if mask is None else mask.flip(1),
    )
    return y + flipped.flip(1)


def take_filters_of_conv1d(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Takes the axis of length one out of the filters of a torch.nn.Conv1d."""
    name = f"{prefix}weight"
    weight = state_dict.get(name)
    if isinstance(weight, Tensor) and weight.ndim == 3 and weight.shape[1] == 1:
        state_dict[name] = weight[:, 0]


class QKVConv(nn.Module):
    """Convolves none, the keys, or all of q, k and v; the activation comes after, for all three streams alike.

    Args:
        streams: "none", "k" or "qkv".
        sizes: channels of q, k and v.
        width: length W of the filters.
        activation: "silu" or None.
    """

    def __init__(self, streams: str, sizes: tuple[int, int, int], *, width: int = 4, activation: str | None = "silu"):
        super().__init__()
        if streams not in STREAMS:
            raise ValueError(f"conv: expected one of {', '.join(map(repr, STREAMS))}, got {streams!r}")
        self.streams, self.sizes, self.activation = streams, sizes, activation
        channels = {"k": sizes[1], "qkv": sum(sizes)}
        self.conv = None if streams == "none" else ShortConv(channels[streams], width=width, activation=activation)

    def reset_parameters(self) -> None:
        """Draws new filters."""
        if self.conv is not None:
            self.conv.reset_parameters()

    def state_spec(self) -> StateSpec:
        """Returns the field `conv`, or none if nothing is convolved."""
        return {} if self.conv is None else self.conv.state_spec()

    def forward(
        self, qkv: Tensor, state: Tensor | None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """Maps q, k and v side by side, (B, T, sum of sizes), and a state to (q, k, v) and the next state."""
        if self.conv is not None and self.streams == "qkv":
            qkv, state = self.conv(qkv, state, reset=reset, mask=mask)
        elif self.activation is not None and self.conv is None:
            qkv = F.silu(qkv)
        q, k, v = qkv.split(self.sizes, -1)
        if self.conv is not None and self.streams == "k":
            k, state = self.conv(k, state, reset=reset, mask=mask)
            q, v = (x if self.activation is None else F.silu(x) for x in (q, v))
        return (q, k, v), state
