"""diagonal_scan against the recurrence written as a loop: every backend, shape, dtype and option."""

import contextlib
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from linrnn.ops import diagonal_scan, reset_from_cu_seqlens

FAST = ("torch", "cpu")
EXACT = ((torch.float64, torch.float64), (torch.complex128, torch.complex128), (torch.float64, torch.complex128))


def make(B, T, D, a_ndim, a_dtype, x_dtype, *, flags=0, radius=(0.8, 1.0)):
    """a, x, an initial state and options; |a| uniform in `radius`, random phases where it is complex."""
    shape = ((D,), (T, D), (B, T, D))[a_ndim - 1]
    a = torch.empty(shape, dtype=torch.float64).uniform_(*radius)
    if a_dtype.is_complex:
        a = torch.polar(a, 6.3 * torch.rand(shape, dtype=torch.float64))
    x = torch.randn(B, T, D, dtype=torch.complex128 if x_dtype.is_complex else torch.float64)
    state = torch.randn(B, D, dtype=x.dtype)
    options = {}
    if flags & 1:
        options["reset"] = torch.rand(B, T) < 0.1
    if flags & 2:
        options["mask"] = torch.rand(B, T) < 0.8
    return a.to(a_dtype), x.to(x_dtype), state.to(torch.promote_types(x_dtype, torch.float32)), options


def run(backend: str, a: Tensor, x: Tensor, state: Tensor | None, options: dict) -> list[Tensor]:
    """Outputs and gradients, for cotangents of both outputs that depend on the shapes alone."""
    inputs = [v.detach().requires_grad_() for v in (a, x, state) if v is not None]  # strides as they are
    h, final_state = diagonal_scan(*inputs, backend=backend, **options)
    nothing = 0 * sum(v.sum() for v in inputs)  # so that both outputs have a graph even where T = 0
    h, final_state = h + nothing.to(h.dtype), final_state + nothing.to(final_state.dtype)
    generator = torch.Generator().manual_seed(1)
    wide = torch.complex128 if h.is_complex() else torch.float64
    cotangents = [torch.randn(v.shape, dtype=wide, generator=generator).to(v) for v in (h, final_state)]
    grads = torch.autograd.grad((h, final_state), inputs, cotangents, materialize_grads=True)
    return [h.detach(), final_state.detach(), *grads]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtypes", EXACT)
@pytest.mark.parametrize("a_ndim", (1, 2, 3))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))
def test_equals_the_loop(backend, dtypes, a_ndim, reverse, flags):
    for B, T, D in ((2, 1, 3), (3, 63, 5), (2, 130, 70)):
        *inputs, options = make(B, T, D, a_ndim, *dtypes, flags=flags)
        options["reverse"] = reverse
        for got, wanted in zip(run(backend, *inputs, options), run("reference", *inputs, options), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("count", (2, 3))
@pytest.mark.parametrize("shape", ((1, 5000, 9), (1, 300, 600), (5, 517, 33)))
def test_every_way_of_spreading_over_threads(count, shape):
    """Few narrow sequences are split in time, wide ones in channels, many over the batch."""
    for dtypes, a_ndim, reverse, flags in ((EXACT[0], 1, False, 3), (EXACT[1], 3, True, 0), (EXACT[2], 3, False, 1)):
        *inputs, options = make(*shape, a_ndim, *dtypes, flags=flags)
        options["reverse"] = reverse
        wanted = run("torch", *inputs, options)
        with threads(count):
            got = run("cpu", *inputs, options)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 20)),
    a_ndim=st.integers(1, 3),
    dtypes=st.sampled_from(EXACT),
    flags=st.integers(0, 3),
    reverse=st.booleans(),
    with_state=st.booleans(),
    backend=st.sampled_from(FAST),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, a_ndim, dtypes, flags, reverse, with_state, backend, strided, seed):
    torch.manual_seed(seed)
    a, x, state, options = make(*shape, a_ndim, *dtypes, flags=flags)
    options["reverse"] = reverse
    if strided:  # time and channels swapped in memory, and a batch that is broadcast
        x = x.mT.contiguous().mT
        a = a[:1].expand(a.shape) if a_ndim > 1 and a.shape[0] else a
    state = state if with_state else None
    h, final_state, *_ = run(backend, a, x, state, options)
    assert h.shape == shape and h.dtype == dtypes[1] and final_state.shape == (shape[0], shape[2])
    for got, wanted in zip(run(backend, a, x, state, options), run("reference", a, x, state, options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("backend", "count"), (("torch", 1), ("cpu", 1), ("cpu", 2)))
@pytest.mark.parametrize("dtypes", ((torch.float32,) * 2, (torch.complex64,) * 2, (torch.float32, torch.complex64)))
def test_float32_error_at_most_twice_the_loops(backend, count, dtypes):
    """Against float64, over several draws: the plain float32 loop sets the bound. Two threads split the sequence."""
    worst = {}
    for seed in range(6):
        torch.manual_seed(seed)
        *inputs, options = make(1, 2000, 17, 1 + 2 * (seed % 2), *dtypes, radius=(0.99, 1.0))
        wide = [v.to(torch.promote_types(v.dtype, torch.float64)) for v in inputs]
        exact = run("torch", *wide, options)
        with threads(count):
            results = {backend: run(backend, *inputs, options)}
        results["reference"] = run("reference", *inputs, options)
        for name, result in results.items():
            for i, (got, wanted) in enumerate(zip(result, exact, strict=True)):
                error = ((got - wanted).norm() / wanted.norm()).item()
                worst[name, i] = max(worst.get((name, i), 0.0), error)
    for i in range(5):
        assert worst[backend, i] <= 2 * worst["reference", i], (i, worst)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("a_dtype", (torch.float32, "same"))
def test_half_precision_is_a_format_not_an_accumulator(backend, dtype, a_dtype):
    """The error of the output is its own rounding, half a unit in the last place, however long the sequence."""
    a_dtype = dtype if a_dtype == "same" else a_dtype
    a, x, state, _ = make(2, 1000, 9, 3, a_dtype, dtype)
    h, final_state = diagonal_scan(a, x, state, backend=backend)
    exact, exact_final = diagonal_scan(a.double(), x.double(), state.double(), backend="reference")
    assert h.dtype == dtype and final_state.dtype == torch.float32
    half_ulp = torch.finfo(dtype).eps / 2
    float32_error = 1e-5  # of a state of size about 3, after 1000 steps of which about 10 are remembered
    assert ((h.double() - exact).abs() <= half_ulp * exact.abs() + float32_error + torch.finfo(dtype).tiny).all()
    torch.testing.assert_close(final_state.double(), exact_final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("complex_", (False, True))
def test_long_and_barely_decaying(backend, complex_):
    """T = 100 000 with |a| = 1 - 1e-6: a constant input has the closed form (1 - a^t) / (1 - a)."""
    T, a = 100_000, torch.tensor([1 - 1e-6], dtype=torch.float64)
    if complex_:
        a = torch.polar(a, torch.tensor([2.0], dtype=torch.float64))
    x = torch.ones(1, T, 1, dtype=a.dtype)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    h, _ = diagonal_scan(a, x, backend=backend)
    torch.testing.assert_close(h[0, :, 0], (1 - a**t) / (1 - a), rtol=1e-9, atol=1e-9)

    low = a.to(torch.complex64 if complex_ else torch.float32).requires_grad_()
    h, final_state = diagonal_scan(low, x.to(low.dtype), backend=backend)
    final_state.sum().abs().backward()
    assert h.isfinite().all() and low.grad.isfinite().all()
    rounded = low.detach().to(a.dtype)  # so that only the scan's own error shows
    exact = ((1 - rounded**T) / (1 - rounded)).view(1, 1)
    loop = diagonal_scan(low.detach(), x.to(low.dtype), backend="reference")[1]
    bound = 2 * (loop - exact).abs() + torch.finfo(torch.float32).eps * exact.abs()
    assert (final_state - exact).abs() <= bound


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_pieces_with_a_carried_state_equal_the_whole(backend):
    a, x, state, _ = make(2, 63, 5, 3, torch.float64, torch.float64)
    for v in (a, x, state):
        v.requires_grad_()
    whole, whole_final = diagonal_scan(a, x, state, backend=backend)
    pieces, s = [], state
    for begin, end in ((0, 0), (0, 20), (20, 21), (21, 63)):
        h, s = diagonal_scan(a[:, begin:end], x[:, begin:end], s, backend=backend)
        pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(s, whole_final, rtol=1e-12, atol=1e-12)
    loss = [
        torch.autograd.grad((h.sum() * f.sum()), (a, x, state))
        for h, f in ((whole, whole_final), (torch.cat(pieces, 1), s))
    ]
    for got, wanted in zip(*loss, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", (False, True))
def test_packed_documents_equal_separate_runs(backend, reverse):
    bounds = [0, 0, 1, 1, 30, 63, 63]
    a, x, *_ = make(1, 63, 4, 3, torch.complex128, torch.complex128)
    reset = reset_from_cu_seqlens(torch.tensor(bounds), 63, reverse=reverse)
    packed, _ = diagonal_scan(a, x, reset=reset, reverse=reverse, backend=backend)
    for begin, end in itertools.pairwise(bounds):
        alone, _ = diagonal_scan(a[:, begin:end], x[:, begin:end], reverse=reverse, backend="reference")
        torch.testing.assert_close(packed[:, begin:end], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", (False, True))
def test_padding_is_invisible_whatever_stands_there(backend, reverse):
    """NaN in a padded token reaches neither the real tokens nor a gradient."""
    a, x, state, _ = make(3, 63, 4, 1, torch.float64, torch.float64)
    mask = torch.zeros(3, 63, dtype=torch.bool)
    for b, (begin, end) in enumerate(((0, 40), (23, 63), (10, 11))):
        mask[b, begin:end] = True
    dirty = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    h, final_state = diagonal_scan(a, dirty, state, mask=mask, reverse=reverse, backend=backend)
    (grad,) = torch.autograd.grad(h[mask].sum() + final_state.sum(), dirty)
    for b in range(3):
        alone = x[b : b + 1, mask[b]].requires_grad_()
        h_alone, final_alone = diagonal_scan(a, alone, state[b : b + 1], reverse=reverse, backend="reference")
        torch.testing.assert_close(h[b : b + 1, mask[b]], h_alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final_state[b : b + 1], final_alone, rtol=1e-12, atol=1e-12)
        (grad_alone,) = torch.autograd.grad(h_alone.sum() + final_alone.sum(), alone)
        torch.testing.assert_close(grad[b : b + 1, mask[b]], grad_alone, rtol=1e-12, atol=1e-12)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("backend", ("auto", "reference", *FAST))
def test_one_token_steps(backend):
    """The decoding path, without autograd: T = 1 calls one after another."""
    for dtypes in (*EXACT, (torch.float32, torch.float32), (torch.float32, torch.bfloat16)):
        a, x, state, _ = make(2, 9, 5, 3, *dtypes)
        whole, whole_final = diagonal_scan(a, x, state, backend="reference")
        for t in range(9):
            h, state = diagonal_scan(a[:, t : t + 1], x[:, t : t + 1], state, backend=backend)
            assert h.dtype == whole.dtype and state.dtype == whole_final.dtype
            torch.testing.assert_close(
                h[:, 0],
                whole[:, t],
                rtol=1e-6 if h.dtype == torch.float32 else None,
                atol=None if h.dtype != torch.float32 else 1e-6,
            )
        torch.testing.assert_close(state, whole_final)


def test_dtypes_of_mixed_inputs():
    """h has the common dtype of a and x, except that half inputs keep theirs beside a real float32 a."""
    f16, bf16, f32, f64, c64, c128 = (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    )
    for a_dtype, x_dtype, h_dtype, state_dtype in (
        (f32, bf16, bf16, f32),
        (bf16, f16, f16, f32),
        (bf16, f32, f32, f32),
        (f64, f32, f64, f64),
        (f64, bf16, f64, f64),
        (c64, f32, c64, c64),
        (f32, c64, c64, c64),
        (f32, c128, c128, c128),
        (f64, c64, c128, c128),
        (c64, bf16, c64, c64),
        (c64, f64, c128, c128),
        (bf16, c64, c64, c64),
    ):
        a, x = torch.full((4,), 0.5, dtype=a_dtype), torch.ones(2, 3, 4, dtype=x_dtype)
        for backend in ("auto", "reference", *FAST):
            h, final_state = diagonal_scan(a, x, backend=backend)
            assert (h.dtype, final_state.dtype) == (h_dtype, state_dtype), (a_dtype, x_dtype, backend)
            step, after = diagonal_scan(a, x[:, :1], torch.zeros_like(final_state), backend=backend)
            assert (step.dtype, after.dtype) == (h_dtype, state_dtype), (a_dtype, x_dtype, backend)
            torch.testing.assert_close(h[0, :, 0].abs().double(), torch.tensor([1.0, 1.5, 1.75], dtype=f64))


@pytest.mark.parametrize("backend", FAST)
def test_conjugates_and_negatives_that_torch_only_marks(backend):
    """x.conj() is a view with a bit set; autograd hands such views back as cotangents."""
    a, x, state, _ = make(2, 9, 5, 3, torch.complex128, torch.complex128)
    inputs = [v.requires_grad_() for v in (a, x, state)]
    outputs = []
    for name in (backend, "reference"):
        h, final_state = diagonal_scan(a.conj(), x.conj(), state.conj(), backend=name)
        lazy = (h.conj() * x.detach()).real.sum() + (final_state.conj() * state.detach()).real.sum()
        outputs.append([h, final_state, *torch.autograd.grad(lazy, inputs)])
    torch.testing.assert_close(outputs[0], outputs[1])
    real = torch._neg_view(x.detach().real.contiguous())
    with torch.no_grad():
        torch.testing.assert_close(
            diagonal_scan(a.abs(), real, backend=backend), diagonal_scan(a.abs(), real, backend="reference")
        )
        torch.testing.assert_close(
            diagonal_scan(a.conj(), x, backend=backend), diagonal_scan(a.conj(), x, backend="reference")
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", (False, True))
def test_a_reset_stops_what_is_not_finite(backend, reverse):
    """NaN in one document, or in its gradient, stays there."""
    a, x, state, _ = make(1, 70, 3, 3, torch.float64, torch.float64)
    reset = torch.zeros(1, 70, dtype=torch.bool)
    reset[0, 30] = True
    kept = slice(0, 31) if reverse else slice(30, 70)  # the document entered by the reset
    dirty = x.clone()
    dirty[0, 50 if reverse else 10] = torch.nan
    h, _ = diagonal_scan(a, dirty, torch.full_like(state, torch.inf), reset=reset, reverse=reverse, backend=backend)
    wanted, _ = diagonal_scan(a[:, kept], x[:, kept], reverse=reverse, backend="reference")
    torch.testing.assert_close(h[:, kept], wanted)
    x.requires_grad_()
    h, _ = diagonal_scan(a, x, reset=reset, reverse=reverse, backend=backend)
    weight = torch.ones_like(h)
    weight[0, 10 if reverse else 50] = torch.nan
    (grad,) = torch.autograd.grad(h, x, weight)
    other = slice(31, 70) if reverse else slice(0, 30)
    assert grad[:, other].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("T", (70, 5000))
@pytest.mark.parametrize("at", (29, 1234, 2601))
def test_only_a_reset_stops_what_is_not_finite(backend, T, at):
    """A coefficient of zero, or decays until nothing is left, let NaN through as they do row by row."""
    a, x, _, _ = make(1, T, 3, 3, torch.float32, torch.float32)
    a = a.abs().clamp(max=0.1)
    a[0, 12] = 0
    x[0, 5] = torch.nan
    reset = torch.zeros(1, T, dtype=torch.bool)
    reset[0, min(at, T - 1)] = True
    with threads(2):
        for flags in ({"reset": reset}, {"mask": torch.ones(1, T, dtype=torch.bool)}):
            h, final_state = diagonal_scan(a, x, backend=backend, **flags)
            wanted, wanted_final = diagonal_scan(a, x, backend="reference", **flags)
            assert torch.equal(h.isnan(), wanted.isnan()) and torch.equal(final_state.isnan(), wanted_final.isnan())
            torch.testing.assert_close(h, wanted, equal_nan=True)


@pytest.mark.parametrize("backend", ("auto", *FAST))
@pytest.mark.parametrize("T", (1, 5))
def test_outputs_do_not_share_memory(backend, T):
    a, x, state, _ = make(2, T, 4, 1, torch.float32, torch.float32)
    h, final_state = diagonal_scan(a, x, state, backend=backend)
    before = final_state.clone()
    h.zero_()
    assert torch.equal(final_state, before)


def test_default_devices_and_traces_are_left_alone():
    a, x, state, _ = make(2, 9, 4, 1, torch.float32, torch.float32)
    wanted = diagonal_scan(a, x, state)
    with torch.device("meta"):
        got = diagonal_scan(a, x, state)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.grad(diagonal_scan(a.requires_grad_(), x)[0].sum(), a)[0].device.type == "cpu"
