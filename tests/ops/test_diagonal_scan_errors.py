"""What diagonal_scan says to bad input, and how it falls back."""

import warnings

import pytest
import torch

from linrnn.kernels import KernelUnavailable
from linrnn.ops import (
    BackendUnavailable,
    FallbackWarning,
    _backend,
    _scan_autograd,
    diagonal_scan,
    reset_from_cu_seqlens,
)

A, X = torch.rand(4), torch.randn(2, 5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"x": X[0]}, r"x must be \(B, T, D\), got shape \(5, 4\)"),
        ({"a": torch.rand(5)}, r"a must be \(D,\), \(T, D\) or \(B, T, D\) .* got shape \(5,\)"),
        ({"a": torch.rand(2, 4)}, r"a must be .* got shape \(2, 4\)"),
        ({"x": X.long()}, r"x must be floating point or complex, one of .*complex64.*, got torch.int64"),
        ({"x": X.to(torch.float8_e4m3fn)}, r"x must be floating point or complex, one of .*, got torch.float8_e4m3fn"),
        ({"a": A.bool()}, r"a must be floating point or complex, one of .*, got torch.bool"),
        ({"initial_state": torch.zeros(4)}, r"initial_state must be \(B, D\) = \(2, 4\), got shape \(4,\)"),
        ({"initial_state": torch.zeros(2, 4, dtype=torch.complex64)}, r"initial_state is torch.complex64, but a and x"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"reset": torch.zeros(2, 5)}, r"reset must be bool .* got torch.float32"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"a": A.to("meta")}, r"a is on meta but x is on cpu"),
        ({"initial_state": torch.zeros(2, 4, device="meta")}, r"initial_state is on meta but x is on cpu"),
        ({"backend": "fast"}, r"backend must be one of auto, reference, torch, cpu, cuda, triton, got 'fast'"),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        diagonal_scan(**{"a": A, "x": X, **arguments})
    if "backend" in arguments:
        with pytest.raises(ValueError, match=message):
            diagonal_scan(A.clone().requires_grad_(), X, backend="fast")


@pytest.mark.parametrize("name", ("a", "x", "initial_state", "reset", "mask"))
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        diagonal_scan(**{"a": A, "x": X, "initial_state": None, name: [1.0]})


@pytest.mark.parametrize("a", (torch.rand(1), torch.rand(5), torch.rand(2, 4)))
def test_bad_shapes_in_a_single_step(a):
    """The short way of a decoding step must not let broadcasting through."""
    with pytest.raises(ValueError, match="a must be"):
        diagonal_scan(a, X[:, :1], torch.zeros(2, 4))
    with pytest.raises(ValueError, match="initial_state must be"):
        diagonal_scan(A, X[:, :1], torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"initial_state is torch\.complex64"):
        diagonal_scan(A, X[:, :1], torch.zeros(2, 4, dtype=torch.complex64))


def test_a_backend_that_cannot_run_here():
    for grad in (False, True):
        x = X.clone().requires_grad_(grad)
        with pytest.raises(BackendUnavailable, match="backend='triton' has no kernel"):
            diagonal_scan(A, x, backend="triton")
    with pytest.raises(BackendUnavailable, match="runs on CPU tensors, got tensors on meta"):
        diagonal_scan(A.to("meta"), X.to("meta"), backend="cpu")


def test_without_the_library_torch_runs_and_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(_backend, "_cpu_library_missing", lambda: "the library is missing; install a compiler")
    _backend._warn_once.cache_clear()
    with pytest.warns(FallbackWarning, match="pure torch.*install a compiler"):
        h, _ = diagonal_scan(A, X)
    torch.testing.assert_close(h, diagonal_scan(A, X, backend="reference")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagonal_scan(A, X)
    with pytest.raises(BackendUnavailable, match="cannot run here: the library is missing"):
        diagonal_scan(A, X, backend="cpu")


@pytest.mark.parametrize(
    "bounds",
    (
        torch.tensor([0, 3]),
        torch.tensor([1, 5]),
        torch.tensor([0, 4, 2, 5]),
        torch.tensor([0.0, 5.0]),
        torch.tensor([5]),
    ),
)
def test_bad_cu_seqlens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must"):
        reset_from_cu_seqlens(bounds, 5)


def test_meta_tensors_give_shapes():
    h, final_state = diagonal_scan(A.to("meta"), X.to("meta").requires_grad_())
    assert h.shape == X.shape and final_state.shape == (2, 4) and h.device.type == "meta"


def test_a_program_that_cannot_be_had_after_all(monkeypatch):
    """As where the cache holds other programs but there is no compiler: "auto" falls back, once with a warning."""

    class Launcher:
        @staticmethod
        def forward(*args):
            raise KernelUnavailable("the compiler is gone; install it")

        backward = forward

    monkeypatch.setattr(_scan_autograd, "_launcher", lambda backend: Launcher)
    _backend._warn_once.cache_clear()
    x = X.clone().requires_grad_()
    with pytest.warns(FallbackWarning, match="the compiler is gone; install it"):
        h, _ = diagonal_scan(A, x)
    (grad,) = torch.autograd.grad(h.sum(), x)
    wanted = diagonal_scan(A, x, backend="reference")[0]
    torch.testing.assert_close(h, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), x)[0])
    with pytest.raises(BackendUnavailable, match="backend='cpu' cannot run here: the compiler is gone"):
        diagonal_scan(A, X, backend="cpu")
    _backend._warn_once.cache_clear()
