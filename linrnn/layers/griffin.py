"""The recurrent block of Griffin and Hawk (De et al. 2024, arXiv:2402.19427, section 2.3).

y_t = W_out (RG-LRU(conv(W_x x))_t ⊙ gelu(W_y x_t + b_y)) + b_out      W_x with a bias, as the convolution
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, blank_padding, positive_int
from linrnn.layers.frozen import linear, plain
from linrnn.layers.heads import count_heads, white_
from linrnn.layers.rglru import RGLRU, RGLRUState
from linrnn.layers.short_conv import ShortConv
from linrnn.ops.step_program import Ref, StepProgram


class GriffinState(NamedTuple):
    """conv (B, W-1, lru_width), the inputs of the convolution; h (B, lru_width) and begun (B), those of RG-LRU.

    All float32; float64 for a float64 layer.
    """

    conv: Tensor
    h: Tensor
    begun: Tensor


class Griffin(RecurrentLayer):
    """RG-LRU between projections, behind a short convolution and in front of a gate.

    Parameters are named as in transformers' RecurrentGemmaRecurrentBlock, whose state_dict it loads as it is.

    Args:
        d_model: width D of input and output.
        lru_width: width of the recurrence; if None 4 D / 3, as in the paper, rounded down to a multiple of 64, or of 16
            below 256 (so the block has about the 4 D² parameters of attention). RecurrentGemma has D.
        n_heads: number of blocks of the gates' weights; if None, at least 4 blocks as wide as 64 allows.
        conv_width: length W of the convolution's filters.
        r_min, r_max: those of `RGLRU`.
    """

    state_type = GriffinState

    def __init__(
        self,
        d_model: int,
        *,
        lru_width: int | None = None,
        n_heads: int | None = None,
        conv_width: int = 4,
        r_min: float = 0.9,
        r_max: float = 0.999,
    ):
        super().__init__(d_model)
        if lru_width is None:
            wide = max(4 * d_model // 3, 16)
            lru_width = wide - wide % (64 if wide >= 256 else 16)
        self.lru_width = positive_int("lru_width", lru_width)
        n_heads = count_heads(lru_width, n_heads)
        self.linear_x = nn.Linear(d_model, lru_width)
        self.linear_y = nn.Linear(d_model, lru_width)
        self.conv_1d = ShortConv(lru_width, width=conv_width, bias=True, activation=None)
        self.rg_lru = RGLRU(lru_width, n_heads=n_heads, r_min=r_min, r_max=r_max)
        self.linear_out = nn.Linear(lru_width, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters as RecurrentGemma does: white projections, filters of variance 0.01 / W."""
        white_(self.linear_x, self.linear_y, self.linear_out)
        nn.init.normal_(self.conv_1d.weight, std=0.1 * self.conv_1d.width**-0.5)
        if self.conv_1d.bias is not None:
            nn.init.zeros_(self.conv_1d.bias)
        self.rg_lru.reset_parameters()

    def state_spec(self) -> StateSpec:
        return {**self.conv_1d.state_spec(), **self.rg_lru.state_spec()}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        before = None if state is None else state.conv
        recurrent = None if state is None else RGLRUState(state.h, state.begun)
        u, conv = self.conv_1d(self.linear_x(x), before, reset=reset, mask=mask)
        h, recurrent = self.rg_lru(u, recurrent, reset=reset, mask=mask)
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        return self.linear_out(h * gate), GriffinState(conv, *recurrent)

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        plain(ShortConv, self.conv_1d)
        plain(RGLRU, self.rg_lru)
        u = linear(program, x, self.linear_x)
        u = program.conv(u, self.conv_1d.weight, self.conv_1d.bias, local=True)
        gate = linear(program, x, self.linear_y, local=True)
        h = self.rg_lru.emit_recurrence(program, u)
        y = program.gate(gate, h, activation="gelu", out=gate, local=True)
        linear(program, y, self.linear_out, out=out, add=add)
