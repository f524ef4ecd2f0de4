"""The long convolution against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from linrnn.ops import fft_conv
from linrnn.ops.fft_conv import fast_length


def direct(x, kernel):
    """torch's convolution of x (B, T, D), the kernel (D, L) reversed."""
    L = kernel.shape[1]
    return F.conv1d(F.pad(x.mT, (L - 1, 0)), kernel.flip(1)[:, None], groups=x.shape[2]).mT


@pytest.mark.parametrize("L", (1, 5, 1000))
@pytest.mark.parametrize("T", (0, 1, 2, 63, 1000))
def test_equals_torchs_convolution(T, L):
    x, kernel, back = torch.randn(2, T, 3), torch.randn(3, L), torch.randn(3, L)
    x, kernel, back = (v.double().requires_grad_() for v in (x, kernel, back))
    ours, both = fft_conv(x, kernel), fft_conv(x, kernel, back)
    wanted = direct(x, kernel) if T else x
    wanted_both = wanted + (direct(x.flip(1), back).flip(1) if T else 0)
    weight = torch.randn(2, T, 3, dtype=torch.float64)
    for y, z in ((ours, wanted), (both, wanted_both)):
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
        if T:
            grads = (torch.autograd.grad((v * weight).sum(), (x, kernel), retain_graph=True) for v in (y, z))
            for g, h in zip(*grads, strict=True):
                torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)


def test_derivatives():
    x, kernel, back = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 5, 2), (2, 5), (2, 3)))
    inputs = tuple(v.requires_grad_() for v in (x, kernel, back))
    assert torch.autograd.gradcheck(fft_conv, inputs)
    assert torch.autograd.gradgradcheck(fft_conv, inputs, fast_mode=True)


def test_half_precision_is_a_format():
    x, kernel = torch.randn(2, 63, 3).bfloat16(), torch.randn(3, 63)
    y = fft_conv(x, kernel)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, direct(x.double(), kernel.double()).float(), rtol=1e-5, atol=1e-5)


def test_lengths():
    assert [fast_length(n) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 2000)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 2048]


@pytest.mark.parametrize(
    ("x", "kernels", "message"),
    (
        (torch.zeros(5, 3), (torch.zeros(3, 5),), r"x must be .*\(B, T, D\), got torch.float32 \(5, 3\)"),
        (torch.zeros(2, 5, 3, dtype=torch.complex64), (torch.zeros(3, 5),), "x must be .*got torch.complex64"),
        (torch.zeros(2, 5, 3), (torch.zeros(2, 5),), r"kernel must be .* D = 3 .*\(2, 5\)"),
        (torch.zeros(2, 5, 3), (torch.zeros(3, 0),), r"kernel must be .* L >= 1, got torch.float32 \(3, 0\)"),
        (torch.zeros(2, 5, 3), (torch.zeros(3, 5), torch.zeros(3)), r"reverse_kernel must be .*\(3,\)"),
        (torch.zeros(2, 5, 3), (torch.zeros(3, 5, dtype=torch.int64),), "kernel must be .*got torch.int64"),
    ),
)
def test_bad_input(x, kernels, message):
    with pytest.raises(ValueError, match=message):
        fft_conv(x, *kernels)
