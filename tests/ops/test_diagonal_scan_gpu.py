"""diagonal_scan with backend="cuda": the contract of the op, against the loop on the CPU in double precision."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import diagonal_scan

from .test_diagonal_scan import EXACT, make, run

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "cuda"
F32, F64, C64, C128, BF16, F16 = (
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.bfloat16,
    torch.float16,
)
# of a and x, in single precision; F32 beside a half type, the half type for both, and a real a beside complex x
LOW = ((F32, F32), (C64, C64), (F32, C64), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16))
HALF = (BF16, F16)


def moved(inputs: list[Tensor], options: dict, device: str = DEVICE) -> tuple[list[Tensor], dict]:
    return [v.to(device) for v in inputs], {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def on_device(inputs: list[Tensor], options: dict) -> list[Tensor]:
    """Outputs and gradients of the kernels, brought back to the CPU; memory that they leave unwritten is NaN."""
    inputs, options = moved(inputs, options)
    with poisoned():
        return [v.cpu() for v in run(BACKEND, *inputs, options)]


@contextlib.contextmanager
def poisoned():
    """Fills torch.empty with NaN, around the op alone: the mode that does so refuses some other CUDA operations."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def plain(a: Tensor, x: Tensor, state: Tensor) -> list[Tensor]:
    """Outputs and gradients of the loop in the dtypes given, as `run` has them; its backward costs O(T), not O(T^2)."""

    def loop(a, x, state):
        wide, h, hs = x.to(state.dtype), state, []
        steps = (a,) * x.shape[1] if a.ndim == 1 else a.unbind(-2)
        for a_t, x_t in zip(steps, wide.unbind(1), strict=True):
            h = a_t * h + x_t
            hs.append(h)
        return torch.stack(hs, 1).to(x.dtype) if hs else x, h

    inputs = [v.detach().requires_grad_() for v in (a.to(state.dtype) if a.dtype in HALF else a, x, state)]
    h, final_state = loop(*inputs)
    generator = torch.Generator().manual_seed(1)  # the cotangents of `run`
    wide = torch.complex128 if h.is_complex() else torch.float64
    cotangents = [torch.randn(v.shape, dtype=wide, generator=generator).to(v) for v in (h, final_state)]
    grads = torch.autograd.grad((h, final_state), inputs, cotangents, materialize_grads=True)
    return [h.detach(), final_state.detach(), *grads]


def distance(got: Tensor, wanted: Tensor) -> float:
    """The largest error relative to the largest element: a norm would hide a single bad one in half precision."""
    if not wanted.numel():
        return 0.0
    got, wanted = got.to(C128), wanted.to(C128)
    return ((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtypes", EXACT)
@pytest.mark.parametrize("a_ndim", (1, 2, 3))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))
def test_equals_the_loop(dtypes, a_ndim, reverse, flags):
    for B, T, D in ((2, 1, 3), (3, 63, 64), (1, 257, 130)):
        *inputs, options = make(B, T, D, a_ndim, *dtypes, flags=flags)
        options["reverse"] = reverse
        wanted = run("reference", *inputs, options)
        torch.testing.assert_close(on_device(inputs, options), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtypes", LOW, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
@pytest.mark.parametrize("flags", (0, 3), ids=("plain", "reset+mask"))
def test_single_and_half_precision_in_every_program(dtypes, flags):
    """Every pair of dtypes, constant and varying a, with and without flags: against the CPU's torch form."""
    for a_ndim, reverse, shape in ((1, False, (2, 63, 64)), (2, True, (3, 64, 33)), (3, False, (2, 65, 2))):
        *inputs, options = make(*shape, a_ndim, *dtypes, flags=flags)
        options["reverse"] = reverse
        unit = torch.finfo(dtypes[1]).eps
        for got, wanted in zip(on_device(inputs, options), run("torch", *inputs, options), strict=True):
            assert got.dtype == wanted.dtype and got.isfinite().all()
            assert distance(got, wanted) <= 8 * unit


@pytest.mark.parametrize("T", (0, 1, 63, 1000, 5000))
@pytest.mark.parametrize("D", (1, 3, 64, 1000))
@pytest.mark.parametrize("dtypes", ((F32, F32), (C64, C64), (F32, BF16)), ids=("float32", "complex64", "bfloat16"))
def test_error_at_most_twice_the_plain_loops(T, D, dtypes):
    """Against float64, for every layout that lengths and widths lead to; |a| within 1 % of one."""
    B = 1 if D == 1000 else 2
    for a_ndim in (1, 3):
        *inputs, _ = make(B, T, D, a_ndim, *dtypes, radius=(0.99, 1.0))
        exact = run("torch", *(v.to(torch.promote_types(v.dtype, F64)) for v in inputs), {})
        results = on_device(inputs, {}), plain(*inputs)
        # the gradient of a is read off h, which a half type rounds on the way to memory
        units = [torch.finfo(v.dtype).eps for v in results[0]]
        units[2] = max(units[2], torch.finfo(dtypes[1]).eps)
        for i, (got, loop, wanted) in enumerate(zip(*results, exact, strict=True)):
            assert got.dtype == loop.dtype and got.shape == wanted.shape
            assert distance(got, wanted) <= 2 * distance(loop, wanted) + 4 * units[i], (i, a_ndim)


@pytest.mark.parametrize("dtypes", ((F64, F64), (F32, F32), (F32, BF16), (BF16, BF16), (C64, C64)))
@pytest.mark.parametrize("a_ndim", (1, 3))
@pytest.mark.parametrize("T", (9, 3000))
def test_strides(dtypes, a_ndim, T):
    """Broadcast, misaligned by one element, every other token, time last: as what `contiguous` makes of them."""
    B, D = 3, 34
    *inputs, _ = make(B, T, D, a_ndim, *dtypes)
    (a, x, state), _ = moved(inputs, {})

    def misaligned(v):
        return torch.nn.functional.pad(v, (1, 2))[..., 1:-2]

    def every_other(v):
        return v.repeat_interleave(2, -2)[..., ::2, :]

    def time_last(v):
        return v.mT.contiguous().mT

    def broadcast(v):
        return v[:1].expand(v.shape)

    for change in (misaligned, every_other, time_last, broadcast):
        new_x, new_a = change(x), a if a_ndim == 1 else change(a)
        results = []
        for copy in (lambda v: v, lambda v: v.contiguous()):
            leaves = [copy(v).detach().requires_grad_() for v in (new_a, new_x, state)]
            with poisoned():
                h, final_state = diagonal_scan(*leaves, backend=BACKEND)
                weight = copy(change(torch.ones_like(h) + h.detach().real))  # the cotangent has these strides too
                grads = torch.autograd.grad((h, final_state), leaves, (weight.to(h.dtype), final_state.detach()))
            results.append([h.detach(), final_state.detach(), *grads])
        for got, wanted in zip(*results, strict=True):
            assert distance(got, wanted) <= 8 * torch.finfo(dtypes[1]).eps, change.__name__


def test_a_cotangent_without_memory_of_its_own():
    """What .sum() sends back is one number broadcast, and a lazy conjugate is only marked as such."""
    *inputs, _ = make(2, 63, 5, 3, C128, C128)
    for weight in (
        lambda h: h.sum().abs(),
        lambda h: (h.conj() * h.detach()).real.sum(),
        lambda h: h.mT[..., 3].norm(),
    ):
        grads = []
        for device, backend in ((DEVICE, BACKEND), ("cpu", "reference")):
            leaves = [v.to(device).requires_grad_() for v in inputs]
            grads.append(
                [v.cpu() for v in torch.autograd.grad(weight(diagonal_scan(*leaves, backend=backend)[0]), leaves)]
            )
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtypes", EXACT)
@pytest.mark.parametrize(("a_ndim", "reverse", "flags"), ((1, False, 0), (1, True, 3), (2, True, 0), (3, False, 3)))
def test_gradcheck_and_gradgradcheck(dtypes, a_ndim, reverse, flags):
    *inputs, options = make(2, 5, 2, a_ndim, *dtypes, flags=flags)
    inputs, options = moved(inputs, options)
    for v in inputs:
        v.requires_grad_()

    def scan(a, x, state):
        return diagonal_scan(a, x, state, reverse=reverse, backend=BACKEND, **options)

    assert gradcheck(scan, inputs, check_forward_ad=True)
    assert gradgradcheck(scan, inputs)


@pytest.mark.parametrize("a_ndim", (1, 3))
@pytest.mark.parametrize("flags", (0, 3))
def test_torch_func(a_ndim, flags):
    """grad, jvp, vmap and per-sample gradients: each as the same transform of the loop on the CPU."""
    *inputs, options = make(2, 9, 3, a_ndim, F64, F64, flags=flags)
    several = [torch.stack([v, torch.randn_like(v)]) for v in inputs]
    tangents = [torch.randn_like(v) for v in inputs]

    def results(device, backend):
        (*args, flagged), (*batch, _), (*directions, _) = (
            (*moved(v, options, device)[0], moved(v, options, device)[1]) for v in (inputs, several, tangents)
        )

        def loss(a, x, state):
            h, final_state = diagonal_scan(a, x, state, backend=backend, **flagged)
            return h.sin().sum() + final_state.square().sum()

        grad = torch.func.grad(loss, argnums=(0, 1, 2))
        found = [grad(*args), torch.func.jvp(loss, tuple(args), tuple(directions))]
        found += [torch.func.vmap(f, in_dims=dims)(*v) for f in (loss, grad) for dims, v in (((0, 0, 0), batch),)]
        found.append(torch.func.vmap(grad, in_dims=(None, 0, None))(args[0], batch[1], args[2]))
        return torch.utils._pytree.tree_map(torch.Tensor.cpu, found)

    torch.testing.assert_close(results(DEVICE, BACKEND), results("cpu", "reference"))


@pytest.mark.slow
@pytest.mark.parametrize(("dtypes", "a_ndim"), (((F32, F32), 3), ((C64, C64), 1), ((F32, BF16), 1)))
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex operators")
def test_compile_fullgraph(dtypes, a_ndim):
    """By inductor, at two lengths."""

    def loss(a, x, state, reset):
        h, final_state = diagonal_scan(a * 0.5, x + 1, state, reset=reset, backend=BACKEND)
        return h.abs().sum() + final_state.abs().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for T in (63, 1000):
        *inputs, options = make(2, T, 9, a_ndim, *dtypes, flags=1)
        leaves, options = moved(inputs, options)
        leaves = [v.requires_grad_() for v in leaves]
        values = [f(*leaves, **options) for f in (loss, compiled)]
        grads = [torch.autograd.grad(v, leaves) for v in values]
        for got, wanted in zip((values[1], *grads[1]), (values[0], *grads[0]), strict=True):
            assert distance(got, wanted) <= 8 * torch.finfo(dtypes[1]).eps


def test_autocast_keeps_the_state_in_float32():
    *inputs, _ = make(2, 63, 16, 3, F32, F32)
    a, x, state = (v.requires_grad_() for v in moved(inputs, {})[0])
    with torch.autocast(DEVICE, dtype=BF16):
        h, final_state = diagonal_scan(a, x @ torch.eye(16, device=DEVICE), state, backend=BACKEND)
    assert h.dtype == BF16 and final_state.dtype == F32
    wanted, wanted_final = diagonal_scan(a, x.to(BF16), state, backend="torch")
    torch.testing.assert_close((h, final_state), (wanted, wanted_final))
    assert all(v.dtype == F32 for v in torch.autograd.grad(h.float().sum(), (a, x, state)))


@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("T", (70, 5000))
def test_padding_and_resets_stop_what_is_not_finite(reverse, T):
    """NaN in padded tokens and infinity before a reset reach no real token behind it, and no gradient."""
    a, x, state, _ = make(1, T, 3, 3, F64, F64)
    edge = T // 2
    kept = slice(0, edge + 1) if reverse else slice(edge, T)  # the document that the reset opens
    reset, mask = torch.zeros(1, T, dtype=torch.bool), torch.ones(1, T, dtype=torch.bool)
    mask[0, ::7] = False
    reset[0, edge] = mask[0, edge] = True
    dirty = torch.where(mask[..., None], x, torch.nan)
    dirty[:, -2 if reverse else 1] = torch.inf

    (on, leaf, infinite), flags = moved([a, dirty, torch.full_like(state, torch.inf)], {"reset": reset, "mask": mask})
    leaf.requires_grad_()
    h, _ = diagonal_scan(on, leaf, infinite, reverse=reverse, backend=BACKEND, **flags)
    real = mask[0, kept]
    (grad,) = torch.autograd.grad(h[:, kept][:, real.to(h.device)].sum(), leaf)

    alone = x[:, kept][:, real].requires_grad_()
    wanted, _ = diagonal_scan(a[:, kept][:, real], alone, reverse=reverse, backend="reference")
    (wanted_grad,) = torch.autograd.grad(wanted.sum(), alone)
    torch.testing.assert_close(h[:, kept].cpu()[:, real], wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(grad[:, kept].cpu()[:, real], wanted_grad, rtol=1e-10, atol=1e-10)
    assert (grad[:, kept].cpu()[:, ~real] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("complex_", (False, True))
def test_long_and_barely_decaying(complex_):
    """T = 100 000 with |a| = 1 - 1e-6: a constant input has the closed form (1 - a^t) / (1 - a)."""
    T, a = 100_000, torch.tensor([1 - 1e-6], dtype=F64)
    if complex_:
        a = torch.polar(a, torch.tensor([2.0], dtype=F64))
    h, _ = diagonal_scan(a.to(DEVICE), torch.ones(1, T, 1, dtype=a.dtype, device=DEVICE), backend=BACKEND)
    t = torch.arange(1, T + 1, dtype=F64)
    torch.testing.assert_close(h[0, :, 0].cpu(), (1 - a**t) / (1 - a), rtol=1e-9, atol=1e-9)

    low = a.to(C64 if complex_ else F32)
    exact = ((1 - low.to(a.dtype) ** T) / (1 - low.to(a.dtype))).view(1, 1)
    ones = torch.ones(1, T, 1, dtype=low.dtype)
    loop = diagonal_scan(low, ones, backend="cpu")[1]
    _, final_state = diagonal_scan(low.to(DEVICE), ones.to(DEVICE), backend=BACKEND)
    assert (final_state.cpu() - exact).abs() <= 2 * (loop - exact).abs() + torch.finfo(F32).eps * exact.abs()
