"""S5, one state space for all channels (Smith et al. 2023, arXiv:2208.04933).

    h'(t) = Λ h(t) + B̃ x(t),  y(t) = 2 Re(C̃ h(t)) + D x(t)        Λ diagonal, P complex numbers

in discrete time, with a step Δ for each state:

    h_t = Λ̄ h_{t-1} + B̄ x_t,   y_t = 2 Re(C̃ h_t) + D ⊙ x_t,   out_t = g ⊙ σ(W g + b),  g = GELU(y_t)
    "zoh": Λ̄ = exp(Δ Λ), B̄ = Λ^-1 (Λ̄ - 1) B̃        "bilinear": Λ̄ = (1 + ΔΛ/2) / (1 - ΔΛ/2), B̄ = Δ / (1 - ΔΛ/2) B̃

Λ starts as the eigenvalues of J blocks of HiPPO-N, the normal part of LegS, with eigenvectors V: B̃ = V^* B, C̃ = C V.
With conjugate symmetry only one of each pair of states is held, P = N / 2, and 2 Re makes up for the other.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.hippo import DISCRETISATIONS, check_choice, discretize, exact_dtype, inside_circle, normal_legs
from linrnn.layers.ring import last_of_document
from linrnn.layers.time_step import check_time_steps
from linrnn.ops import diagonal_scan

ACTIVATIONS = ("half_glu1", "half_glu2", "full_glu", "gelu", None)


class S5State(NamedTuple):
    """h (B, P) complex64; complex128 for a float64 layer."""

    h: Tensor


class S5(RecurrentLayer):
    """Diagonal complex state space with many inputs and outputs, and a gate.

    Storage: B (P, 2, D) holds [Re B̃, Im B̃] and C (D, P, 2) holds [Re C̃, -Im C̃], so that both projections are one real
    matrix product with interleaved complex numbers.

    Args:
        d_model: width D of input and output.
        d_state: size N of the real state; d_model if None.
        blocks: number J of HiPPO blocks in which Λ starts, of N / J each; if None, as many as leave 32 or more in each.
        conj_sym: hold P = N / 2 states, or P = N with the conjugate ones as parameters of their own if False.
        clip_eigs: keeps Re Λ below -0.0001; False leaves it free, as the paper's LRA models do, and a state may then
            grow without bound.
        disc: the discretisation, "zoh" or "bilinear".
        dt_min, dt_max: the interval in which Δ starts, log-evenly.
        activation: with g = GELU(y): "half_glu1" g ⊙ σ(W g), the paper's; "half_glu2" y ⊙ σ(W g); "full_glu"
            W' g ⊙ σ(W g); "gelu" g; or None, y itself.
        bidirectional: C̃ has a second half, for the states of a scan from the end; such a layer cannot step.
        lr_scale: learning rate of Λ, Δ and B relative to the rest (the authors': 0.001 beside 0.004 or so).
    """

    state_type = S5State

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        blocks: int | None = None,
        conj_sym: bool = True,
        clip_eigs: bool = True,
        disc: str = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        activation: str | None = "half_glu1",
        bidirectional: bool = False,
        lr_scale: float = 0.25,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.d_state = max(2, d_model // 2 * 2) if d_state is None else positive_int("d_state", d_state)
        if self.d_state % 2:
            raise ValueError(f"d_state: expected an even size, whose eigenvalues are conjugate pairs, got {d_state}")
        if blocks is None:
            blocks = max(J for J in range(1, max(1, self.d_state // 32) + 1) if self.d_state % (2 * J) == 0)
        if self.d_state % (2 * positive_int("blocks", blocks)):
            raise ValueError(f"blocks: expected a divisor of d_state / 2 = {self.d_state // 2}, got {blocks}")
        check_choice("disc", disc, DISCRETISATIONS)
        check_choice("activation", activation, ACTIVATIONS)
        check_time_steps(dt_min, dt_max)
        if not finite(lr_scale) or not 0 < lr_scale <= 1:
            raise ValueError(f"lr_scale: expected a number in (0, 1], got {lr_scale!r}")
        self.blocks, self.conj_sym, self.clip_eigs, self.disc = blocks, conj_sym, clip_eigs, disc
        self.dt_min, self.dt_max, self.activation, self.lr_scale = dt_min, dt_max, activation, lr_scale
        P = self.d_state // 2 if conj_sym else self.d_state
        self.Lambda_re = nn.Parameter(torch.empty(P))
        self.Lambda_im = nn.Parameter(torch.empty(P))
        self.log_dt = nn.Parameter(torch.empty(P))
        self.B = nn.Parameter(torch.empty(P, 2, d_model))
        self.C = nn.Parameter(torch.empty(d_model, 2 * P if bidirectional else P, 2))
        self.D = nn.Parameter(torch.empty(d_model))
        gated = activation not in ("gelu", None)
        self.gate = nn.Linear(d_model, (2 if activation == "full_glu" else 1) * d_model) if gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: Λ from HiPPO-N, B real and C complex lecun-normal in its basis, D normal."""
        λ, V = normal_legs(self.d_state // self.blocks)  # (R / 2), (R, R / 2) of a block of R
        if not self.conj_sym:
            λ, V = torch.cat((λ, λ.conj())), torch.cat((V, V.conj()), 1)
        B = lecun_normal(self.d_model, self.blocks, V.shape[0], self.d_model)
        C_re, C_im = (lecun_normal(self.d_state, self.d_model, 2, self.blocks, V.shape[0]) for _ in range(2))
        B = (V.mH @ B.to(V.dtype)).flatten(0, 1)  # (P, D)
        C = (torch.complex(C_re, C_im) @ V).flatten(2)  # (D, 2, P), of each way
        C = C[:, 0] if self.causal else C.flatten(1)
        with torch.no_grad():
            self.Lambda_re.copy_(λ.real.repeat(self.blocks))
            self.Lambda_im.copy_(λ.imag.repeat(self.blocks))
            self.log_dt.uniform_(math.log(self.dt_min), math.log(self.dt_max))
            self.B.copy_(torch.stack((B.real, B.imag), 1))
            self.C.copy_(torch.stack((C.real, -C.imag), -1))
        nn.init.normal_(self.D)
        if self.gate is not None:
            self.gate.reset_parameters()

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """The authors' recipe: a smaller learning rate and no weight decay for Λ, Δ and B."""
        slow = {"lr_scale": self.lr_scale, "weight_decay": 0.0}
        return {name: dict(slow) for name in ("Lambda_re", "Lambda_im", "log_dt", "B")}

    def state_spec(self) -> StateSpec:
        return {"h": ((len(self.Lambda_re),), torch.promote_types(self.D.dtype, torch.complex64))}

    def discrete(self) -> tuple[Tensor, Tensor]:
        """Returns Λ̄ and the factor of B̃ in B̄, (P) complex, at least complex64."""
        dtype = exact_dtype(self.log_dt)
        dt = self.log_dt.to(dtype).clamp(-20, 7).exp()
        re = self.Lambda_re.to(dtype)
        if self.clip_eigs:
            re = re.clamp(max=-1e-4)
        log_a, factor = discretize(torch.complex(re, self.Lambda_im.to(dtype)), dt, self.disc)
        if self.clip_eigs:
            log_a = inside_circle(log_a, self.D.dtype)
        wide = torch.promote_types(self.D.dtype, torch.complex64)
        return log_a.exp().to(wide), factor.to(wide)

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        a, factor = self.discrete()
        u = F.linear(x, self.B.flatten(0, 1))  # (B, T, 2 P)
        u = torch.view_as_complex(u.to(accumulation_dtype(u.dtype)).unflatten(-1, (-1, 2))) * factor
        h, last = diagonal_scan(a, u, None if state is None else state.h, reset=reset, mask=mask)
        if not self.causal:
            h_reverse, _ = diagonal_scan(a, u, reset=last_of_document(reset), mask=mask, reverse=True)
            h = torch.cat((h, h_reverse), -1)
        v = torch.view_as_real(h).flatten(-2).to(x.dtype)
        y = (2 if self.conj_sym else 1) * F.linear(v, self.C.flatten(1)) + self.D * x
        return self.activate(y), S5State(last) if self.causal else None

    def activate(self, y: Tensor) -> Tensor:
        """Applies the activation to y (B, T, D)."""
        if self.activation is None:
            return y
        g = F.gelu(y)
        if self.gate is None:
            return g
        if self.activation == "full_glu":
            return F.glu(self.gate(g))
        return (g if self.activation == "half_glu1" else y) * torch.sigmoid(self.gate(g))


def lecun_normal(fan_in: int, *shape: int) -> Tensor:
    """Draws a float64 tensor from a normal distribution cut off at two deviations, of variance 1 / fan_in."""
    std = fan_in**-0.5 / 0.87962566103423978  # the deviation that is left of 1 after the cut
    return nn.init.trunc_normal_(torch.empty(*shape, dtype=torch.float64), std=std, a=-2 * std, b=2 * std)
