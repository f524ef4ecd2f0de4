"""SLRU, the LRU with real numbers only (kexue.fm 9554).

h_t = λ h_{t-1} + γ (B x_t)        λ = exp(-exp(nu_log)),  γ = exp(gamma_log)
y_t = C h_t (+ D x_t)
"""

from typing import NamedTuple

from torch import Tensor, nn

from linrnn.layers.base import StateSpec, accumulation_dtype
from linrnn.layers.ring import RingRNN, ring_init_


class SLRUState(NamedTuple):
    """h (B, N) float32; float64 for a float64 layer."""

    h: Tensor


class SLRU(RingRNN):
    """Diagonal real linear RNN: an LRU without phases, whose d_state = 2 * d_model makes it as large as one.

    Args:
        d_model: width D of input and output.
        d_state: number N of real states; 2 * d_model if None.
        r_min, r_max: the interval in which the decays λ start (λ² uniform).
        use_D: the skip connection D x_t.
        bidirectional: half the states scan forward, half backward; such a layer cannot step.
        lr_scale: learning rate of nu_log and gamma_log relative to the rest.
    """

    state_type = SLRUState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        r_min: float = 0.9,
        r_max: float = 0.999,
        use_D: bool = False,
        bidirectional: bool = False,
        lr_scale: float = 0.5,
    ):
        super().__init__(
            d_model,
            2 * d_model if d_state is None else d_state,
            r_min=r_min,
            r_max=r_max,
            use_D=use_D,
            bidirectional=bidirectional,
            lr_scale=lr_scale,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: E|B x|² = 1 for white x, so that E|h_t|² = 1 - λ^{2(t+1)}."""
        ring_init_(self.nu_log, self.gamma_log, self.r_min, self.r_max)
        nn.init.normal_(self.B, std=self.d_model**-0.5)
        nn.init.normal_(self.C, std=self.d_state**-0.5)
        if self.D is not None:
            nn.init.normal_(self.D)

    def state_spec(self) -> StateSpec:
        return {"h": ((self.d_state,), accumulation_dtype(self.nu_log.dtype))}

    def eigenvalues(self) -> Tensor:
        """Returns λ (N), float32 or float64: below one whatever the parameters."""
        return (-self.decay()).exp()

    def to_states(self, u: Tensor) -> Tensor:
        return u

    def from_states(self, h: Tensor) -> Tensor:
        return h
