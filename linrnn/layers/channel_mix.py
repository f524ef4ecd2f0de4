"""The channel mixing of RWKV-4, its feed-forward network (Peng et al. 2023, arXiv:2305.13048, equations 17 and 18).

k_t = W_k (μ_k x_t + (1 - μ_k) x_{t-1})        the same for r_t
y_t = σ(r_t) ⊙ W_v relu(k_t)²
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from linrnn.layers.base import (
    RecurrentLayer,
    State,
    StateSpec,
    accumulation_dtype,
    blank_padding,
    positive_int,
)
from linrnn.layers.frozen import linear
from linrnn.layers.token_shift import token_shift
from linrnn.ops.step_program import Ref, StepProgram


class ChannelMixState(NamedTuple):
    """The last token, x (B, D) float32; float64 for a float64 layer."""

    x: Tensor


class ChannelMix(RecurrentLayer):
    """A feed-forward network that sees a token and the one before.

    Parameters are named as in the official checkpoints and in transformers; the time mixes are vectors (D) here.

    Args:
        d_model: width D of input and output.
        d_hidden: width of k; 4 D if None.
    """

    state_type = ChannelMixState

    def __init__(self, d_model: int, *, d_hidden: int | None = None):
        super().__init__(d_model)
        self.d_hidden = 4 * d_model if d_hidden is None else positive_int("d_hidden", d_hidden)
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.key = nn.Linear(d_model, self.d_hidden, bias=False)
        self.receptance = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(self.d_hidden, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: torch's own for the projections, mixes as in RWKV-4's first layer, from 0 to 1."""
        for projection in (self.key, self.receptance, self.value):
            projection.reset_parameters()
        with torch.no_grad():
            share = torch.arange(self.d_model) / self.d_model
            self.time_mix_key.copy_(share)
            self.time_mix_receptance.copy_(share)

    def state_spec(self) -> StateSpec:
        return {"x": ((self.d_model,), accumulation_dtype(self.time_mix_key.dtype))}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        before, last = token_shift(x, state and state.x, reset, mask)  # (B, T, D), (B, D)
        change = x - before
        k = self.key(before + change * self.time_mix_key)  # (B, T, d_hidden)
        r = self.receptance(before + change * self.time_mix_receptance)
        y = r.sigmoid() * self.value(k.relu().square())
        return y, ChannelMixState(last.to(accumulation_dtype(x.dtype)))

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        for_k, for_r = program.shift(x, (self.time_mix_key, self.time_mix_receptance))
        k = linear(program, for_k, self.key)
        program.gate(k, activation="squared_relu", out=k, local=True)
        r = linear(program, for_r, self.receptance, local=True)
        v = linear(program, k, self.value)
        program.gate(r, v, activation="sigmoid", out=out, add=add, local=True)
