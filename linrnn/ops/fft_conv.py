"""The long convolution along time: a filter per channel, as long as the sequence, by FFT."""

import torch
from torch import Tensor

from linrnn.kernels import state_dtype


def fft_conv(x: Tensor, kernel: Tensor, reverse_kernel: Tensor | None = None) -> Tensor:
    """Convolves y_t = sum_{j <= t} kernel[:, j] x_{t-j} (+ sum_j reverse_kernel[:, j] x_{t+j}), channel by channel.

    The convolution of S4 (Gu et al. 2021, arXiv:2111.00396): padded with zeros to twice the length, so that nothing
    wraps around. T log T operations a channel, whatever made the kernel; all derivatives exist. In float32 the rounding
    error is relative to the largest outputs of a channel, not to each.

    Args:
        x: (B, T, D), real.
        kernel: (D, L) real, L >= 1; taps from T on are ignored.
        reverse_kernel: (D, L) like `kernel`: the answer to tokens ahead; its tap 0 meets the current token again.

    Returns:
        y (B, T, D), in at least float32.

    Raises:
        ValueError: a shape that does not fit, or a complex tensor.
    """
    kernels = (kernel,) if reverse_kernel is None else (kernel, reverse_kernel)
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point of shape (B, T, D), got {x.dtype} {tuple(x.shape)}")
    for name, v in zip(("kernel", "reverse_kernel"), kernels, strict=False):
        if v.ndim != 2 or v.shape[0] != x.shape[2] or v.shape[1] < 1 or not v.is_floating_point():
            expected = f"floating point of shape (D, L) with D = {x.shape[2]} and L >= 1"
            raise ValueError(f"{name} must be {expected}, got {v.dtype} {tuple(v.shape)}")
    T = x.shape[1]
    wide = state_dtype(x.dtype)
    if x.numel() == 0:
        return x.to(wide)
    n = fast_length(2 * T)
    response = torch.fft.rfft(kernel[:, :T].to(wide), n=n)  # (D, n / 2 + 1)
    if reverse_kernel is not None:  # looking ahead is the conjugate: time reversed around tap 0
        response = response + torch.fft.rfft(reverse_kernel[:, :T].to(wide), n=n).conj()
    # time last and contiguous: along another dimension the transforms cost twice as much on a CPU
    spectrum = torch.fft.rfft(x.to(wide).mT.contiguous(), n=n)  # (B, D, n / 2 + 1)
    return torch.fft.irfft(spectrum * response, n=n)[..., :T].mT


def fast_length(n: int) -> int:
    """The smallest 2^k or 3 * 2^k that is at least n: lengths with small factors transform fastest."""
    size = 1
    while size < n:
        size *= 2
    return size // 4 * 3 if size >= 4 and size // 4 * 3 >= n else size
