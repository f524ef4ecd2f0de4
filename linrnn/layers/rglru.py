"""The real-gated linear recurrent unit of Griffin and RecurrentGemma (De et al. 2024, arXiv:2402.19427, section 2.4).

    r_t = σ(W_a x_t + b_a),  i_t = σ(W_x x_t + b_x)      block-diagonal W_a and W_x, one block a head
    log a_t = -c r_t softplus(Λ),  c = 8
    h_t = a_t h_{t-1} + sqrt(1 - a_t²) (i_t ⊙ x_t)       y_t = h_t
    h_1 = i_1 ⊙ x_1                                      at the first token of a document

The paper's formula shrinks the first token by sqrt(1 - a²) as well. This is what RecurrentGemma runs, where nothing is
remembered there: a_1 = 0. The state therefore says whether its document has begun. The derivative of the square root is
bounded by 1000, as there. Λ has the sign of RecurrentGemma, the opposite of the paper's a = σ(Λ).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import RecurrentLayer, State, StateSpec, accumulation_dtype, blank_padding, finite
from linrnn.layers.frozen import written_for
from linrnn.layers.heads import count_heads, merge_heads, split_heads
from linrnn.ops import diagonal_scan
from linrnn.ops.step_program import Ref, StepProgram

C = 8.0
MAX_SLOPE = 1000.0


class RGLRUState(NamedTuple):
    """h (B, D), and begun (B), 1 once a token of the document has been read and 0 before, where h counts for nothing.

    Both float32; float64 for a float64 layer.
    """

    h: Tensor
    begun: Tensor


class RGLRU(RecurrentLayer):
    """Diagonal recurrence whose decays and inputs are gated by the token, and nothing around it: see `Griffin`.

    Parameters have the names and shapes of transformers' RecurrentGemmaRglru: recurrent_param (D) is Λ,
    recurrent_gate_weight (H, K, K) and recurrent_gate_bias (H, K), with K = D / H, are W_a (its input first) and b_a,
    input_gate_weight and input_gate_bias are W_x and b_x.

    Args:
        d_model: width D of input, state and output.
        n_heads: number H of blocks of the gates' weights; if None, at least 4 blocks as wide as 64 allows.
        r_min, r_max: exp(-c softplus(Λ)), the decay where r = 1, starts uniform between these. (RecurrentGemma leaves
            the c out of that, and so starts with shorter memories.)
    """

    state_type = RGLRUState

    def __init__(self, d_model: int, *, n_heads: int | None = None, r_min: float = 0.9, r_max: float = 0.999):
        super().__init__(d_model)
        self.n_heads = count_heads(d_model, n_heads)
        if not finite(r_min, r_max) or not 0 < r_min <= r_max < 1:
            raise ValueError(f"r_min, r_max: expected 0 < r_min <= r_max < 1, got {r_min!r}, {r_max!r}")
        self.r_min, self.r_max = r_min, r_max
        H, K = self.n_heads, d_model // self.n_heads
        self.recurrent_param = nn.Parameter(torch.empty(d_model))
        self.input_gate_weight = nn.Parameter(torch.empty(H, K, K))
        self.input_gate_bias = nn.Parameter(torch.empty(H, K))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(H, K, K))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(H, K))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new parameters: white x gives white logits of the gates, and Λ starts as `r_min` and `r_max` say."""
        for weight in (self.input_gate_weight, self.recurrent_gate_weight):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.input_gate_bias)
        nn.init.zeros_(self.recurrent_gate_bias)
        with torch.no_grad():
            # what is lost in a step, rather than the decay: that rounds to one
            loss = (1 - self.r_max) + (self.r_max - self.r_min) * torch.rand_like(self.recurrent_param)
            self.recurrent_param.copy_(torch.expm1(-torch.log1p(-loss) / C).log())  # the inverse of softplus

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on Λ and the biases."""
        return {name: {"weight_decay": 0.0} for name in ("recurrent_param", "input_gate_bias", "recurrent_gate_bias")}

    def state_spec(self) -> StateSpec:
        dtype = accumulation_dtype(self.recurrent_param.dtype)
        return {"h": ((self.d_model,), dtype), "begun": ((), dtype)}

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Maps x (B, T, D) and a state to y (B, T, D) and the state after the last token."""
        self.check_inputs(x, state, reset, mask)
        x = blank_padding(x, mask)
        h, begun = (None, None) if state is None else state
        Λ = self.recurrent_param.to(accumulation_dtype(x.dtype))
        r = self.gate(x, self.recurrent_gate_weight, self.recurrent_gate_bias)  # (B, T, D)
        i = self.gate(x, self.input_gate_weight, self.input_gate_bias)
        # softplus by another name: torch.compile expects other strides of F.softplus's gradient than it has
        log_a = -C * r * torch.logaddexp(Λ, torch.zeros_like(Λ))
        first, begun = begin(x, begun, reset, mask)
        log_a = log_a.masked_fill(first[..., None], -torch.inf)
        u = bounded_sqrt(-torch.expm1(2 * log_a)) * (i * x)
        y, h = diagonal_scan(log_a.exp(), u.to(x.dtype), h, reset=reset, mask=mask)
        return y, RGLRUState(h, begun)

    def emit_step(self, program: StepProgram, x: Ref, out: Ref, add: Ref | None) -> None:
        """Writes the step into a program; see `linrnn.layers.frozen`."""
        program.gate(self.emit_recurrence(program, x), out=out, add=add, local=True)

    def emit_recurrence(self, program: StepProgram, x: Ref) -> Ref:
        """Writes the gates and the recurrence into a program; returns where h is, dealt out by channels."""
        written_for(self, "emit_step", "gate")
        r, i = program.buffer(self.d_model), program.buffer(self.d_model)
        width = self.d_model // self.n_heads
        for head in range(self.n_heads):
            block = x.columns(head * width, width)
            for out, weight, bias in (
                (r, self.recurrent_gate_weight, self.recurrent_gate_bias),
                (i, self.input_gate_weight, self.input_gate_bias),
            ):
                columns = out.columns(head * width, width)
                program.linear(block, weight[head].mT, bias[head], out=columns, local=head > 0 or out is i)
        return program.rglru(x, r, i, -C * F.softplus(self.recurrent_param))

    def gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Maps x (B, T, D) to σ(W x + b), (B, T, D), at least float32."""
        logits = torch.einsum("bthi,hij->bthj", split_heads(x, self.n_heads), weight)
        return merge_heads(torch.sigmoid(logits.to(accumulation_dtype(x.dtype)) + bias))


def begin(x: Tensor, begun: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flags the first real token of every document of x (B, T, D), and padding before it; says if the last has begun.

    `begun` (B) is nonzero where the document of the first token has; the result has its meaning, 0 or 1.
    """
    B, T, _ = x.shape
    dtype = accumulation_dtype(x.dtype)
    carried = x.new_zeros(B, dtype=torch.bool) if begun is None else begun != 0
    if T == 0:
        return x.new_zeros(B, 0, dtype=torch.bool), carried.to(dtype)
    if mask is None and reset is None:
        return F.pad(~carried[:, None], (0, T - 1)), x.new_ones(B, dtype=dtype)
    real = x.new_ones(B, T, dtype=torch.bool) if mask is None else mask
    before = real.cumsum(1) - real.long()  # (B, T): real tokens before each
    # of these, those before its document; -1 passes for a token before the first
    start = -carried.long()[:, None]
    start = torch.where(reset, before, start).cummax(1).values if reset is not None else start
    after = (before + real.long() > start)[:, -1]
    return before == start, after.to(dtype)


def bounded_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) of x >= 0 whose derivative is at most MAX_SLOPE: RecurrentGemma's, in operations that torch derives."""
    steepest = (2 * MAX_SLOPE) ** -2
    fixed = x.detach()
    line = MAX_SLOPE * x + (fixed.sqrt() - MAX_SLOPE * fixed)  # the value of the root, the slope of a line
    return torch.where(x < steepest, line, x.clamp(min=steepest).sqrt())
