"""Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464): the delta rule with Mamba-2's decay.

    q_t, k_t, v_t = silu(conv(W x))_t        q and k of length 1 per head;  β_t = σ(W_β x_t), or 2 σ(W_β x_t)
    α_t = exp(-exp(A_log) softplus(W_a x_t + dt_bias))     one decay per head and token
    S_t = α_t S_{t-1} + β_t k_t (v_t - α_t S_{t-1}^T k_t)^T
    y_t = W_o (RMSNorm(S_t^T q_t / sqrt(K)) silu(W_g x_t))  normalised per head

S is one K x V matrix per head: α forgets everything at once, β overwrites under one key.
"""

import torch
from torch import Tensor, nn

from linrnn.layers.base import accumulation_dtype
from linrnn.layers.delta_layer import DeltaLayer
from linrnn.layers.heads import white_
from linrnn.layers.time_step import check_time_steps, dt_bias_


class GatedDeltaNet(DeltaLayer):
    """DeltaNet that also forgets, at a rate that depends on the token.

    The state is a DeltaState: S (B, H, K, V), and the last inputs of the short convolution.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads; if None, at least 4 heads as wide as 64 allows.
        d_key, d_value: widths K and V of a head's keys and values; D / H if None. The paper's models have V = 2 K and
            H K = 3 D / 4.
        conv: what a short convolution runs over, "none", "k" or "qkv".
        conv_width: length of its filters.
        allow_neg_eigval: doubles β, as in `DeltaNet`.
        use_gate: gates the output with silu(W_g x).
        dt_min, dt_max: softplus(dt_bias) starts log-uniform between these.
    """

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        d_key: int | None = None,
        d_value: int | None = None,
        conv: str = "qkv",
        conv_width: int = 4,
        allow_neg_eigval: bool = False,
        use_gate: bool = True,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__(
            d_model,
            n_heads=n_heads,
            d_key=d_key,
            d_value=d_value,
            conv=conv,
            conv_width=conv_width,
            allow_neg_eigval=allow_neg_eigval,
            use_gate=use_gate,
        )
        check_time_steps(dt_min, dt_max)
        self.dt_min, self.dt_max = dt_min, dt_max
        self.a = nn.Linear(d_model, self.n_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: those of DeltaNet, exp(A_log) uniform in (0, 16], softplus(dt_bias) log-uniform."""
        super().reset_parameters()
        white_(self.a)
        with torch.no_grad():
            self.A_log.copy_(torch.log(16 * (1 - torch.rand_like(self.A_log))))
        dt_bias_(self.dt_bias, self.dt_min, self.dt_max)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        return {name: {"weight_decay": 0.0} for name in ("A_log", "dt_bias")}

    def log_decay(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        dt = self.a(x).to(dtype) + self.dt_bias
        # softplus by another name: torch.compile expects other strides of F.softplus's gradient than it has
        return -self.A_log.to(dtype).exp() * torch.logaddexp(dt, torch.zeros_like(dt))
