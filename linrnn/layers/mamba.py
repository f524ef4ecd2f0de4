"""Mamba, the selective state space model (Gu and Dao 2023, arXiv:2312.00752, section 3 and figure 3).

    x, z = W_in u                       x <- silu(conv(x))
    δ, B, C = W_x x                     Δ = softplus(W_dt δ + b_dt)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t x_t B_t                                    A = -exp(A_log), N numbers a channel
    y_t = (C_t^T h_t + D x_t) silu(z_t)                                       out_t = W_out y_t

FalconMamba (arXiv:2410.05355) divides δ, B and C by their root mean squares.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import (
    RecurrentLayer,
    State,
    StateSpec,
    StepFn,
    accumulation_dtype,
    blank_padding,
    finite,
    positive_int,
)
from linrnn.layers.frozen import linear, plain, stands_for_call, written_for
from linrnn.layers.short_conv import ShortConv
from linrnn.layers.time_step import check_time_steps, dt_bias_
from linrnn.ops import selective_scan
from linrnn.ops.step_program import Ref, StepProgram


class MambaState(NamedTuple):
    """conv (B, W-1, d_inner), the inputs of the convolution, and ssm (B, d_inner, N), the h of the equations.

    Both float32; float64 for a float64 layer.
    """

    conv: Tensor
    ssm: Tensor


class Mamba(RecurrentLayer):
    """Selective state space model with N states for each of d_inner channels, a short convolution and a gate.

    The names in its state_dict are those of the official checkpoints and of transformers' MambaMixer and
    FalconMambaMixer, whose state_dict it loads as it is: `conv1d.weight` may be (d_inner, 1, W).

    Args:
        d_model: width D of input and output.
        d_state: number N of states of a channel.
        d_conv: length W of the convolution's filters.
        expand: d_inner = expand * d_model is the width of x and z.
        dt_rank: width of δ; d_model / 16, rounded up, if None.
        dt_min, dt_max: the interval in which softplus(b_dt) starts, log-evenly.
        dt_scale: W_dt starts uniform in ±dt_scale * dt_rank^-0.5.
        dt_init_floor: the least that softplus(b_dt) starts with.
        conv_bias: whether the convolution has a bias.
        bias: whether W_in and W_out have.
        bcdt_norm: whether δ, B and C are divided by their root mean squares, as in FalconMamba.
        bcdt_norm_eps: added to those mean squares.
    """

    state_type = MambaState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        bcdt_norm: bool = False,
        bcdt_norm_eps: float = 1e-6,
    ):
        super().__init__(d_model)
        self.d_state = positive_int("d_state", d_state)
        self.d_inner = positive_int("expand", expand) * d_model
        self.dt_rank = -(-d_model // 16) if dt_rank is None else positive_int("dt_rank", dt_rank)
        check_time_steps(dt_min, dt_max)
        positive = {"dt_scale": dt_scale, "dt_init_floor": dt_init_floor, "bcdt_norm_eps": bcdt_norm_eps}
        for name, value in positive.items():
            if not finite(value) or not value > 0:
                raise ValueError(f"{name}: expected a finite number > 0, got {value!r}")
        self.dt_min, self.dt_max, self.dt_scale, self.dt_init_floor = dt_min, dt_max, dt_scale, dt_init_floor
        self.bcdt_norm, self.bcdt_norm_eps = bcdt_norm, bcdt_norm_eps
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = ShortConv(self.d_inner, width=positive_int("d_conv", d_conv), bias=conv_bias)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, self.d_state))
        self.D = nn.Parameter(torch.empty(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: A = -1 ... -N in every channel, Δ as `dt_*` say, torch's own for the rest."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        bound = self.dt_scale * self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        dt_bias_(self.dt_proj.bias, self.dt_min, self.dt_max, self.dt_init_floor)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1).log())
        nn.init.ones_(self.D)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on A and D, as in the authors' code; a bias has none anyway."""
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D")}

    def state_spec(self) -> StateSpec:
        return {**self.conv1d.state_spec(), "ssm": ((self.d_inner, self.d_state), accumulation_dtype(self.D.dtype))}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        conv, ssm = (None, None) if state is None else state
        x, z = self.in_proj(blank_padding(x, mask)).chunk(2, -1)  # (B, T, d_inner)
        x, conv = self.conv1d(x, conv, reset=reset, mask=mask)
        dt, B, C = self.select(x)
        y, ssm = selective_scan(
            x,
            dt,
            self.A(),
            B,
            C,
            self.D,
            z,
            ssm,
            dt_bias=self.dt_proj.bias,
            dt_softplus=True,
            reset=reset,
            mask=mask,
        )
        return self.out_proj(y), MambaState(conv, ssm)

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps one token x_t (B, D) and a state to y_t (B, D) and the next state, in few operations of torch."""
        if state is None or not isinstance(x_t, Tensor) or x_t.ndim != 2 or not stands_for_call(self, "step"):
            return super().step(x_t, state)
        self.check_inputs(x_t[:, None], state, None, None)
        return self.advance(x_t, state, self.A())

    def advance(self, x_t: Tensor, state: State, A: Tensor) -> tuple[Tensor, State]:
        """The step with A as given, and nothing checked."""
        x, z = self.in_proj(x_t[:, None]).chunk(2, -1)  # (B, 1, d_inner)
        x, conv = self.conv1d(x, state.conv)
        dt, B, C = self.select(x)
        wide = state.ssm.dtype
        Δ = F.softplus(dt.to(wide) + self.dt_proj.bias)
        h = (Δ.mT * A).exp() * state.ssm + (Δ * x).mT * B.to(wide)  # (B, d_inner, N)
        y = ((h * C).sum(-1)[:, None] + self.D * x) * F.silu(z.to(wide))
        return self.out_proj(y.to(x.dtype))[:, 0], MambaState(conv, h)

    def uncompiled_step(self) -> StepFn:
        """Returns the frozen step in operations of torch: A is computed once."""
        A = self.A().detach()
        return torch.no_grad()(lambda x_t, state: self.advance(x_t, state, A))

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        written_for(self, "emit_step", "select")
        plain(nn.Linear, self.in_proj, self.x_proj, self.dt_proj)
        plain(ShortConv, self.conv1d)
        weights = self.in_proj.weight.chunk(2)
        biases = (None, None) if self.in_proj.bias is None else self.in_proj.bias.chunk(2)
        u = program.linear(x, weights[0], biases[0])
        u = program.conv(u, self.conv1d.weight, self.conv1d.bias, activation="silu", local=True)
        z = program.linear(x, weights[1], biases[1], local=True)
        selected = program.linear(u, self.x_proj.weight)
        δ, B, C = (
            selected.columns(start, width)
            for start, width in (
                (0, self.dt_rank),
                (self.dt_rank, self.d_state),
                (self.dt_rank + self.d_state, self.d_state),
            )
        )
        if self.bcdt_norm:
            for part in (δ, B, C):
                program.norm(part, None, eps=self.bcdt_norm_eps, out=part)
        dt = program.linear(δ, self.dt_proj.weight, self.dt_proj.bias)
        y = program.selective(u, dt, self.A(), B, C, self.D, z, local=True)
        linear(program, y, self.out_proj, out=out, add=add)

    def A(self) -> Tensor:
        """Returns A (d_inner, N), at least float32."""
        return -self.A_log.to(accumulation_dtype(self.A_log.dtype)).exp()

    def select(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps x (B, T, d_inner) to W_dt δ, as wide, and B and C (B, T, N)."""
        δ, B, C = self.x_proj(x).split((self.dt_rank, self.d_state, self.d_state), -1)
        if self.bcdt_norm:
            δ, B, C = (rms_norm(s, self.bcdt_norm_eps) for s in (δ, B, C))
        return F.linear(δ, self.dt_proj.weight), B, C


def rms_norm(s: Tensor, eps: float) -> Tensor:
    """Divides s (..., N) by its root mean square, computed in at least float32."""
    wide = s.to(accumulation_dtype(s.dtype))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(s.dtype)
