"""The compiled CPU library: how it is found, the number formats, bit-reproducibility."""

import pytest
import torch

import linrnn.kernels
from linrnn.kernels.cpu import KernelUnavailable, library
from linrnn.kernels.cpu.diagonal_scan import backward, forward


def test_a_missing_library_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(linrnn.kernels, "__path__", [str(tmp_path)])
    with pytest.raises(KernelUnavailable, match=r"without its compiled CPU kernels; install a C\+\+ compiler"):
        library.__wrapped__()


def test_a_broken_library_is_named(monkeypatch, tmp_path):
    for name in ("linrnn_cpu.so", "linrnn_cpu_avx2.so"):
        (tmp_path / name).write_bytes(b"not a library")
    monkeypatch.setattr(linrnn.kernels, "__path__", [str(tmp_path)])
    with pytest.raises(KernelUnavailable, match=r"linrnn_cpu.*cannot be loaded"):
        library.__wrapped__()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_widening_is_exact_for_every_bit_pattern(dtype):
    """A scan with a = 0 hands x through: all 65 536 values come back as torch converts them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    tiny = torch.finfo(torch.float32).tiny  # the kernels flush float32's denormals
    x = every[every.isfinite() & ((every == 0) | (every.float().abs() >= tiny))].view(1, 1, -1)
    h, final_state = forward(torch.zeros(x.shape[2]), x, None, None, False)
    assert (h == x).all() and (final_state[0] == x[0, 0].float()).all()
    infinite = torch.tensor([[[torch.inf, -torch.inf, torch.nan]]], dtype=dtype)
    h, final_state = forward(torch.zeros(3), infinite, None, None, False)
    torch.testing.assert_close(final_state[0], infinite[0, 0].float(), equal_nan=True)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_narrowing_rounds_as_torch_does(dtype):
    """h = 1 * state, for float32 states over the whole range, ties and overflow included."""
    neighbours = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    neighbours = neighbours[neighbours.isfinite()]
    ties = (neighbours[1:] + neighbours[:-1]) / 2
    values = torch.cat((torch.randn(5000) * 10 ** torch.empty(5000).uniform_(-8, 8), ties, neighbours * 1.0003))
    values = values[values.abs() >= torch.finfo(torch.float32).tiny]  # denormals are flushed
    h, _ = forward(torch.ones(1), torch.zeros(len(values), 1, 1, dtype=dtype), values[:, None], None, False)
    torch.testing.assert_close(h[:, 0, 0], values.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("shape", ((1, 5000, 9), (3, 400, 70)))
def test_bit_reproducible(shape):
    """The same thread count gives the same bits, the gradient of a constant a included."""
    torch.set_num_threads(2)
    a, x, g = torch.rand(shape[2]), torch.randn(shape), torch.randn(shape)
    runs = [(*forward(a, x, None, None, False), *backward(a, x, None, None, g, None, False, True)) for _ in range(5)]
    torch.set_num_threads(1)
    for other in runs[1:]:
        assert all(torch.equal(u, v) for u, v in zip(runs[0], other, strict=True))


def test_a_constant_gate_saves_its_stream():
    """What the launcher asks for: the gradient of a constant a is summed in the kernel, never as (B, T, D)."""
    a, x = torch.rand(64), torch.randn(4, 1000, 64)
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func):
                Sizes.largest += out.numel()
            return out

    with Sizes():
        forward(a, x, None, None, False)
        backward(a, x, None, None, x, None, False, True)
    assert Sizes.largest < 2.1 * x.numel()  # h and grad_x
