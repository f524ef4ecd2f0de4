"""What LRU and SLRU share: a diagonal recurrence whose decays start on a ring, normalised by gamma."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StepFn, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.frozen import stands_for_call, written_for
from linrnn.ops import diagonal_scan
from linrnn.ops.step_program import Ref, StepProgram


class RingRNN(RecurrentLayer):
    """h_t = λ h_{t-1} + exp(gamma_log) (B x_t),   y_t = C h_t (+ D x_t),   |λ| = exp(-exp(nu_log)) < 1.

    A subclass gives λ (`eigenvalues`) and how the real projections hold its numbers: `pair` is the shape of one number
    in B and C, `to_states` and `from_states` view (B, T, N * prod(pair)) reals as (B, T, N) states and back.

    Bidirectional layers share one budget of states: the first half scans forward, the second half backward.
    """

    pair: tuple[int, ...] = ()

    def __init__(
        self,
        d_model: int,
        d_state: int,
        *,
        r_min: float,
        r_max: float,
        use_D: bool,
        bidirectional: bool,
        lr_scale: float,
    ):
        super().__init__(d_model, causal=not bidirectional)
        self.d_state = positive_int("d_state", d_state)
        if not finite(r_min, r_max) or not 0 <= r_min <= r_max < 1 or r_max == 0:
            raise ValueError(f"r_min, r_max: expected 0 <= r_min <= r_max < 1 and r_max > 0, got {r_min!r}, {r_max!r}")
        if bidirectional and d_state % 2:
            raise ValueError(f"d_state: a bidirectional layer splits its states in two, expected even, got {d_state}")
        if not finite(lr_scale) or not 0 < lr_scale <= 1:
            raise ValueError(f"lr_scale: expected a number in (0, 1], got {lr_scale!r}")
        self.r_min, self.r_max, self.lr_scale = r_min, r_max, lr_scale
        self.nu_log = nn.Parameter(torch.empty(d_state))
        self.gamma_log = nn.Parameter(torch.empty(d_state))
        self.B = nn.Parameter(torch.empty(d_state, *self.pair, d_model))
        self.C = nn.Parameter(torch.empty(d_model, d_state, *self.pair))
        self.D = nn.Parameter(torch.empty(d_model)) if use_D else None

    def eigenvalues(self) -> Tensor:
        """Returns λ (N), at least float32 or complex64."""
        raise NotImplementedError

    def to_states(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def from_states(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def decay(self) -> Tensor:
        """Returns ν = exp(nu_log) (N), at least float32, kept where exp(-ν) rounds neither to one nor to zero."""
        dtype = accumulation_dtype(self.nu_log.dtype)
        return self.nu_log.to(dtype).clamp(math.log(4 * torch.finfo(dtype).eps), math.log(80)).exp()

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """The LRU paper's recipe: recurrent learning rate x 0.1 to 0.5, no weight decay on λ, γ and B."""
        slow = {name: {"lr_scale": self.lr_scale, "weight_decay": 0.0} for name in self.recurrent_parameters()}
        return slow | {"B": {"weight_decay": 0.0}}

    def recurrent_parameters(self) -> tuple[str, ...]:
        return ("nu_log", "gamma_log")

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        λ = self.eigenvalues()  # (N)
        half = slice(0, self.d_state if self.causal else self.d_state // 2)
        y, final = self.scan(λ, x, state, half, reset=reset, mask=mask)
        if not self.causal:
            other, final = slice(half.stop, self.d_state), None
            y = y + self.scan(λ, x, None, other, reset=last_of_document(reset), mask=mask, reverse=True)[0]
        if self.D is not None:
            y = y + self.D * x
        return y, final

    @torch.no_grad()
    def uncompiled_step(self) -> StepFn:
        """Returns the frozen step in operations of torch: λ and γ are computed once."""
        if not stands_for_call(self, "uncompiled_step", "scan"):
            return self.step
        λ = self.eigenvalues()
        γ = self.gamma_log.to(λ.real.dtype).exp()

        @torch.no_grad()
        def step(x_t: Tensor, state: State) -> tuple[Tensor, State]:
            h = λ * state.h + γ * self.to_states(F.linear(x_t, self.B.flatten(0, -2)))
            y = F.linear(self.from_states(h).to(x_t.dtype), self.C.flatten(1))
            return y if self.D is None else y + self.D * x_t, self.state_type(h)

        return step

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        written_for(self, "emit_step", "scan")
        λ = self.eigenvalues()
        γ = self.gamma_log.to(λ.real.dtype).exp()
        u = program.linear(x, self.B.flatten(0, -2), unit=math.prod(self.pair))
        h = program.diagonal(u, λ, γ, local=True)
        program.linear(h, self.C.flatten(1), out=out, add=add, gain=self.D, gained=None if self.D is None else x)

    def scan(
        self,
        λ: Tensor,
        x: Tensor,
        state: State,
        part: slice,
        *,
        reset: Tensor | None,
        mask: Tensor | None,
        reverse: bool = False,
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) to C h (B, T, D) and the final state, for a part of the states."""
        λ, B, C = λ[part], self.B[part], self.C[:, part]
        γ = self.gamma_log[part].to(λ.real.dtype).exp()  # (N)
        if x.shape[0] * x.shape[1] < self.d_model:  # γ scales whichever has fewer numbers, B x or B
            u = γ * self.to_states(F.linear(x, B.flatten(0, -2)))  # (B, T, N)
        else:
            B = (γ.view(-1, *(1 for _ in self.pair), 1) * B).to(B.dtype)  # (N, pair, D)
            u = self.to_states(F.linear(x, B.flatten(0, -2)))
        h, h_T = diagonal_scan(λ, u, None if state is None else state.h, reset=reset, mask=mask, reverse=reverse)
        v = self.from_states(h).to(x.dtype)  # (B, T, N pair)
        return F.linear(v, C.flatten(1)), self.state_type(h_T)


def ring_init_(nu_log: Tensor, gamma_log: Tensor, r_min: float, r_max: float) -> None:
    """Draws |λ|² uniformly in [r_min², r_max²] (uniform on the ring) and sets γ = sqrt(1 - |λ|²), in place."""
    with torch.no_grad():
        u = 1 - torch.rand_like(nu_log)  # in (0, 1]: r_min = 0 gives no infinite decay
        ν = -0.5 * torch.log(u * (r_max**2 - r_min**2) + r_min**2)
        nu_log.copy_(ν.log())
        gamma_log.copy_(0.5 * torch.log(-torch.expm1(-2 * ν)))  # log sqrt(1 - r²) without the cancellation at r = 1


def last_of_document(reset: Tensor | None) -> Tensor | None:
    """Moves flags (B, T) from the first token of each document to the last of the one before, for a reverse scan."""
    return None if reset is None else reset.roll(-1, 1)  # what arrives at T - 1 resets a state that is zero anyway
