"""diagonal_scan among streams, graphs, threads and large tensors, bit for bit, and what it says when it cannot run."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from linrnn.ops import BackendUnavailable, FallbackWarning, _backend, diagonal_scan

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "cuda"

# many columns, some, few beside a long T, and what launching costs most: a plan of each kind
SHAPES = ((8, 300, 2048), (4, 512, 256), (1, 20_000, 64), (2, 7, 3))
KINDS = ((torch.float32, torch.float32, 3), (torch.complex64, torch.complex64, 1), (torch.float32, torch.bfloat16, 1))


def tensors(shape: tuple[int, int, int], a_dtype: torch.dtype, x_dtype: torch.dtype, a_ndim: int) -> list[Tensor]:
    """a, x, an initial state and the gradient of h; a and x want gradients."""
    B, _, D = shape
    a = (0.8 + 0.2 * torch.rand(shape[3 - a_ndim :], device=DEVICE)).to(a_dtype).requires_grad_()
    x, g = (torch.randn(shape, dtype=x_dtype, device=DEVICE) for _ in range(2))
    return [a, x.requires_grad_(), torch.randn(B, D, dtype=torch.promote_types(x_dtype, a_dtype), device=DEVICE), g]


def everything(a: Tensor, x: Tensor, state: Tensor, g: Tensor) -> list[Tensor]:
    h, final_state = diagonal_scan(a, x, state, backend=BACKEND)
    return [h.detach(), final_state.detach(), *torch.autograd.grad((h, final_state), (a, x), (g, final_state.detach()))]


def load(stream: torch.cuda.Stream) -> Tensor:
    """Keeps the GPU busy on another stream."""
    with torch.cuda.stream(stream):
        v = torch.randn(2048, 2048, device=DEVICE)
        for _ in range(20):
            v = (v @ v).tanh()
    return v


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g, w) and not w.isnan().any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(shape, kind):
    """Forward and backward, also while another stream fills the GPU."""
    inputs = tensors(shape, *kind)
    first = everything(*inputs)
    stream = torch.cuda.Stream()
    for _ in range(3):
        busy = load(stream)
        assert_same_bits(everything(*inputs), first)
    stream.synchronize()
    del busy


@pytest.mark.parametrize("shape", SHAPES)
def test_streams_side_by_side(shape):
    """Each stream has its own tensors and workspaces, and scans what was put there on that stream just before."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    sets = [tensors(shape, *KINDS[i]) for i in range(3)]
    wanted = [everything(*inputs) for inputs in sets]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, inputs in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                a, x, state, g = inputs
                late = torch.zeros_like(x)
                torch.cuda._sleep(2_000_000)  # about a millisecond: a scan on any other stream would find the zeros
                late.copy_(x.detach())
                found.append(everything(a, late.requires_grad_(), state, g))
        torch.cuda.synchronize()
        for got, expected in zip(found, wanted, strict=True):
            assert_same_bits(got, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graph(shape, kind):
    """Captured with its backward, and replayed on other numbers."""
    inputs = tensors(shape, *kind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        everything(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = everything(*inputs)
    for _ in range(2):
        fresh = tensors(shape, *kind)
        wanted = everything(*fresh)
        with torch.no_grad():
            for old, new in zip(inputs, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(outputs, wanted)


FIRST_CALL_IN_A_CAPTURE = """
import torch
from linrnn.ops import diagonal_scan
a, x = torch.rand(64, device="cuda"), torch.randn(1, 20_000, 64, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    h, final_state = diagonal_scan(a, x, backend="cuda")
graph.replay()
torch.testing.assert_close(h, diagonal_scan(a, x, backend="torch")[0])
print("right")
"""


def test_the_first_call_of_a_process_may_be_inside_a_capture():
    """Loading the program, from the cache, does not break the capture."""
    diagonal_scan(torch.rand(64, device=DEVICE), torch.randn(1, 20_000, 64, device=DEVICE), backend=BACKEND)
    command = [sys.executable, "-P", "-c", FIRST_CALL_IN_A_CAPTURE]
    result = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    assert result.stdout.strip() == "right", result.stderr


def test_a_thread_that_has_never_met_cuda():
    inputs = tensors(SHAPES[1], *KINDS[0])
    wanted, found = everything(*inputs), []
    threads = [threading.Thread(target=lambda: found.append(everything(*inputs))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(found) == 3
    for got in found:
        assert_same_bits(got, wanted)


@pytest.mark.slow  # and of much memory: not beside others
@pytest.mark.parametrize(
    ("T", "D", "constant"), ((2**16 + 1, 2**15 + 8, False), (2**25 + 99, 65, True), (2**25 + 99, 65, False))
)
def test_more_than_two_to_the_31_elements(T, D, constant):
    """Offsets are 64 bits wide: the far end, where memory has decayed, against a scan of that end alone."""
    needed = T * D * 2 * (4 if constant else 6) * 1.2 + 2**30  # x, h and their gradients (and a with its own), bf16
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    a = (0.5 + 0.4 * torch.rand(*(() if constant else (1, T)), D, device=DEVICE)).bfloat16().requires_grad_()
    x = torch.randn(1, T, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    h, final_state = diagonal_scan(a, x, backend=BACKEND)
    grad_a, grad_x = torch.autograd.grad(h, (a, x), x.detach())

    columns = slice(D - 8, D)
    for rows, exact in ((slice(T - 1000, T), slice(500, 1000)), (slice(0, 1000), slice(0, 500))):
        part = a[columns] if constant else a[:, rows, columns]
        leaves = [v.detach().float().requires_grad_() for v in (part, x[:, rows, columns])]
        wanted, wanted_final = diagonal_scan(*leaves, backend="torch")
        grads = torch.autograd.grad(wanted, leaves, leaves[1].detach())
        pairs = [(h, wanted), (grad_x, grads[1])] + ([] if constant else [(grad_a, grads[0])])
        for got, expected in pairs:
            torch.testing.assert_close(
                got[:, rows, columns][:, exact].float(), expected[:, exact], rtol=2**-6, atol=2**-6
            )
        if rows.stop == T:
            torch.testing.assert_close(final_state[:, columns], wanted_final, rtol=1e-4, atol=1e-4)
    assert grad_a.isfinite().all()


def test_tensors_on_different_devices_are_named():
    a, x = torch.rand(4), torch.randn(2, 5, 4, device=DEVICE)
    with pytest.raises(ValueError, match="a is on cpu but x is on cuda:0"):
        diagonal_scan(a, x)
    for name, v in (("initial_state", torch.zeros(2, 4)), ("reset", torch.zeros(2, 5, dtype=torch.bool))):
        with pytest.raises(ValueError, match=f"{name} is on cpu but x is on cuda:0"):
            diagonal_scan(a.to(DEVICE), x, **{name: v})
    with pytest.raises(BackendUnavailable, match="backend='cpu' runs on CPU tensors, got tensors on cuda"):
        diagonal_scan(a.to(DEVICE), x, backend="cpu")
    with pytest.raises(BackendUnavailable, match="backend='cuda' runs on CUDA tensors, got tensors on cpu"):
        diagonal_scan(a, x.cpu(), backend="cuda")


def test_a_device_that_cannot_run_them_falls_back_once_and_says_why(monkeypatch):
    a, x = torch.rand(4, device=DEVICE), torch.randn(2, 5, 4, device=DEVICE)
    monkeypatch.setattr("linrnn.kernels.cuda.unavailable", lambda index: "it is too old; buy another")
    _backend._warn_once.cache_clear()
    with pytest.raises(BackendUnavailable, match="backend='cuda' cannot run here: it is too old; buy another"):
        diagonal_scan(a, x, backend="cuda")
    with pytest.warns(FallbackWarning, match="pure torch.*too old; buy another"):
        h, _ = diagonal_scan(a, x)
    torch.testing.assert_close(h.cpu(), diagonal_scan(a.cpu(), x.cpu(), backend="reference")[0])
    _backend._warn_once.cache_clear()


def test_a_dtype_without_a_kernel_is_refused():
    small = torch.ones(2, 5, 4, device=DEVICE).to(torch.float8_e4m3fn)
    with pytest.raises((ValueError, RuntimeError), match=r"(?i)float8_e4m3fn"):
        diagonal_scan(torch.rand(4, device=DEVICE), small)
