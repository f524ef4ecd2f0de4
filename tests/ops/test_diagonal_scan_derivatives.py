"""Derivatives of diagonal_scan of every kind, and the transforms of torch around it."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import diagonal_scan
from linrnn.ops._scan_autograd import scan_backward_op, scan_op

BACKENDS = ("torch", "cpu")
DTYPES = ((torch.float64, torch.float64), (torch.complex128, torch.complex128), (torch.float64, torch.complex128))


def inputs(a_ndim, a_dtype=torch.float64, x_dtype=torch.float64, B=2, T=5, D=2):
    shape = ((D,), (T, D), (B, T, D))[a_ndim - 1]
    tensors = torch.randn(shape, dtype=a_dtype), torch.randn(B, T, D, dtype=x_dtype), torch.randn(B, D, dtype=x_dtype)
    return tuple(v.requires_grad_() for v in tensors)


def options_of(flags: int, B=2, T=5) -> dict:
    reset = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 1, 0]], dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 1, 1, 0, 1]], dtype=torch.bool)
    return {k: v for k, v, on in (("reset", reset, flags & 1), ("mask", mask, flags & 2)) if on}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("a_ndim", "reverse", "flags"), ((1, False, 0), (1, True, 3), (2, True, 0), (3, False, 3)))
def test_gradcheck_and_gradgradcheck(backend, dtypes, a_ndim, reverse, flags):
    options = {**options_of(flags), "reverse": reverse, "backend": backend}

    def scan(a, x, state):
        return diagonal_scan(a, x, state, **options)

    assert gradcheck(scan, inputs(a_ndim, *dtypes), check_forward_ad=True)
    assert gradgradcheck(scan, inputs(a_ndim, *dtypes))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_one_output_alone(backend):
    """Loss on h only, or on the final state only; and only some inputs that want a gradient."""
    a, x, state = inputs(3)
    for which in (0, 1):
        for wanted in ((a,), (x,), (state,), (a, x)):
            got = torch.autograd.grad(diagonal_scan(a, x, state, backend=backend)[which].square().sum(), wanted)
            reference = torch.autograd.grad(
                diagonal_scan(a, x, state, backend="reference")[which].square().sum(), wanted, materialize_grads=True
            )
            torch.testing.assert_close(got, reference)


def test_only_one_input_requires_grad():
    a, x, state = (v.detach() for v in inputs(1))
    for i in range(3):
        tensors = [v.clone() for v in (a, x, state)]
        tensors[i].requires_grad_()
        for backend in BACKENDS:
            (got,) = torch.autograd.grad(diagonal_scan(*tensors, backend=backend)[0].square().sum(), tensors[i])
            (wanted,) = torch.autograd.grad(diagonal_scan(*tensors, backend="reference")[0].square().sum(), tensors[i])
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("a_ndim", (1, 2, 3))
@pytest.mark.parametrize("flags", (0, 3))
class TestTorchFunc:
    """Each transform against the same transform of the differentiable loop."""

    def functions(self, backend, flags):
        def loss(name):
            def function(a, x, state):
                h, final_state = diagonal_scan(a, x, state, backend=name, **options_of(flags))
                return h.sin().sum() + final_state.square().sum()

            return function

        return loss(backend), loss("reference")

    def test_grad(self, backend, a_ndim, flags):
        ours, reference = self.functions(backend, flags)
        args = tuple(v.detach() for v in inputs(a_ndim))
        torch.testing.assert_close(
            torch.func.grad(ours, argnums=(0, 1, 2))(*args), torch.func.grad(reference, argnums=(0, 1, 2))(*args)
        )

    def test_jvp(self, backend, a_ndim, flags):
        ours, reference = self.functions(backend, flags)
        args, tangents = (tuple(v.detach() for v in inputs(a_ndim)) for _ in range(2))
        got, wanted = (torch.func.jvp(f, args, tangents) for f in (ours, reference))
        assert got[1].abs() > 1e-3  # not the silent zero of a missing formula
        torch.testing.assert_close(got, wanted)

    def test_hessian_vector_product(self, backend, a_ndim, flags):
        ours, reference = self.functions(backend, flags)
        args, tangents = (tuple(v.detach() for v in inputs(a_ndim)) for _ in range(2))
        got, wanted = (
            torch.func.jvp(torch.func.grad(f, argnums=(0, 1, 2)), args, tangents)[1] for f in (ours, reference)
        )
        torch.testing.assert_close(got, wanted)

    @pytest.mark.parametrize("mapped", ((0, 0, 0), (None, 0, 0), (0, None, None), (1, 1, 1), (None, 1, None)))
    def test_vmap_and_per_sample_gradients(self, backend, a_ndim, flags, mapped):
        ours, reference = self.functions(backend, flags)
        args = []
        for v, dim in zip(inputs(a_ndim), mapped, strict=True):
            args.append(v.detach() if dim is None else torch.stack([v.detach(), torch.randn_like(v.detach())], dim))
        for transform in (lambda f: f, lambda f: torch.func.grad(f, argnums=(0, 1, 2))):
            got, wanted = (torch.func.vmap(transform(f), in_dims=mapped)(*args) for f in (ours, reference))
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
@pytest.mark.parametrize("a_ndim", (1, 3))
def test_compile_fullgraph(dtype, a_ndim):
    def loss(a, x, state, reset):
        h, final_state = diagonal_scan(a * 0.5, x + 1, state, reset=reset)
        return h.abs().sum() + final_state.abs().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (5, 9):
        a, x, state = inputs(a_ndim, dtype, dtype, T=T)
        reset = torch.rand(2, T) < 0.2
        values = [f(a, x, state, reset) for f in (loss, compiled)]
        torch.testing.assert_close(values[1], values[0])
        grads = [torch.autograd.grad(v, (a, x, state)) for v in values]
        torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    ("a_dtype", "x_dtype"),
    (
        (torch.float32, torch.complex64),
        (torch.float64, torch.complex64),
        (torch.complex64, torch.float32),
        (torch.float32, torch.bfloat16),
    ),
)
def test_compile_fullgraph_of_mixed_dtypes(a_dtype, x_dtype):
    a, x = torch.rand(4).to(a_dtype), torch.randn(2, 5, 4).to(x_dtype)
    compiled = torch.compile(lambda a, x: diagonal_scan(a, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(a, x), diagonal_scan(a, x))


@pytest.mark.slow
def test_compile_with_inductor():
    def f(a, x):
        return diagonal_scan(torch.sigmoid(a), x * 2)[0].relu().sum()

    a, x, _ = inputs(3, torch.float32, torch.float32)
    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(a, x), f(a, x))
    torch.testing.assert_close(torch.autograd.grad(compiled(a, x), (a, x)), torch.autograd.grad(f(a, x), (a, x)))


def test_export():
    class Scan(torch.nn.Module):
        def forward(self, a, x):
            return diagonal_scan(a, x)

    a, x, _ = (v.detach() for v in inputs(3))
    program = torch.export.export(Scan(), (a, x))
    torch.testing.assert_close(program.module()(a, x), diagonal_scan(a, x))


def test_opcheck():
    a, x, state = inputs(3)
    flags = torch.tensor([[0, 1, 2, 3, 0]] * 2, dtype=torch.uint8)
    torch.library.opcheck(scan_op, (a, x, state, flags, False, "auto"))
    h = diagonal_scan(a, x, state)[0].detach()
    a, state = a.detach(), state.detach()
    torch.library.opcheck(
        scan_backward_op,
        (a, h, state, flags, torch.randn_like(h), None, True, True, "torch"),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_autocast_keeps_the_state_in_float32():
    a, x, state = inputs(3, torch.float32, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, final_state = diagonal_scan(a, (x @ torch.eye(2)), state)
    assert h.dtype == torch.bfloat16 and final_state.dtype == torch.float32
    torch.autograd.grad(h.float().sum(), (a, x, state))
