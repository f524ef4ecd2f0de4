"""RWKV's token mixing with a complex decay in the numerator: what kexue.fm 9554 asks for ("complex RWKV").

    y_t = λ y_{t-1} + e^{k_t} v_t        z_t = |λ| z_{t-1} + e^{k_t}        λ = exp(-ν + iθ)
    o_t = σ(r_t) Re(y_{t-1} + e^{u + k_t} v_t) / (z_{t-1} + e^{u + k_t})        out_t = W_o o_t

r_t = W_r x_t and k_t = W_k x_t are real, v_t = W_v x_t complex; ν = exp(nu_log), θ = exp(theta_log), u = gamma_log are
one real number per channel. Token i weighs e^{-(t-1-i)ν + k_i} > 0 in the denominator, which never vanishes, and that
times the phase e^{i(t-1-i)θ} in the numerator, so that |o_t| <= σ(r_t) max_i |v_i|. It is linear attention with rotary
positions, rotated in the numerator only (kexue.fm 8265), and a decay. θ = 0 is the bare token mix of Re v.
"""

import math

import torch
from torch import Tensor, nn

from linrnn.layers.base import StateSpec, accumulation_dtype, finite
from linrnn.layers.wkv_mix import WKVMix


class ComplexRWKV(WKVMix):
    """Weighted mean of complex values, which decay and turn with the distance; its real part gated by σ(r).

    The state is a WKVState of (B, N) each: a = y, complex, and b = z in units of exp(p), p the running maximum of the
    weights.

    Args:
        d_model: width D of input and output.
        d_state: number N of channels; d_model if None (5 D² parameters; N = 4 D / 5 makes it as large as `token_mix`).
        r_min, r_max: the interval in which |λ| starts (|λ|² uniform).
        rope_base: the phases start as those of rotary positions, rope_base^(-n/N) for n < N.
        lr_scale: learning rate of nu_log, theta_log and gamma_log relative to the rest.
    """

    numbers = 2

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        rope_base: float = 10000.0,
        lr_scale: float = 0.5,
    ):
        super().__init__(d_model, d_state=d_state, r_min=r_min, r_max=r_max, lr_scale=lr_scale)
        if not finite(rope_base) or not rope_base >= 1:
            raise ValueError(f"rope_base: expected a number >= 1, got {rope_base!r}")
        self.rope_base = rope_base
        self.theta_log = nn.Parameter(torch.empty(self.d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: as `token_mix`, with the phases of rotary positions."""
        super().reset_parameters()
        with torch.no_grad():
            fraction = torch.arange(self.d_state, dtype=self.theta_log.dtype, device=self.theta_log.device)
            self.theta_log.copy_(-math.log(self.rope_base) * fraction / self.d_state)

    def state_spec(self) -> StateSpec:
        complex_dtype = torch.promote_types(self.nu_log.dtype, torch.complex64)
        return {**super().state_spec(), "a": ((self.d_state,), complex_dtype)}

    def recurrent_parameters(self) -> tuple[str, ...]:
        return ("nu_log", "theta_log", "gamma_log")

    def log_decay(self) -> Tensor:
        θ = self.theta_log.to(accumulation_dtype(self.theta_log.dtype)).clamp(max=10).exp()
        return torch.complex(super().log_decay(), θ)

    def to_values(self, v: Tensor) -> Tensor:
        v = v.to(accumulation_dtype(v.dtype))
        return torch.view_as_complex(v.unflatten(-1, (-1, 2)))  # (B, T, 2N) -> (B, T, N)
