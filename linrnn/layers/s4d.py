"""S4D, diagonal state spaces (Gu et al. 2022, arXiv:2206.11893).

    h'(t) = A h(t) + x(t),  y(t) = 2 Re(C h(t)) + D x(t)        for each of D channels; A diagonal, N/2 complex numbers

in discrete time, with a step Δ for each channel (equations 2 and 3, and section 3.3):

    h_t = Ā h_{t-1} + B̄ x_t,   y_t = 2 Re(C h_t) + D x_t,   out_t = W_a g + b_a ⊙ σ(W_b g + b_b),  g = GELU(y_t)
    "zoh": Ā = exp(Δ A), B̄ = (Ā - 1) / A        "bilinear": Ā = (1 + Δ A / 2) / (1 - Δ A / 2), B̄ = Δ / (1 - Δ A / 2)

A = -exp(log_A_real) + i A_imag holds one of each pair of conjugate numbers: N is the size of the real system. B is 1:
only the product of B and C matters.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.hippo import (
    DISCRETISATIONS,
    INITS,
    check_choice,
    discretize,
    exact_dtype,
    inside_circle,
    s4d_eigenvalues,
)
from linrnn.layers.time_step import check_time_steps
from linrnn.ops import diagonal_ssm, diagonal_ssm_bidirectional


class S4DState(NamedTuple):
    """h (B, D, N / 2) complex64; complex128 for a float64 layer."""

    h: Tensor


class S4D(RecurrentLayer):
    """Independent time-invariant state spaces, one a channel, and a gated projection that mixes the channels.

    Args:
        d_model: width D of input and output.
        d_state: size N of the real state of a channel, even; 64, and d_model for smaller layers, if None.
        init: where A starts: "legs" (the eigenvalues of the normal part of HiPPO-LegS), "inv" or "lin" (close to it in
            closed form: -1/2 + i (N/π) (N / (2n+1) - 1), and -1/2 + iπn).
        disc: the discretisation, "zoh" or "bilinear".
        dt_min, dt_max: the interval in which Δ starts, log-evenly.
        output: what follows: "glu" (GELU, a projection to 2 D and a gate: the block of the paper), "linear" (GELU and a
            projection) or None (y itself: no channel meets another).
        bidirectional: a second C reads the same systems run from the end; both directions see the current token. (The
            authors' code lets only one of them see it; D makes up for the difference.) Such a layer cannot step.
        mode: how it runs, "auto", "chunk", "conv" or "scan", the same function each: see `ops.diagonal_ssm`.
        lr_scale: learning rate of A and Δ relative to the rest (the paper: 0.001 beside 0.01 or 0.004).
    """

    state_type = S4DState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        init: str = "legs",
        disc: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        output: str | None = "glu",
        bidirectional: bool = False,
        mode: str = "auto",
        lr_scale: float = 0.1,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.d_state = max(2, min(64, d_model // 2 * 2)) if d_state is None else positive_int("d_state", d_state)
        if self.d_state % 2:
            raise ValueError(f"d_state: expected an even size, whose states are conjugate pairs, got {d_state}")
        check_choice("init", init, INITS)
        check_choice("disc", disc, DISCRETISATIONS)
        check_choice("output", output, ("glu", "linear", None))
        check_choice("mode", mode, ("auto", "chunk", "conv", "scan"))
        check_time_steps(dt_min, dt_max)
        if not finite(lr_scale) or not 0 < lr_scale <= 1:
            raise ValueError(f"lr_scale: expected a number in (0, 1], got {lr_scale!r}")
        self.init, self.disc, self.mode, self.lr_scale = init, disc, mode, lr_scale
        self.dt_min, self.dt_max = dt_min, dt_max
        pairs = self.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model))
        self.log_A_real = nn.Parameter(torch.empty(d_model, pairs))
        self.A_imag = nn.Parameter(torch.empty(d_model, pairs))
        self.C = nn.Parameter(torch.empty(*((2,) if bidirectional else ()), d_model, pairs, 2))  # [Re C, Im C]
        self.D = nn.Parameter(torch.empty(d_model))
        self.out_proj = None if output is None else nn.Linear(d_model, (2 if output == "glu" else 1) * d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: A as `init` says in every channel, C complex normal with E|C|² = 1, D normal."""
        λ = s4d_eigenvalues(self.init, self.d_state)
        with torch.no_grad():
            self.log_A_real.copy_((-λ.real).log().expand_as(self.log_A_real))
            self.A_imag.copy_(λ.imag.expand_as(self.A_imag))
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
        nn.init.normal_(self.C, std=0.5**0.5)
        nn.init.normal_(self.D)
        if self.out_proj is not None:
            self.out_proj.reset_parameters()

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """The paper's recipe: a smaller learning rate and no weight decay for A and Δ."""
        return {n: {"lr_scale": self.lr_scale, "weight_decay": 0.0} for n in ("log_dt", "log_A_real", "A_imag")}

    def state_spec(self) -> StateSpec:
        return {"h": (tuple(self.A_imag.shape), torch.promote_types(self.D.dtype, torch.complex64))}

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Returns log Ā and B̄, (D, N / 2) complex128: |Ā| < 1 in the layer's precision, whatever the parameters."""
        dtype = exact_dtype(self.log_dt)
        dt = self.log_dt.to(dtype).clamp(-20, 7).exp()[:, None]
        A = torch.complex(-self.log_A_real.to(dtype).clamp(-80, 80).exp(), self.A_imag.to(dtype))
        log_a, b = discretize(A, dt, self.disc)
        return inside_circle(log_a, self.D.dtype), b

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        log_a, b = self.discrete()
        C = 2 * self.C.to(accumulation_dtype(self.C.dtype))
        c = torch.complex(C[..., 0], C[..., 1])  # (D, N / 2), twice if bidirectional
        if self.causal:
            h = None if state is None else state.h
            y, h = diagonal_ssm(log_a, b, c, x, h, reset=reset, mask=mask, mode=self.mode)
            final = S4DState(h)
        else:
            y = diagonal_ssm_bidirectional(log_a, b, c[0], c[1], x, reset=reset, mask=mask, mode=self.mode)
            final = None
        y = y + self.D * x
        if self.out_proj is None:
            return y, final
        y = self.out_proj(F.gelu(y))
        return F.glu(y) if self.out_proj.out_features == 2 * self.d_model else y, final
