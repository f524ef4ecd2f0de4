"""Mamba-2, state space duality (Dao and Gu 2024, arXiv:2405.21060).

    z, x, B, C, dt = W_in u             x, B, C <- silu(conv(x, B, C))       Δ = softplus(dt + dt_bias)
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t^T                                  A = -exp(A_log), one number a head
    y_t = C_t^T h_t + D x_t             out_t = W_out RMSNorm(y_t ⊙ silu(z_t))

Linear attention with C as q, B as k, Δ x as v, and a decay for every head and token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from linrnn.layers.frozen import CannotEmit, linear, plain
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads
from linrnn.layers.short_conv import ShortConv
from linrnn.layers.time_step import check_dt_limit, check_time_steps, dt_bias_
from linrnn.ops import linear_attention
from linrnn.ops.step_program import Ref, StepProgram


class Mamba2State(NamedTuple):
    """conv (B, W-1, d_inner + 2 G N), the inputs of the convolution, and ssm (B, H, N, P), the h of the equations.

    Both float32; float64 for a float64 layer.
    """

    conv: Tensor
    ssm: Tensor


class Mamba2(RecurrentLayer):
    """Selective state space model whose heads decay as a whole.

    Args:
        d_model: width D of input and output.
        d_state: width N of B and C; at most 128, and d_model for smaller layers, if None.
        d_conv: length W of the convolution's filters.
        expand: d_inner = expand * d_model is the width of x and z.
        d_head: width P of a head of x; if None at most 64, with at least 4 heads.
        n_groups: number G of B's and C's, each for H / G heads.
        A_range: the interval in which -A starts, evenly.
        dt_min, dt_max: the interval in which softplus(dt_bias) starts, log-evenly.
        dt_limit: the interval to which Δ is clamped, in every mode; None leaves it as it is.
        conv_bias: whether the convolution has a bias.
        bias: whether W_in and W_out have.
        norm_eps: added to the mean square in the RMSNorm, which is over each of the n_groups parts of d_inner.
    """

    state_type = Mamba2State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        d_conv: int = 4,
        expand: int = 2,
        d_head: int | None = None,
        n_groups: int = 1,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_limit: Sequence[float] | None = None,
        conv_bias: bool = True,
        bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__(d_model)
        self.d_state = min(d_model, 128) if d_state is None else positive_int("d_state", d_state)
        self.d_inner = positive_int("expand", expand) * d_model
        if d_head is not None and self.d_inner % positive_int("d_head", d_head):
            raise ValueError(f"d_head: expected a divisor of expand * d_model = {self.d_inner}, got {d_head}")
        n_heads = None if d_head is None else self.d_inner // d_head
        self.n_heads = count_heads(self.d_inner, n_heads, argument="d_head")
        self.n_groups = positive_int("n_groups", n_groups)
        if self.n_heads % n_groups:
            raise ValueError(f"n_groups: expected a divisor of the number of heads, {self.n_heads}, got {n_groups}")
        if not 0 < A_range[0] <= A_range[1]:
            raise ValueError(f"A_range: expected 0 < lower <= upper, got {A_range}")
        check_time_steps(dt_min, dt_max)
        if not finite(norm_eps) or not norm_eps > 0:
            raise ValueError(f"norm_eps: expected a finite number > 0, got {norm_eps!r}")
        self.A_range, self.dt_min, self.dt_max = A_range, dt_min, dt_max
        self.dt_limit = None if dt_limit is None else check_dt_limit(dt_limit)
        channels = self.d_inner + 2 * n_groups * self.d_state
        self.sizes = (self.d_inner, channels, self.n_heads)  # of z, xBC and dt
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=bias)
        self.conv = ShortConv(channels, width=positive_int("d_conv", d_conv), bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.norm = HeadNorm(n_groups, self.d_inner // n_groups, eps=norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: torch's own for the projections and the convolution, A and Δ from their intervals."""
        for module in (self.in_proj, self.conv, self.norm, self.out_proj):
            module.reset_parameters()
        with torch.no_grad():
            self.A_log.uniform_(*self.A_range).log_()
        dt_bias_(self.dt_bias, self.dt_min, self.dt_max)
        nn.init.ones_(self.D)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on A, D and dt_bias, as in the authors' code."""
        return {name: {"weight_decay": 0.0} for name in ("A_log", "D", "dt_bias")}

    def state_spec(self) -> StateSpec:
        ssm = (self.n_heads, self.d_state, self.d_inner // self.n_heads)
        return {**self.conv.state_spec(), "ssm": (ssm, accumulation_dtype(self.D.dtype))}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        conv, ssm = (None, None) if state is None else state
        z, xBC, dt = self.in_proj(blank_padding(x, mask)).split(self.sizes, -1)
        xBC, conv = self.conv(xBC, conv, reset=reset, mask=mask)
        GN = self.n_groups * self.d_state
        u, B, C = xBC.split((self.d_inner, GN, GN), -1)
        u = split_heads(u, self.n_heads)  # (B, T, H, P)

        wide = accumulation_dtype(dt.dtype)
        Δ = F.softplus(dt.to(wide) + self.dt_bias)  # (B, T, H)
        if self.dt_limit is not None:
            Δ = Δ.clamp(*self.dt_limit)
        log_decay = Δ * -self.A_log.to(wide).exp()
        v = (Δ[..., None] * u).to(u.dtype)
        o, ssm = linear_attention(
            self.to_heads(C), self.to_heads(B), v, ssm, log_decay=log_decay, scale=1.0, reset=reset, mask=mask
        )
        y = merge_heads(o + self.D[:, None].to(u.dtype) * u) * F.silu(z)
        y = merge_heads(self.norm(split_heads(y, self.n_groups)))
        return self.out_proj(y), Mamba2State(conv, ssm)

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        plain(nn.Linear, self.in_proj)
        plain(ShortConv, self.conv)
        plain(HeadNorm, self.norm)
        if self.norm.weight is None:
            raise CannotEmit
        weights = self.in_proj.weight.split(self.sizes)
        biases = (None,) * 3 if self.in_proj.bias is None else self.in_proj.bias.split(self.sizes)
        xBC = program.linear(x, weights[1], biases[1])
        xBC = program.conv(xBC, self.conv.weight, self.conv.bias, activation="silu", local=True)
        z, dt = (program.linear(x, weights[i], biases[i], local=True) for i in (0, 2))
        GN, G = self.n_groups * self.d_state, self.n_groups
        u, B, C = (
            xBC.columns(start, n) for start, n in ((0, self.d_inner), (self.d_inner, GN), (self.d_inner + GN, GN))
        )
        limits = (0.0, math.inf) if self.dt_limit is None else self.dt_limit
        y = program.heads(u, dt, -self.A_log.exp(), B, C, self.D, self.dt_bias, n_groups=G, limits=limits)
        y = program.gate(z, y, activation="silu", out=y, local=True)
        width = self.d_inner // G
        for i, weight in enumerate(self.norm.weight.view(G, width)):
            part = y.columns(i * width, width)
            program.norm(part, weight, eps=self.norm.eps, out=part, local=i > 0)
        linear(program, y, self.out_proj, out=out, add=add)

    def to_heads(self, s: Tensor) -> Tensor:
        """Gives the heads of each group its B or C: (B, T, G N) to (B, T, H, N)."""
        groups = split_heads(s, self.n_groups)[..., None, :]  # (B, T, G, 1, N)
        return groups.expand(-1, -1, -1, self.n_heads // self.n_groups, -1).flatten(2, 3)
