"""What layers with heads share: how many there are, the normalisation of what they read, white weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn.layers.base import accumulation_dtype, positive_int


def count_heads(d_model: int, n_heads: int | None, width: int | None = None, *, argument: str = "n_heads") -> int:
    """Returns the number of heads, checked; if None, d_model is at least 4 heads, as wide as 64 allows.

    Args:
        d_model: width of the layer.
        n_heads: the user's choice, or None.
        width: what the heads divide; d_model if None.
        argument: what the user may choose n_heads by, for the messages.

    Raises:
        ValueError: n_heads does not divide the width, or d_model has no default.
    """
    if n_heads is None:
        fitting = [size for size in range(4, 65, 4) if d_model % size == 0 and d_model >= 4 * size]
        if not fitting:
            raise ValueError(f"{argument}: a width of {d_model} is no 4 or more heads of 4, 8, ... 64; give {argument}")
        n_heads = d_model // fitting[-1]
    width = d_model if width is None else width
    if width % positive_int(argument, n_heads):
        raise ValueError(f"{argument}: expected a divisor of {width}, got {n_heads}")
    return n_heads


def heads_of_width(d_model: int, n_heads: int | None, d_head: int | None) -> tuple[int, int]:
    """Returns the number of heads and their width, checked; together they need not be d_model where both are given.

    Without either, at least 4 heads as wide as 16 to 64 allows.

    Raises:
        ValueError: a value below one, the one given does not divide d_model, or d_model has no default.
    """
    if n_heads is not None and d_head is not None:
        return positive_int("n_heads", n_heads), positive_int("d_head", d_head)
    for name, given in (("n_heads", n_heads), ("d_head", d_head)):
        if given is not None and d_model % positive_int(name, given):
            raise ValueError(f"{name}: expected a divisor of d_model = {d_model}, got {given}")
    if n_heads is not None:
        return n_heads, d_model // n_heads
    if d_head is None:
        widths = [width for width in range(16, 65, 2) if d_model % width == 0]
        if not widths:
            raise ValueError(f"n_heads: no even head width from 16 to 64 divides d_model = {d_model}; give n_heads")
        d_head = max((width for width in widths if d_model >= 4 * width), default=min(widths))
    return d_model // d_head, d_head


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, D) to (B, T, H, D / H)."""
    return x.unflatten(-1, (n_heads, x.shape[-1] // n_heads))


def merge_heads(o: Tensor) -> Tensor:
    """(B, T, H, V) to (B, T, H V)."""
    return o.flatten(-2)


class HeadNorm(nn.Module):
    """Normalises every head of o (..., H, V) by itself: RMSNorm, or with `center` the GroupNorm of one head a group.

    Args:
        shape: of the gain: (V,), one for all heads, or (H, V).
        center: subtracts the mean first, and has a bias.
        affine: whether there is a gain (and a bias) at all.
        eps: added to the mean square.
    """

    def __init__(self, *shape: int, center: bool = False, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.center, self.eps = center, eps
        self.weight = nn.Parameter(torch.empty(shape)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape)) if affine and center else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A gain of one and no bias."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """No weight decay on gains and biases, also where they are matrices."""
        return {name: {"weight_decay": 0.0} for name, _ in self.named_parameters()}

    def forward(self, o: Tensor) -> Tensor:
        """Maps o (..., H, V) to the same shape and dtype; the statistics are at least float32."""
        dtype = accumulation_dtype(o.dtype)
        norm = F.layer_norm if self.center else F.rms_norm
        wide = norm(o.to(dtype), o.shape[-1:], eps=self.eps)
        if self.weight is not None:
            wide = wide * self.weight
        if self.bias is not None:
            wide = wide + self.bias
        return wide.to(o.dtype)


def white_(*linears: nn.Linear) -> None:
    """Draws weights (out, in) of variance 1 / in, in place: white x gives white W x. Biases become zero."""
    for linear in linears:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
