"""The recurrent unit of HGRN (Qin et al. 2023, arXiv:2311.04823, section 3).

    μ_t = σ(W_μ x_t),  λ_t = γ + (1 - γ) μ_t,  c_t = SiLU(W_c x_t),  g_t = SiLU(W_g x_t)
    h_t = λ_t e^{iθ} h_{t-1} + (1 - λ_t) c_t
    y_t = W_o (g_t ⊙ LayerNorm([Re h_t, Im h_t]))

γ, the lower bound of the forget gate λ, rises from layer to layer (`LowerBounds`), so that upper layers remember for
longer. All linear maps have biases. The gate follows the norm, as in the authors' code; the paper's text has it before.
Real channels, as most of HGRN's descendants have, are those with θ = 0 and no imaginary parts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite, positive_int
from linrnn.layers.heads import HeadNorm
from linrnn.layers.ring import last_of_document
from linrnn.layers.token_shift import layer_ratios
from linrnn.ops import diagonal_scan


class HGRNState(NamedTuple):
    """h (B, N) float32, or complex64 for complex channels; float64 or complex128 for a float64 layer."""

    h: Tensor


class LowerBounds(nn.Module):
    """The lower bounds of all layers of a model, learned: γ^k = softmax(Γ)_1 + ... + softmax(Γ)_{k-1}, Γ (n_layers, N).

    ```python
    bounds = LowerBounds(n_layers=4, d_state=64)
    stack = [HGRN(64, lower_bound=bounds, layer_index=k) for k in range(4)]  # starts with 0, 1/4, 1/2, 3/4
    ```
    """

    def __init__(self, n_layers: int, d_state: int):
        super().__init__()
        self.n_layers, self.d_state = positive_int("n_layers", n_layers), positive_int("d_state", d_state)
        self.gamma = nn.Parameter(torch.empty(n_layers, d_state))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Equal steps from layer to layer."""
        nn.init.zeros_(self.gamma)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        return {"gamma": {"weight_decay": 0.0}}

    def forward(self) -> Tensor:
        """Returns γ (n_layers, N), at least float32; the first row is zero."""
        return 1 - self.complement()

    def complement(self) -> Tensor:
        """Returns 1 - γ (n_layers, N), at least float32, without the rounding of 1 - γ where γ is near one."""
        P = self.gamma.to(accumulation_dtype(self.gamma.dtype)).softmax(0)
        return P.flip(0).cumsum(0).flip(0)


class HGRN(RecurrentLayer):
    """Diagonal recurrence whose one gate forgets and writes, with a lower bound on what it keeps.

    Args:
        d_model: width D of input and output.
        d_state: number N of channels; D if None (4 D² parameters; 7 D² if complex).
        lower_bound: γ, a number in [0, 1), or the `LowerBounds` that the layers of a model share.
        layer_index: row of the LowerBounds, from 0.
        complex: complex channels that turn by θ per token, as in the paper; θ starts at 10000^(-2n/N), n = 0, 1, ...
        bidirectional: adds the states of a second, backward scan of the same gates and inputs, as in the paper's models
            of the Long Range Arena; such a layer cannot step.
    """

    state_type = HGRNState

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int | None = None,
        lower_bound: float | LowerBounds = 0.0,
        layer_index: int = 0,
        complex: bool = False,
        bidirectional: bool = False,
    ):
        super().__init__(d_model, causal=not bidirectional)
        N = self.d_state = d_model if d_state is None else positive_int("d_state", d_state)
        self.lower_bound, self.layer_index = lower_bound, layer_index
        if isinstance(lower_bound, LowerBounds):
            layer_ratios(layer_index, lower_bound.n_layers)
            if lower_bound.d_state != N:
                raise ValueError(f"lower_bound: expected bounds of d_state = {N} channels, got {lower_bound.d_state}")
        elif not finite(lower_bound) or not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound: expected a number in [0, 1) or LowerBounds, got {lower_bound!r}")
        elif layer_index != 0:
            raise ValueError(f"layer_index: expected 0 where lower_bound is a number, got {layer_index!r}")
        reals = 2 * N if complex else N
        self.input_proj = nn.Linear(d_model, reals)
        self.lambda_proj = nn.Linear(d_model, N)
        self.gate = nn.Linear(d_model, reals)
        self.theta = nn.Parameter(torch.empty(N)) if complex else None
        self.norm = HeadNorm(reals, center=True)
        self.out_proj = nn.Linear(reals, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: torch's own for the linear maps, as in the authors' code. LowerBounds stay."""
        for module in (self.input_proj, self.lambda_proj, self.gate, self.norm, self.out_proj):
            module.reset_parameters()
        if self.theta is not None:
            with torch.no_grad():
                n = torch.arange(self.d_state, dtype=self.theta.dtype, device=self.theta.device)
                self.theta.copy_(10000 ** (-2 * n / self.d_state))

    def state_spec(self) -> StateSpec:
        dtype = self.out_proj.weight.dtype
        wide = accumulation_dtype(dtype) if self.theta is None else torch.promote_types(dtype, torch.complex64)
        return {"h": ((self.d_state,), wide)}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token (None if bidirectional)."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        a, u = self.coefficients(x)
        h, final = diagonal_scan(a, u, None if state is None else state.h, reset=reset, mask=mask)
        if not self.causal:
            h = h + diagonal_scan(a, u, reset=last_of_document(reset), mask=mask, reverse=True)[0]
        if self.theta is not None:
            h = torch.cat((h.real, h.imag), -1)  # (B, T, 2N)
        gate = F.silu(self.gate(x))
        y = self.out_proj(self.norm(h.to(gate.dtype)) * gate)
        return y, HGRNState(final) if self.causal else None

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps x (B, T, D) to λ e^{iθ} and (1 - λ) c, (B, T, N)."""
        logits, c = self.lambda_proj(x), F.silu(self.input_proj(x))
        wide = accumulation_dtype(logits.dtype)
        # 1 - λ = (1 - γ) σ(-logits) keeps its digits where λ is near one
        write = self.free(wide) * torch.sigmoid(-logits.to(wide))
        λ = 1 - write
        if self.theta is None:
            return λ, (write * c).to(c.dtype)
        θ = self.theta.to(wide)
        c = torch.view_as_complex(c.to(wide).unflatten(-1, (-1, 2)))  # (B, T, 2N) -> (B, T, N)
        return torch.complex(λ * θ.cos(), λ * θ.sin()), write * c

    def free(self, dtype: torch.dtype) -> Tensor | float:
        """Returns 1 - γ, a number or (N)."""
        if isinstance(self.lower_bound, LowerBounds):
            return self.lower_bound.complement()[self.layer_index].to(dtype)
        return 1 - self.lower_bound
