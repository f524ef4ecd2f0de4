"""Feed-forward networks of a block, by name."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, positive_int
from linrnn.layers.channel_mix import ChannelMix
from linrnn.layers.frozen import CannotEmit, linear, plain
from linrnn.ops.step_program import Ref, StepProgram


class GatedFFN(nn.Module):
    """y = W_out (act(W_gate x) * W_in x): SwiGLU with silu, GeGLU with gelu (Shazeer 2020, arXiv:2002.05202).

    Args:
        d_model: width D of input and output.
        expand: hidden width relative to d_model, rounded to a multiple of 8.
        activation: act.
        bias: whether the projections have biases.
        d_hidden: the hidden width itself, whatever `expand` says.
    """

    def __init__(
        self,
        d_model: int,
        expand: float,
        *,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        d_hidden: int | None = None,
    ):
        super().__init__()
        if d_hidden is None:
            if not expand > 0:
                raise ValueError(f"ffn_expand: expected a number > 0, got {expand}")
            d_hidden = max(8, 8 * round(expand * d_model / 8))
        self.activation = activation
        self.gate_in = nn.Linear(d_model, 2 * positive_int("d_hidden", d_hidden), bias=bias)
        self.out = nn.Linear(d_hidden, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x (..., D) to y (..., D)."""
        gate, value = self.gate_in(x).chunk(2, -1)
        return self.out(self.activation(gate) * value)

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the network into a program; see `linrnn.layers.frozen`."""
        name = next((name for name, function in ACTIVATIONS.items() if function is self.activation), None)
        plain(nn.Linear, self.gate_in)
        if name is None:
            raise CannotEmit
        weights = self.gate_in.weight.chunk(2)
        biases = (None, None) if self.gate_in.bias is None else self.gate_in.bias.chunk(2)
        gate = program.linear(x, weights[0], biases[0])
        value = program.linear(x, weights[1], biases[1], local=True)
        y = program.gate(gate, value, activation=name, out=gate, local=True)
        linear(program, y, self.out, out=out, add=add)


# under the names they have in `StepProgram`
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": partial(F.gelu, approximate="tanh")}


def build_ffn(name: str | None, d_model: int, expand: float, kwargs: Mapping[str, Any]) -> nn.Module | None:
    """Builds the network called "swiglu", "geglu" or "channel_mix"; None builds none.

    Raises:
        ValueError: an unknown name or keyword, listing what is allowed, or a value that the network refuses.
    """
    if name not in FFNS:
        raise ValueError(f"ffn: expected one of {', '.join(map(repr, FFNS))}, got {name!r}")
    build, allowed = FFNS[name]
    unknown = sorted(set(kwargs) - set(allowed))
    if unknown:
        raise ValueError(f"ffn_kwargs: {', '.join(unknown)} unknown to {name!r}, expected some of {list(allowed)}")
    return build(d_model, expand, **kwargs)


def channel_mix(d_model: int, expand: float, d_hidden: int | None = None) -> RecurrentLayer:
    if not expand > 0:
        raise ValueError(f"ffn_expand: expected a number > 0, got {expand}")
    # an ffn_expand of 2 gives RWKV's own 4 D
    return ChannelMix(d_model, d_hidden=max(8, 8 * round(2 * expand * d_model / 8)) if d_hidden is None else d_hidden)


FFNS: dict[str | None, tuple[Callable[..., nn.Module | None], tuple[str, ...]]] = {
    "swiglu": (GatedFFN, ("bias", "d_hidden")),
    "geglu": (partial(GatedFFN, activation=ACTIVATIONS["gelu"]), ("bias", "d_hidden")),
    "channel_mix": (channel_mix, ("d_hidden",)),
    None: (lambda d_model, expand: None, ()),
}
