"""The CUDA kernels of the diagonal scan, on the CPU through the same launcher, against loops in float64."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linrnn.kernels import cuda
from linrnn.kernels.cuda.diagonal_scan import PAIRS, PROGRAMS, backward, forward
from linrnn.ops import diagonal_scan

from .host import HostCuda, sanitized_environment, skip_without_compiler
from .host_scans import (
    BARELY,
    LAYOUTS,
    OPTIONS,
    PLANS,
    Case,
    backward_loop,
    check,
    check_long_sum,
    forward_loop,
    make,
    run,
)

FLOAT64, FLOAT32, HALF = (torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16)
KINDS = tuple(itertools.product((1, 3, 2), OPTIONS))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_every_pair_of_dtypes(host_cuda, pair):
    """Each with every plan; a constant or not, flags or not, an even width or not take turns with the pairs."""
    first = PAIRS.index(pair)
    for number, plan in enumerate(PLANS):
        # two of the programs of a pair are enough: what differs in the others does not depend on the dtypes
        for a_ndim, options in ((1, OPTIONS[first % 4]), (2 + number % 2, OPTIONS[(first + 2) % 4])):
            for D in (10, 33) if pair[1].itemsize == 2 and a_ndim > 1 else (10,):
                case = Case(pair, (2, 41, D), a_ndim, plan, options, number % 2 == 0, number % 3 == 0, seed=number)
                check(case)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("reverse", (False, True))
def test_every_kind_of_call(host_cuda, plan, reverse):
    for (a_ndim, options), with_state in itertools.product(KINDS, (True, False)):
        check(Case(FLOAT64, (3, 41, 9), a_ndim, plan, options, with_state, reverse))


@pytest.mark.parametrize("T", (1, 2, 7, 63, 64, 65, 300))
def test_every_shape(host_cuda, T):
    for (B, D), plan in itertools.product(((1, 1), (3, 3), (1, 33), (3, 64), (1, 130)), PLANS):
        a_ndim, options = KINDS[(T + D) % len(KINDS)]
        check(Case(FLOAT64, (B, T, D), a_ndim, plan, options, reverse=bool(D % 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", (FLOAT32, HALF), ids=("float32", "bfloat16"))
def test_every_layout(host_cuda, layout, pair):
    for plan, reverse, D in itertools.product(PLANS, (False, True), (10, 1)):
        check(Case(pair, (2, 41, D), 3, plan, "plain", reverse=reverse, layout=layout))


def test_the_loop_of_the_backward_is_autograd_of_the_reference():
    """What stands for the derivatives in these tests is right itself."""
    for (a_ndim, options), reverse in itertools.product(KINDS, (False, True)):
        for pair in (FLOAT64, (torch.complex128,) * 2, (torch.float64, torch.complex128)):
            i = make(Case(pair, (3, 17, 4), a_ndim, options=options))
            leaves = [v.requires_grad_() for v in (i.a, i.x, i.state)]
            outputs = forward_loop(i, reverse)
            grad_a, grad_x, grad_s = torch.autograd.grad(outputs, leaves, (i.grad_h, i.grad_final_state))
            got_x, got_a, got_s = backward_loop(i, outputs[0].detach(), reverse)
            for got, wanted in ((got_x, grad_x), (got_a.sum_to_size(i.a.shape), grad_a), (got_s, grad_s)):
                torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("pair", (FLOAT32, HALF), ids=("float32", "bfloat16"))
def test_the_same_bits_in_any_order_of_threads_and_blocks(host_cuda, plan, pair):
    """Also whenever the asynchronous copies arrive: 24 seeds."""
    for a_ndim, options in ((1, "reset+mask"), (3, "plain")):
        case = Case(pair, (1, 29, 6), a_ndim, plan, options)
        results = [run(case, make(case)) for _ in range(24)]
        check(case, results[0])
        for other in results[1:]:
            assert all(torch.equal(u, v) for u, v in zip(results[0], other, strict=True))


@pytest.mark.parametrize("plan", PLANS)
def test_every_piece_of_the_gradient_is_optional(host_cuda, plan):
    """A gradient that is absent counts as zero, and that of a is left out on demand."""
    for a_ndim in (1, 3):
        case = Case(FLOAT64, (2, 17, 5), a_ndim, plan)
        i = make(case)
        h, _ = forward(i.a, i.x, i.state, None, False, plan=PLANS[plan])
        zeros = replace(i, grad_h=torch.zeros_like(i.grad_h), grad_final_state=torch.zeros_like(i.grad_final_state))
        for grads, stand_in in (
            ((None, i.grad_final_state), replace(zeros, grad_final_state=i.grad_final_state)),
            ((i.grad_h, None), replace(zeros, grad_h=i.grad_h)),
            ((None, None), zeros),
        ):
            wanted_x, wanted_a, wanted_s = backward_loop(stand_in, h, False)
            for needs_grad_a in (True, False):
                got = backward(i.a, h, i.state, None, *grads, False, needs_grad_a, plan=PLANS[plan])
                wanted = (wanted_x, wanted_a.sum_to_size(i.a.shape) if needs_grad_a else None, wanted_s)
                for one, other in zip(got, wanted, strict=True):
                    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_reset_stops_what_is_not_finite(host_cuda, plan, reverse, bad):
    """A state, a coefficient or an input that is NaN or infinite stays in its document, and its gradients too."""
    B, T, D, at = 2, 41, 5, 20
    for a_ndim in (2, 3):
        i = make(Case(FLOAT64, (B, T, D), a_ndim, reverse=reverse))
        before, after = (slice(at + 1, T), slice(0, at + 1)) if reverse else (slice(0, at), slice(at, T))
        i.reset = torch.zeros(B, T, dtype=torch.bool)
        i.reset[:, at] = True
        for v in (i.a[..., before, :], i.x[:, before], i.state):
            v[..., 1] = bad
        h, final_state = forward(i.a, i.x, i.state, i.flags, reverse, plan=PLANS[plan])
        wanted, wanted_final = diagonal_scan(i.a[..., after, :], i.x[:, after], reverse=reverse, backend="reference")
        torch.testing.assert_close(h[:, after], wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(final_state, wanted_final, rtol=1e-12, atol=1e-12)
        # and a gradient that is not finite stays after the reset
        i.grad_h[:, after], i.grad_final_state[:] = bad, bad
        clean = make(Case(FLOAT64, (B, T, D), a_ndim, reverse=reverse))
        h, _ = forward(clean.a, clean.x, clean.state, i.flags, reverse, plan=PLANS[plan])
        grads = backward(
            clean.a, h, clean.state, i.flags, i.grad_h, i.grad_final_state, reverse, True, plan=PLANS[plan]
        )
        for got, loop in zip(grads, backward_loop(replace(i, a=clean.a, state=clean.state), h, reverse), strict=True):
            v = got if got.ndim < 3 else got[:, before]
            loop = loop.sum_to_size(got.shape)
            assert v.isfinite().all() or (got.ndim == 2 and a_ndim == 2)
            torch.testing.assert_close(v, loop if got.ndim < 3 else loop[:, before], equal_nan=True)


@pytest.mark.parametrize("plan", PLANS)
def test_only_a_reset_stops_what_is_not_finite(host_cuda, plan):
    """A coefficient of zero, or decays until nothing is left, let NaN through as they do row by row."""
    for a_ndim, scale in ((3, 1.0), (1, 1e-30)):
        i = make(Case(FLOAT64, (1, 130, 3), a_ndim))
        i.a *= scale
        i.x[0, 3] = torch.nan
        if a_ndim == 3:
            i.a[0, 10] = 0
        i.reset = torch.zeros(1, 130, dtype=torch.bool)
        for at in (None, 77):
            if at is not None:
                i.reset[0, at] = True
            h, final_state = forward(i.a, i.x, i.state, i.flags, False, plan=PLANS[plan])
            wanted, wanted_final = forward_loop(i, False)
            torch.testing.assert_close(h, wanted, equal_nan=True)
            torch.testing.assert_close(final_state, wanted_final, equal_nan=True)


@pytest.mark.parametrize("plan", PLANS)
def test_barely_decaying_and_long(host_cuda, plan):
    """The error of a product repeats in every piece of time, so it is taken, and handed on, in double."""
    check(replace(BARELY, plan=plan))
    check_long_sum(plan)


@pytest.mark.parametrize("plan", PLANS)
def test_states_are_not_read_where_no_gradient_of_a_is_wanted(host_cuda, plan):
    case = Case(FLOAT64, (2, 17, 5), 1, plan)
    i = make(case)
    h, _ = forward(i.a, i.x, i.state, None, False, plan=PLANS[plan])
    grads = (i.grad_h, i.grad_final_state)
    wanted_x, _, wanted_s = backward(i.a, h, i.state, None, *grads, False, True, plan=PLANS[plan])
    h.fill_(torch.nan)
    got_x, grad_a, got_s = backward(i.a, h, i.state, None, *grads, False, False, plan=PLANS[plan])
    assert grad_a is None and torch.equal(got_x, wanted_x) and torch.equal(got_s, wanted_s)


@pytest.mark.parametrize("plan", PLANS)
def test_padding_is_ignored_whatever_stands_there(host_cuda, plan):
    for a_ndim, reverse in itertools.product((1, 3), (False, True)):
        case = Case(FLOAT64, (3, 41, 5), a_ndim, plan, "reset+mask", reverse=reverse)
        i = make(case)
        clean = run(case, i)
        i.x[~i.mask] = torch.nan
        if a_ndim == 3:
            i.a[~i.mask] = torch.nan
        for got, wanted in zip(run(case, i), clean, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ((0, 7, 3), (2, 0, 3), (2, 7, 0)))
def test_nothing_to_scan(host_cuda, shape):
    for a_ndim, plan in itertools.product((1, 2, 3), PLANS):
        case = Case(FLOAT64, shape, a_ndim, plan)
        i = make(case)
        h, final_state, grad_x, grad_a, grad_s = run(case, i)
        assert h.shape == grad_x.shape == shape and (grad_a == 0).all() and grad_a.shape == i.a.shape
        assert torch.equal(final_state, i.state) and torch.equal(grad_s, i.grad_final_state)
        assert not host_cuda.launches


@pytest.mark.parametrize("plan", PLANS)
def test_offsets_beyond_32_bits(host_cuda, plan, tmp_path):
    """Rows, and sequences, more than 2^31 elements apart, in a sparse file."""
    case, far = Case(HALF, (2, 3, 10), 1, plan), 2**31 + 2
    i = make(case)
    dense = run(case, i)
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 128, dtype=torch.bfloat16)
    for strides in ((10, far, 1), (far, 10, 1)):
        x, grad_h, h = (
            file.as_strided(case.shape, strides, offset).copy_(v)
            for offset, v in ((0, i.x), (32, i.grad_h), (64, dense[0]))
        )
        got = forward(i.a, x, i.state, None, False, plan=PLANS[plan])
        grads = backward(i.a, h, i.state, None, grad_h, i.grad_final_state, False, True, plan=PLANS[plan])
        for one, other in zip((*got, *grads), dense, strict=True):
            assert torch.equal(one, other)


def test_a_complex_tensor_may_start_at_an_odd_float(host_cuda):
    """Such a view of floats, at an address that is no multiple of its item, is copied first."""
    i = make(Case((torch.complex64,) * 2, (2, 17, 5)))
    memory = bytearray(i.x.numel() * 8 + 4)
    x = torch.frombuffer(memory, dtype=torch.complex64, offset=4).view(i.x.shape)
    assert x.data_ptr() % 8 == 4
    x.copy_(i.x)
    wanted = forward(i.a, i.x, i.state, None, False)
    for got, other in zip(forward(i.a, x, i.state, None, False), wanted, strict=True):
        torch.testing.assert_close(got, other, rtol=0, atol=0)


def test_the_rule_takes_both_shapes_of_parallelism(host_cuda):
    """Many columns, few columns, few columns and a long sequence; and more shared memory than there is, for none."""
    for shape, kernels in (
        ((1, 65, 500), {"scan_sequential"}),
        ((1, 65, 40), {"scan_sequential"}),
        ((1, 2100, 3), {"scan_reduce", "scan_carry", "scan_emit"}),
    ):
        for pair in (FLOAT32, (torch.complex128,) * 2):
            host_cuda.launches.clear()
            check(Case(pair, shape, 3, "rule"))
            assert {name for name, *_ in host_cuda.launches} == kernels


def test_only_listed_programs_are_asked_for(host_cuda, monkeypatch):
    """What a release brings compiled is all that the launcher can want."""
    wanted = set()

    class Nothing:
        def kernel(self, name):
            return self

        def launch(self, *args):
            pass

    monkeypatch.setattr(cuda, "program", lambda source, definitions, _: wanted.add((source, definitions)) or Nothing())
    for pair, a_ndim, options, D in itertools.product(PAIRS, (1, 3), ("plain", "reset"), (10, 9)):
        case = Case(pair, (1, 3, D), a_ndim, "rule", options)
        run(case, make(case))
    assert wanted == set(PROGRAMS)


@pytest.fixture
def races(host_folder):
    skip_without_compiler()
    with HostCuda("races", host_folder).installed() as host:
        yield host


@pytest.mark.parametrize("plan", PLANS)
def test_no_races(races, plan):
    """By CUDA's rules, in shared and in global memory, within blocks and between them."""
    for pair, (a_ndim, options) in itertools.product((FLOAT32, HALF), ((1, "reset+mask"), (3, "plain"))):
        for shape, reverse in (((2, 37, 10), False), ((1, 65, 34), True), ((3, 1, 2), False)):
            check(Case(pair, shape, a_ndim, plan, options, reverse=reverse))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ("address", pytest.param("threads", marks=pytest.mark.exhaustive)))
def test_sanitizers(host_folder, mode):
    skip_without_compiler()
    root = str(Path(__file__).parents[2])
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.kernels import test_cuda_host as t"
    command = [sys.executable, "-c", f"{code}; t.sweep(*sys.argv[2:])", root, mode, str(host_folder)]
    done = subprocess.run(command, env=sanitized_environment(mode), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def sweep(mode: str, folder: str) -> None:
    """A few cases under a sanitizer. Real threads cost much more than fibers and show races only, and no addresses."""
    torch.use_deterministic_algorithms(True)  # torch.empty holds NaN
    layouts, plans, pairs = ("dense", "sliced"), tuple(PLANS), (FLOAT32, HALF)
    if mode == "threads":
        layouts, plans, pairs = layouts[:1], ("segments", "chunks"), pairs[:1]
    with HostCuda(mode, Path(folder)).installed():
        for plan, layout, pair in itertools.product(plans, layouts, pairs):
            for a_ndim, options, shape in ((3, "plain", (2, 21, 10)), (1, "reset+mask", (1, 29, 6))):
                check(Case(pair, shape, a_ndim, plan, options, reverse=a_ndim == 1, layout=layout))
