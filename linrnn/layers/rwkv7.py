"""The time mixing of RWKV-7 "Goose" (Peng et al. 2025, arXiv:2503.14456): a generalised delta rule.

    x^z_t = x_t + μ_z (x_{t-1} - x_t)                            z = r, w, k, v, a, g: mixes with the token before
    w_t = exp(-e^{-1/2} σ(w0 + tanh(x^w_t W1) W2))               decay of each key channel, in (0.545, 1)
    a_t = σ(a0 + x^a_t A1 A2)                                    in-context learning rate of each key channel
    κ̂_t = κ_t / |κ_t|,  κ_t = (x^k_t W_k) ξ                      what is removed; of length 1 per head
    k_t = (x^k_t W_k) (1 + (a_t - 1) α),  v_t = x^v_t W_v        what is written
    S_t = S_{t-1} (diag(w_t) - κ̂_t^T (a_t κ̂_t)) + v_t^T k_t      one matrix per head, all vectors are rows
    p_t = GroupNorm(r_t S_t^T) + (r_t · ρ k_t) v_t               r_t = x^r_t W_r; the bonus of the current token
    y_t = (p_t σ(x^g_t G1) G2) W_o

ξ = k_k, α = k_a, ρ = r_k, μ_z = x_z. All layers but the first of the paper's models also mix v_t with the first layer's
v_t. That is a connection between layers, not part of one, and left out here.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding
from linrnn.layers.heads import HeadNorm, count_heads, merge_heads, split_heads
from linrnn.layers.token_shift import layer_ratios, token_shift
from linrnn.ops import rwkv7

MIXED = ("r", "w", "k", "v", "a", "g")


class RWKV7State(NamedTuple):
    """x (B, D): the last token; S (B, H, K, V), V = K: the paper's S_t^T. float32, or float64 for a float64 layer."""

    x: Tensor
    S: Tensor


class RWKV7(RecurrentLayer):
    """RWKV-7's attention: vector-valued decay, removal and learning rate, a group norm and a gate.

    Parameters are named as in the official checkpoints; x_*, w0, a0, k_k, k_a are vectors (D) here.

    Args:
        d_model: width D of input and output.
        n_heads: number H of heads of width K = D / H; if None, at least 4 heads up to 64 wide.
        layer_index, n_layers: place of the layer in its model, from 0, on which the initial decays and mixes depend. A
            lone layer starts as the first.
        zero_init: starts W_o at zero, as the official training code does: the layer then adds nothing to the residual
            stream around it. If False, W_o starts orthogonal.
    """

    state_type = RWKV7State

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        layer_index: int = 0,
        n_layers: int = 1,
        zero_init: bool = False,
    ):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads)
        self.d_head = d_model // self.n_heads
        self.depth = layer_ratios(layer_index, n_layers)
        self.zero_init = zero_init
        D, small, large = d_model, low_rank(d_model, 2.5), low_rank(d_model, 5.0)
        for z in MIXED:
            self.register_parameter(f"x_{z}", nn.Parameter(torch.empty(D)))
        self.w0, self.a0, self.k_k, self.k_a = (nn.Parameter(torch.empty(D)) for _ in range(4))
        self.r_k = nn.Parameter(torch.empty(self.n_heads, self.d_head))
        self.w1, self.a1, self.g1 = (nn.Parameter(torch.empty(D, rank)) for rank in (small, small, large))
        self.w2, self.a2, self.g2 = (nn.Parameter(torch.empty(rank, D)) for rank in (small, small, large))
        self.receptance = nn.Linear(D, D, bias=False)
        self.key = nn.Linear(D, D, bias=False)
        self.value = nn.Linear(D, D, bias=False)
        self.output = nn.Linear(D, D, bias=False)
        self.ln_x = HeadNorm(self.n_heads, self.d_head, center=True, eps=64e-5)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters, as the official training code does."""
        D, rising, falling = self.d_model, *self.depth
        with torch.no_grad():
            share = torch.arange(D, dtype=torch.float64) / D
            for z, power in zip(MIXED, (0.2, 0.9, 0.7, 0.7, 0.9, 0.2), strict=True):
                getattr(self, f"x_{z}").copy_(1 - share ** (power * falling))
            linear = torch.arange(D, dtype=torch.float64) / max(D - 1, 1)
            # said once: transformers, which builds models without memory, leaves linspace alone on the CPU
            within = torch.linspace(-1, 1, self.d_head, dtype=share.dtype, device=share.device).repeat(self.n_heads)
            zigzag = within * within.abs()
            self.w0.copy_(-5.5 + 6 * linear ** (1 + rising**0.3) + 2.5 * zigzag)
            self.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * (linear - 0.5))
            self.k_k.copy_(0.71 - 0.1 * (linear - 0.5))
            self.k_a.fill_(1.02)
            self.r_k.fill_(-0.04)
        for down, up in ((self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)):
            nn.init.zeros_(down)
            nn.init.orthogonal_(up, gain=0.1)
        for linear_map, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear_map.weight, -bound * D**-0.5, bound * D**-0.5)
        if self.zero_init:
            nn.init.zeros_(self.output.weight)
        else:
            nn.init.orthogonal_(self.output.weight)
        self.ln_x.reset_parameters()

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.w0.dtype)
        return {"x": ((self.d_model,), dtype), "S": ((self.n_heads, self.d_head, self.d_head), dtype)}

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """The official recipe: w0 learns twice as fast; only the four projections decay."""
        low_rank_maps = {f"{name}{i}": {"weight_decay": 0.0} for name in ("w", "a", "g") for i in (1, 2)}
        return {"w0": {"lr_scale": 2.0, "weight_decay": 0.0}, "r_k": {"weight_decay": 0.0}, **low_rank_maps}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        before, last = token_shift(x, state and state.x, reset, mask)  # (B, T, D), (B, D)
        change = before - x
        x_r, x_w, x_k, x_v, x_a, x_g = (x + change * getattr(self, f"x_{z}") for z in MIXED)
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)  # (B, T, D)
        g = (x_g @ self.g1).sigmoid() @ self.g2
        rate = (self.a0 + x_a @ self.a1 @ self.a2).sigmoid()

        dtype = accumulation_dtype(x.dtype)
        w = (self.w0 + torch.tanh(x_w @ self.w1) @ self.w2).to(dtype)
        log_decay = -math.exp(-0.5) * split_heads(w.sigmoid(), self.n_heads)
        κ = F.normalize(split_heads((k * self.k_k).to(dtype), self.n_heads), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r, k, v, rate = (split_heads(z, self.n_heads) for z in (r, k, v, rate))  # (B, T, H, K)
        S = None if state is None else state.S
        o, S = rwkv7(r, log_decay, k, v, -κ, κ * rate, S, reset=reset, mask=mask)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = self.output((merge_heads(self.ln_x(o) + bonus) * g).to(r.dtype))
        return y, RWKV7State(last.to(S.dtype), S)


def low_rank(d_model: int, factor: float) -> int:
    """Returns the official rank of a low-rank map, factor * sqrt(D) in steps of 32, and at most D."""
    return min(d_model, max(32, round(factor * d_model**0.5 / 32) * 32))
