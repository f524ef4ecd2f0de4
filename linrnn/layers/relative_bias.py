"""Biases of attention scores that depend on the distance of two tokens (MEGA, arXiv:2209.10655, appendix B)."""

import torch
from torch import Tensor, nn

from linrnn.layers.base import accumulation_dtype, positive_int
from linrnn.layers.rotary import rotate


class RotaryBias(nn.Module):
    """b_{ij} = (R_i a)^T (R_j b), with R_t the rotary turn of position t: a function of i - j without a largest one.

    Args:
        width: number of entries of a and b, even.
        base: of the rotary angles.
    """

    def __init__(self, width: int, *, base: float = 10000.0):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(width))
        self.b = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, of standard deviation 0.02."""
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)

    def forward(self, low: int, high: int) -> Tensor:
        """Returns the biases of the distances i - j = low, ..., high, at least float32."""
        offset = torch.arange(low, high + 1, device=self.a.device)
        a = self.a.to(accumulation_dtype(self.a.dtype)).expand(1, len(offset), 1, 1, -1)
        return (rotate(a, offset[None], self.base)[0, :, 0, 0] * self.b).sum(-1)


class SimpleBias(nn.Module):
    """One learned number for each distance.

    Args:
        max_positions: one more than the largest distance.
        causal: without those of later tokens.
    """

    def __init__(self, max_positions: int, *, causal: bool = True):
        super().__init__()
        self.max_positions, self.causal = positive_int("max_positions", max_positions), causal
        self.bias = nn.Parameter(torch.empty(max_positions if causal else 2 * max_positions - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal, of standard deviation 0.02."""
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, low: int, high: int) -> Tensor:
        """Returns the biases of the distances i - j = low, ..., high, none below zero if causal.

        Raises:
            ValueError: a distance of max_positions or more.
        """
        reach = high if self.causal else max(high, -low)
        if reach >= self.max_positions:
            raise ValueError(
                f"max_positions: expected at least the {reach + 1} tokens that attention spans here (with padding and "
                f'what the state holds), got {self.max_positions}; rel_pos_bias="rotary" has no limit'
            )
        zero = 0 if self.causal else self.max_positions - 1  # where the distance zero is
        return self.bias[zero + low : zero + high + 1]
