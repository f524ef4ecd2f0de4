"""The time mixing of RWKV-4 (Peng et al. 2023, arXiv:2305.13048).

    r_t = W_r (μ_r x_t + (1 - μ_r) x_{t-1})        the same for k_t and v_t
    o_t = (sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t) / (sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t})
    y_t = W_o (σ(r_t) o_t)

w = exp(time_decay) > 0 and u = time_first are one number per channel.
"""

import math
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
from linrnn.layers.token_shift import layer_ratios, token_shift
from linrnn.layers.wkv_mix import minus_exp, no_past
from linrnn.ops import WKVState, wkv
from linrnn.ops.step_program import Ref, StepProgram


class RWKV4State(NamedTuple):
    """The last token, and the sums over the past of `ops.wkv`: a of e^k v and b of e^k in units of e^p.

    x (B, D); p, a, b (B, N): float32, float64 for a float64 layer.
    """

    x: Tensor
    p: Tensor
    a: Tensor
    b: Tensor


class RWKV4(RecurrentLayer):
    """RWKV-4's attention: a decaying weighted mean of values, of a token and the one before.

    Parameters are named as in the official checkpoints and in transformers; the time mixes are vectors (D) here.

    Args:
        d_model: width D of input and output.
        d_state: number N of channels; d_model if None.
        layer_index, n_layers: place of the layer in its model, from 0: higher layers start with longer decays and look
            less at the token before. A lone layer starts as the first.
        zero_init: starts W_r, W_k and W_o at zero, as the official training code does: the layer then adds nothing to
            the residual stream around it. If False, they start orthogonal like W_v, as in transformers.
    """

    state_type = RWKV4State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        layer_index: int = 0,
        n_layers: int = 1,
        zero_init: bool = False,
    ):
        super().__init__(d_model)
        self.d_state = self.d_model if d_state is None else positive_int("d_state", d_state)
        self.depth = layer_ratios(layer_index, n_layers)
        self.zero_init = zero_init
        self.time_decay = nn.Parameter(torch.empty(self.d_state))
        self.time_first = nn.Parameter(torch.empty(self.d_state))
        self.time_mix_key = nn.Parameter(torch.empty(d_model))
        self.time_mix_value = nn.Parameter(torch.empty(d_model))
        self.time_mix_receptance = nn.Parameter(torch.empty(d_model))
        self.key = nn.Linear(d_model, self.d_state, bias=False)
        self.value = nn.Linear(d_model, self.d_state, bias=False)
        self.receptance = nn.Linear(d_model, self.d_state, bias=False)
        self.output = nn.Linear(self.d_state, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters as the official training code, whose u = log 0.3 ± 0.5 (transformers has 1 there)."""
        rising, falling = self.depth
        with torch.no_grad():
            channel = torch.arange(self.d_state, dtype=torch.float64)
            speed = (channel / max(self.d_state - 1, 1)) ** (0.7 + 1.3 * rising)
            self.time_decay.copy_(-5 + 8 * speed)
            self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
            share = torch.arange(self.d_model, dtype=torch.float64) / self.d_model
            self.time_mix_key.copy_(share**falling)
            self.time_mix_value.copy_(share**falling + 0.3 * rising)
            self.time_mix_receptance.copy_(share ** (0.5 * falling))
        for projection in (self.key, self.value, self.receptance, self.output):
            if self.zero_init and projection is not self.value:
                nn.init.zeros_(projection.weight)
            else:
                gain = max(1.0, projection.out_features / projection.in_features) ** 0.5
                nn.init.orthogonal_(projection.weight, gain=gain)

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.time_decay.dtype)
        return {"x": ((self.d_model,), dtype), **{field: ((self.d_state,), dtype) for field in WKVState._fields}}

    def init_state(self, batch_size: int) -> State:
        return no_past(super().init_state(batch_size))

    def optim_hints(self) -> dict[str, dict[str, float]]:
        return {name: {"weight_decay": 0.0} for name in ("time_decay", "time_first")}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        before, last = token_shift(x, state and state.x, reset, mask)  # (B, T, D), (B, D)
        change = x - before
        k = self.key(before + change * self.time_mix_key)  # (B, T, N)
        v = self.value(before + change * self.time_mix_value)
        r = self.receptance(before + change * self.time_mix_receptance)
        past = state and WKVState(state.p, state.a, state.b)
        o, past = wkv(k, v, minus_exp(self.time_decay), self.time_first, past, reset=reset, mask=mask)
        last = last.to(past.p.dtype)
        return self.output(r.sigmoid() * o.to(r.dtype)), RWKV4State(last, *past)

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        mixes = (self.time_mix_key, self.time_mix_value, self.time_mix_receptance)
        for_k, for_v, for_r = program.shift(x, mixes)
        k = linear(program, for_k, self.key)
        v = linear(program, for_v, self.value, local=True)
        r = linear(program, for_r, self.receptance, local=True)
        o = program.wkv(k, v, minus_exp(self.time_decay), self.time_first, local=True)
        o = program.gate(r, o, activation="sigmoid", out=o, local=True)
        linear(program, o, self.output, out=out, add=add)
