"""diagonal_scan on a GPU: there is no CUDA kernel yet, so the chunked torch form runs, against the loop on the CPU."""

import pytest
import torch

from linrnn.ops import diagonal_scan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
@pytest.mark.parametrize("a_ndim", (1, 2, 3))
@pytest.mark.parametrize("reverse", (False, True))
def test_cuda_equals_the_loop_on_the_cpu(dtype, a_ndim, reverse):
    B, T, D = 3, 1000, 17
    shape = ((D,), (T, D), (B, T, D))[a_ndim - 1]
    tensors = (
        torch.rand(shape, dtype=torch.float64).to(dtype),
        *(torch.randn(s, dtype=dtype) for s in ((B, T, D), (B, D))),
    )
    flags = {"reset": torch.rand(B, T) < 0.05, "mask": torch.rand(B, T) < 0.9}
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "auto")):
        inputs = [v.to(device).requires_grad_() for v in tensors]
        options = {name: v.to(device) for name, v in flags.items()}
        h, final_state = diagonal_scan(*inputs, reverse=reverse, backend=backend, **options)
        grads = torch.autograd.grad(h.abs().sum() + final_state.abs().sum(), inputs)
        results.append([v.cpu() for v in (h, final_state, *grads)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_the_cpu_kernel_refuses_cuda_tensors():
    with pytest.raises(ValueError, match="backend='cpu' runs on CPU tensors, got tensors on cuda"):
        diagonal_scan(torch.rand(4, device="cuda"), torch.randn(2, 5, 4, device="cuda"), backend="cpu")
