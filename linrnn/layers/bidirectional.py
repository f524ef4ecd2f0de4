"""Both directions from a layer that has one.

    y_t = W_out [f(x^1)_t, b(x̃^2)_{T-1-t}]        x = [x^1, x^2], x̃_t = x_{T-1-t}

f and b are two layers of half the channels each, with parameters of their own: the directions share one budget, so that
for layers of order D² both, with W_out, have about 3/4 of the parameters of one layer of D channels, or more.
"""

from typing import Any

import torch
from torch import Tensor, nn

from linrnn import layers
from linrnn.layers.base import RecurrentLayer, State, StateSpec, blank_padding, positive_int
from linrnn.layers.heads import white_
from linrnn.layers.ring import last_of_document


class Bidirectional(RecurrentLayer):
    """One registered layer forward over the first half of the channels, another backward over the second half.

    A linear map without bias mixes their outputs, so that every channel sees both sides. Padding, which holds states,
    and packed documents are flipped with their rows. It cannot step.

    Args:
        name: registry name of a layer that runs forward.
        d_model: width D of input and output; even, and D / 2 is a width that the layer takes.
        kwargs: keyword arguments of both copies.

    Raises:
        ValueError: an unknown name or keyword, a width that has no halves, or a layer that looks both ways by itself.
    """

    def __init__(self, name: str, d_model: int, **kwargs: Any):
        super().__init__(d_model, causal=False)
        if positive_int("d_model", d_model) % 2:
            raise ValueError(f"d_model: expected an even number, {name!r} has half of it each way, got {d_model}")
        self.name, half = name, d_model // 2
        layers.layer_class(name)
        try:
            self.forwards = layers.build(name, half, **kwargs)
            self.backwards = layers.build(name, half, **kwargs)
        except ValueError as error:
            raise ValueError(f"each direction of {name!r} has half of d_model = {d_model}: {error}") from error
        if not self.forwards.causal:
            raise ValueError(f"name: expected a layer that runs forward, {name!r} looks both ways by itself")
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """White outputs of the directions give white y. The layers within draw theirs where they are built."""
        white_(self.out)

    def state_spec(self) -> StateSpec:
        return {}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Maps x (B, T, D) to y (B, T, D), and None: a layer that looks ahead has no state."""
        self.check_inputs(x, state, reset, mask)
        u, v = blank_padding(x, mask).chunk(2, -1)
        first = last_of_document(reset)  # what a backward run meets first
        y, _ = self.forwards(u, reset=reset, mask=mask)
        z, _ = self.backwards(
            v.flip(1),
            reset=None if first is None else first.flip(1),
            mask=None if mask is None else mask.flip(1),
        )
        return self.out(torch.cat((y, z.flip(1)), -1)), None

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.d_model}"
