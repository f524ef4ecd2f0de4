"""What the layers over `wkv` share: weighted means of the values so far, with weights e^{k} that decay with time."""

import math

import torch
from torch import Tensor, nn

from linrnn.layers.base import (
    RecurrentLayer,
    State,
    StateSpec,
    accumulation_dtype,
    blank_padding,
    finite,
    positive_int,
)
from linrnn.layers.frozen import CannotEmit, linear
from linrnn.layers.ring import ring_init_
from linrnn.ops import WKVState, wkv
from linrnn.ops._running_max import nothing
from linrnn.ops.step_program import Ref, StepProgram


class WKVMix(RecurrentLayer):
    """out_t = W_o (σ(W_r x_t) o_t), where o is the `wkv` of keys W_k x, values W_v x, a decay and a bonus gamma_log.

    A subclass gives the log decay, and views the numbers of W_v x as values: `numbers` real ones each.
    """

    state_type = WKVState
    numbers = 1

    def __init__(self, d_model: int, *, d_state: int | None, r_min: float, r_max: float, lr_scale: float):
        super().__init__(d_model)
        self.d_state = self.d_model if d_state is None else positive_int("d_state", d_state)
        if not finite(r_min, r_max) or not 0 <= r_min <= r_max < 1 or r_max == 0:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min <= r_max < 1 and r_max > 0, got {r_min!r}, {r_max!r}")
        if not finite(lr_scale) or not 0 < lr_scale <= 1:
            raise ValueError(f"lr_scale: expected a number in (0, 1], got {lr_scale!r}")
        self.r_min, self.r_max, self.lr_scale = r_min, r_max, lr_scale
        self.nu_log = nn.Parameter(torch.empty(self.d_state))
        self.gamma_log = nn.Parameter(torch.empty(self.d_state))
        self.receptance = nn.Linear(d_model, self.d_state, bias=False)
        self.key = nn.Linear(d_model, self.d_state, bias=False)
        self.value = nn.Linear(d_model, self.d_state * self.numbers, bias=False)
        self.output = nn.Linear(self.d_state, d_model, bias=False)

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white r, k and v; u = 0: a token weighs as much as the last."""
        ring_init_(self.nu_log, self.gamma_log, self.r_min, self.r_max)
        nn.init.zeros_(self.gamma_log)  # the ring's normalisation would all but hide the current token
        for projection in (self.receptance, self.key, self.value, self.output):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.nu_log.dtype)
        return {field: ((self.d_state,), dtype) for field in WKVState._fields}

    def init_state(self, batch_size: int) -> State:
        return no_past(super().init_state(batch_size))

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """Recurrent parameters learn more slowly and do not decay, as in the LRU."""
        return {name: {"lr_scale": self.lr_scale, "weight_decay": 0.0} for name in self.recurrent_parameters()}

    def recurrent_parameters(self) -> tuple[str, ...]:
        return ("nu_log", "gamma_log")

    def log_decay(self) -> Tensor:
        """Returns log λ (N), at least float32 or complex64."""
        return minus_exp(self.nu_log)

    def to_values(self, v: Tensor) -> Tensor:
        """Views (B, T, N * numbers) reals as (B, T, N) values."""
        return v

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        k, v = self.key(x), self.to_values(self.value(x))  # (B, T, N)
        o, state = wkv(k, v, self.log_decay(), self.gamma_log, state, reset=reset, mask=mask)
        o = o.real if o.is_complex() else o
        return self.output(self.receptance(x).sigmoid() * o.to(k.dtype)), state

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        if self.numbers != 1:
            raise CannotEmit
        k = linear(program, x, self.key)
        v = linear(program, x, self.value, local=True)
        r = linear(program, x, self.receptance, local=True)
        o = program.wkv(k, v, self.log_decay(), self.gamma_log, local=True)
        o = program.gate(r, o, activation="sigmoid", out=o, local=True)
        linear(program, o, self.output, out=out, add=add)


def minus_exp(x: Tensor) -> Tensor:
    """Returns the log decay -exp(x), at least float32, bounded so that its gradient is finite; e^-80 is nothing."""
    return -x.to(accumulation_dtype(x.dtype)).clamp(max=math.log(80)).exp()


def no_past(state: State) -> State:
    """Returns a zero state with a field p as the one before any token: its largest exponent p is below all others."""
    return state._replace(p=torch.full_like(state.p, nothing(state.p.dtype)))
