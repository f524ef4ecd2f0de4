"""Gated convolution within a window: what a layer can do that sees nothing beyond K tokens.

    y_t = W_out (silu(W_gate x_t) ⊙ u_t)        u_t = b + sum_j w_j ⊙ (W_in x)_{t-j}

w (D, K) is one filter for each channel: j = 0, ..., K - 1 if causal, -(K-1)/2, ..., (K-1)/2 if bidirectional. The
control for locality of Miralles-González et al. 2025 (arXiv:2501.14850), residual convolutions with K = 5 or 61, in the
form of the recurrent block of Griffin (arXiv:2402.19427) with the recurrence taken out, so that its parameters,
3 D² + (K + 1) D, are of the order of other layers'. n layers see n (K - 1) tokens back, or half of that each way.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, blank_padding
from linrnn.layers.heads import white_
from linrnn.layers.short_conv import ShortConv, centred_conv, odd_width


class ConvState(NamedTuple):
    """conv (B, K-1, D) float32, the last inputs of the convolution; float64 for a float64 layer."""

    conv: Tensor


class Conv(RecurrentLayer):
    """Depthwise convolution of K tokens between projections, with a gate.

    Args:
        d_model: width D of input and output.
        conv_width: length K of the filters; odd if bidirectional.
        bidirectional: the window is centred on the token; such a layer cannot step.
    """

    state_type = ConvState

    def __init__(self, d_model: int, *, conv_width: int = 61, bidirectional: bool = False):
        super().__init__(d_model, causal=not bidirectional)
        if bidirectional:
            odd_width("conv_width", conv_width)
        self.gate_in = nn.Linear(d_model, 2 * d_model, bias=False)
        self.conv = ShortConv(d_model, width=conv_width, bias=True, activation=None)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """White x gives white W x; filters are white too, of variance 1 / K, and have no bias."""
        white_(self.gate_in, self.out)
        nn.init.normal_(self.conv.weight, std=self.conv.width**-0.5)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def state_spec(self) -> StateSpec:
        return self.conv.state_spec()

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        gate, u = self.gate_in(blank_padding(x, mask)).chunk(2, -1)
        if self.causal:
            u, final = self.conv(u, None if state is None else state.conv, reset=reset, mask=mask)
            return self.out(F.silu(gate) * u), ConvState(final)
        u = centred_conv(u, self.conv.weight, self.conv.bias, reset=reset, mask=mask)
        return self.out(F.silu(gate) * u), None
