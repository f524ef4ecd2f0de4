"""Multi-dimensional damped exponential moving average (Ma et al. 2023, arXiv:2209.10655, section 3.1).

h_t = α ⊙ β x_t + (1 - α ⊙ δ) ⊙ h_{t-1}        for each channel; α, δ in (0, 1), β, η, h in R^N
y_t = η^T h_t / sqrt(N) + ω x_t
"""

import torch
from torch import Tensor, nn

from linrnn.layers.base import accumulation_dtype, positive_int
from linrnn.layers.ring import last_of_document
from linrnn.ops import diagonal_ssm


class DampedEMA(nn.Module):
    """Maps x (B, T, D) and a state h (B, D, N), at least float32, to y (B, T, D) and the next state.

    α and δ are the sigmoids of the parameters `alpha` and `delta`. Bidirectional, the two directions have their own
    parameters, stacked, and their averages are added; there is no state then.

    Args:
        channels: number D of channels.
        d_state: number N of averages for each.
        bidirectional: averages over later tokens too.
    """

    def __init__(self, channels: int, *, d_state: int = 16, bidirectional: bool = False):
        super().__init__()
        self.channels, self.d_state = positive_int("channels", channels), positive_int("d_state", d_state)
        self.bidirectional = bidirectional
        shape = (2 * channels if bidirectional else channels, d_state)
        self.alpha = nn.Parameter(torch.empty(shape))
        self.delta = nn.Parameter(torch.empty(shape))
        self.beta = nn.Parameter(torch.empty(shape))
        self.eta = nn.Parameter(torch.empty(shape))
        self.omega = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in the authors' code: α and δ around one half, β of alternating signs, η and ω normal."""
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1
        nn.init.normal_(self.eta)
        nn.init.normal_(self.omega)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay: a sigmoid of zero is no simpler than any other."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters()}

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns log(1 - α δ), α β and η / sqrt(N), each (D or 2 D, N) and at least float32."""
        dtype = accumulation_dtype(self.alpha.dtype)
        α = torch.sigmoid(self.alpha.to(dtype))
        # where both sigmoids round to one, the state is forgotten, but a log of zero would make NaN of its powers
        damped = (α * torch.sigmoid(self.delta.to(dtype))).clamp(max=1 - torch.finfo(dtype).eps)
        return torch.log1p(-damped), α * self.beta, self.eta.to(dtype) * self.d_state**-0.5

    def forward(
        self, x: Tensor, h: Tensor | None = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Averages x; where `mask` is False x must be finite, and zero if bidirectional. Flags as in every layer."""
        coefficients = self.coefficients()
        if not self.bidirectional:
            y, final = diagonal_ssm(*coefficients, x, h, reset=reset, mask=mask)
            return y + (self.omega * x).to(y.dtype), final
        (a, a_), (b, b_), (c, c_) = (p.chunk(2) for p in coefficients)
        entered = last_of_document(reset)
        y, _ = diagonal_ssm(a, b, c, x, reset=reset)
        z, _ = diagonal_ssm(a_, b_, c_, x.flip(1), reset=None if entered is None else entered.flip(1))
        return y + z.flip(1) + (self.omega * x).to(y.dtype), None
