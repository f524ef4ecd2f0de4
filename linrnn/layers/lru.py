"""Linear Recurrent Unit (Orvieto et al. 2023, arXiv:2303.06349).

    h_t = λ h_{t-1} + γ (B x_t)        λ = exp(-exp(nu_log) + i exp(theta_log)),  γ = exp(gamma_log)
    y_t = Re(C h_t) + D x_t

h, λ, B, C are complex, x, y, γ, D real; γ starts at sqrt(1 - |λ|²), so that white input keeps states of order one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linrnn.layers.base import StateSpec, accumulation_dtype
from linrnn.layers.ring import RingRNN, ring_init_


class LRUState(NamedTuple):
    """h (B, N) complex64; complex128 for a float64 layer."""

    h: Tensor


class LRU(RingRNN):
    """Diagonal complex linear RNN.

    Storage: B (N, 2, D) holds [Re B, Im B] and C (D, N, 2) holds [Re C, -Im C], so that both projections are one real
    matrix product with interleaved complex numbers: (γ B) x viewed as complex, and C on h viewed as real.

    Args:
        d_model: width D of input and output.
        d_state: number N of complex states; d_model if None.
        r_min, r_max: the ring in which the eigenvalues start.
        max_phase: their phases start uniformly in (0, max_phase]; the paper's long tasks use π / 10.
        use_D: the skip connection D x_t; the variant's choice if None.
        variant: "paper" (normal B, C and D) or "post" (kexue.fm 9554: Glorot uniform B and C, no D).
        bidirectional: half the states scan forward, half backward; such a layer cannot step.
        lr_scale: learning rate of nu_log, theta_log and gamma_log relative to the rest (the paper tunes 0.1 to 0.5).
    """

    state_type = LRUState
    pair = (2,)

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        max_phase: float = 2 * math.pi,
        use_D: bool | None = None,
        variant: str = "paper",
        bidirectional: bool = False,
        lr_scale: float = 0.5,
    ):
        if variant not in ("paper", "post"):
            raise ValueError(f'variant: expected "paper" or "post", got {variant!r}')
        if not 0 < max_phase <= 2 * math.pi:
            raise ValueError(f"max_phase: expected a number in (0, 2π], got {max_phase}")
        super().__init__(
            d_model,
            d_model if d_state is None else d_state,
            r_min=r_min,
            r_max=r_max,
            use_D=variant == "paper" if use_D is None else use_D,
            bidirectional=bidirectional,
            lr_scale=lr_scale,
        )
        self.max_phase, self.variant = max_phase, variant
        self.theta_log = nn.Parameter(torch.empty(self.d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: E|B x|² = 1 for white x, so that E|h_t|² = 1 - |λ|^{2(t+1)} (variant "paper")."""
        ring_init_(self.nu_log, self.gamma_log, self.r_min, self.r_max)
        with torch.no_grad():
            # 1 - rand is in (0, 1]: a phase of zero would be theta_log = -inf
            self.theta_log.copy_(torch.log(self.max_phase * (1 - torch.rand_like(self.theta_log))))
        if self.variant == "paper":
            nn.init.normal_(self.B, std=(2 * self.d_model) ** -0.5)
            nn.init.normal_(self.C, std=self.d_state**-0.5)
        else:
            bound = math.sqrt(6 / (self.d_model + 2 * self.d_state))
            nn.init.uniform_(self.B, -bound, bound)
            nn.init.uniform_(self.C, -bound, bound)
        if self.D is not None:
            nn.init.normal_(self.D)

    def state_spec(self) -> StateSpec:
        return {"h": ((self.d_state,), torch.promote_types(self.nu_log.dtype, torch.complex64))}

    def recurrent_parameters(self) -> tuple[str, ...]:
        return ("nu_log", "theta_log", "gamma_log")

    def eigenvalues(self) -> Tensor:
        """Returns λ (N), complex64 or complex128: inside the unit circle whatever the parameters."""
        ν = self.decay()
        θ = self.theta_log.to(ν.dtype).clamp(max=10).exp()  # e^10 turns per step are as good as any, inf is not
        return torch.exp(torch.complex(-ν, θ))

    def to_states(self, u: Tensor) -> Tensor:
        u = u.to(accumulation_dtype(u.dtype))
        return torch.view_as_complex(u.unflatten(-1, (-1, 2)))  # (B, T, 2N) -> (B, T, N)

    def from_states(self, h: Tensor) -> Tensor:
        return torch.view_as_real(h).flatten(-2)  # (B, T, N) -> (B, T, 2N)
