"""The CUDA kernels of the selective scan, on the CPU through the same launcher, against autograd of the reference."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linrnn.kernels import KernelUnavailable, cuda
from linrnn.kernels.cuda import compiler, selective_plan, selective_scan
from linrnn.kernels.cuda.selective_plan import Problem, choose_plan, choose_tile, most_states, shared_bytes
from linrnn.kernels.cuda.selective_scan import PROGRAMS, backward, forward
from linrnn.ops import BackendUnavailable
from linrnn.ops import _selective_scan as op
from linrnn.ops import selective_scan as selective_scan_op

from .host import SMALL, HostCuda, skip_without_compiler
from .host_selective import BF16, F16, F32, F64, NAMES, OPTIONS, Case, check, make, reference, run
from .test_cuda_plan import A10, H200, T4

SPLITS = (dict(), dict(threads=32), dict(threads=64), dict(threads=32, chunk=8), dict(threads=64, chunk=24))


def kinds(**fixed):
    """Options, splits and layouts taking turns."""
    for n, (options, split) in enumerate(itertools.product(OPTIONS, SPLITS)):
        yield Case(**fixed, **split, options=options, with_state=n % 3 > 0, strided=n % 2 == 1, seed=n)


@pytest.mark.parametrize(("N", "dtype"), ((3, F32), (16, F32), (40, F32), (130, F32), (16, F64)))
def test_every_tile(host_cuda, N, dtype):
    """Lanes and states of all kinds, some of them padding."""
    for case in kinds(N=N, x=dtype):
        check(case)


@pytest.mark.parametrize("dtype", (BF16, F16), ids=str)
def test_half_precision_of_x(host_cuda, dtype):
    """Of dt, B and C too; aligned rows and others."""
    for n, (D, strided) in enumerate(itertools.product((64, 6, 5), (False, True))):
        check(Case((2, 19, D), x=dtype, dt=(None, dtype)[n % 2], strided=strided, options=OPTIONS[n % 4]))


def test_every_shape(host_cuda):
    for T, (D, G) in itertools.product((1, 2, 7, 63, 64, 65), ((1, 1), (5, 5), (70, 1), (70, 2), (32, 1))):
        split = SPLITS[(T + D + G) % len(SPLITS)]
        check(Case((1 + T % 3, T, D), G=G, x=F32, options=OPTIONS[(T + D) % 4], **split))
    check(Case((1, 1000, 3), x=F32, spacing=16, options="reset+mask"))


@pytest.mark.parametrize("spacing", (1, 3, 4, 16, 64))
def test_every_spacing(host_cuda, spacing):
    """Those for which shared memory has no room take states closer by."""
    for split in ({}, dict(threads=32), dict(threads=32, chunk=48)):
        check(Case((2, 130, 5), x=F32, spacing=spacing, options="reset+mask", **split))


def test_what_is_absent(host_cuda):
    case = Case(x=F32)
    i = make(case)
    args = (i.x, i.dt, i.A, i.B, i.C)
    y, last, none = forward(*args, None, None, 8, False)
    zeros = torch.zeros_like(i.state)
    again, last_again, kept = forward(*args, zeros, None, 8, True)
    assert none.shape == (2, 0, 5, 16) and kept.shape == (2, 3, 5, 16)
    assert torch.equal(y, again) and torch.equal(last, last_again) and torch.equal(kept[:, 0], zeros)
    for got, wanted in zip(
        backward(*args, None, kept, i.grad_y, None, 8), backward(*args, None, kept, i.grad_y, zeros, 8), strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("split", SPLITS[1::2])
def test_the_same_bits_in_any_order_of_threads_and_blocks(host_cuda, split):
    case = Case((1, 29, 38), x=F32, options="reset+mask", **split)
    inputs = make(case)
    first = run(case, inputs)
    for _ in range(8):
        for one, other in zip(run(case, inputs), first, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("split", SPLITS[::3])
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_resets_and_padding_stop_what_is_not_finite(host_cuda, split, bad):
    case, at = Case((1, 41, 5), x=F32, **split), 20
    i = make(case)
    i.reset, i.mask = torch.zeros(1, 41, dtype=torch.bool), torch.ones(1, 41, dtype=torch.bool)
    i.reset[:, at], i.mask[:, 10:12], i.mask[:, 30:33] = True, False, False
    clean = run(case, i)
    for v in (i.x, i.dt, i.B, i.C, i.grad_y):
        v[:, ~i.mask[0]] = bad
    for name, got, wanted in zip(NAMES, run(case, i), clean, strict=True):
        assert torch.equal(got, wanted), name
    i = replace(i, x=i.x.clone())
    i.x[:, at - 1] = bad  # before the reset: what comes after it is untouched
    i.state = torch.full_like(i.state, bad)
    got = run(case, i)
    for n in (0, 2, 3, 5, 6):
        assert torch.equal(got[n][:, at:], clean[n][:, at:]), NAMES[n]
    assert torch.equal(got[1], clean[1])


def test_sums_in_parts_of_the_batch(host_cuda, monkeypatch):
    """Where those over tiles of channels would take too much memory; whatever the dtype of A's gradient."""
    case = Case((5, 9, 70), x=F32, options="reset+mask", threads=32)
    monkeypatch.setattr(selective_scan, "MOST_SUMS", 2 * 9 * 2 * 16 * 4 * 5)
    host_cuda.launches.clear()
    check(case)
    assert [name for name, *_ in host_cuda.launches] == [
        "selective_scan"
    ] * 4  # one forward; two, two and one sequences


def test_the_rule_cuts_time_where_there_are_few_channels(host_cuda):
    for shape, kernels in (((8, 200, 70), 2), ((1, 400, 3), 6)):
        host_cuda.launches.clear()
        check(Case(shape, x=F32, spacing=16))
        assert len(host_cuda.launches) == kernels, host_cuda.launches


def test_offsets_beyond_32_bits(host_cuda, tmp_path):
    """Rows, and sequences, more than 2^31 elements apart, in a sparse file."""
    case, far = Case((2, 3, 10), x=BF16, threads=32), 2**31 + 2
    i = make(case)
    x, dense = i.x, run(case, i)
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * far + 128, dtype=BF16)
    for strides in ((10, far, 1), (far, 10, 1)):
        i.x = file.as_strided(case.shape, strides, 1).copy_(x)
        for one, other in zip(run(case, i), dense, strict=True):
            assert torch.equal(one, other)


def test_only_listed_programs_are_asked_for(host_cuda, monkeypatch):
    wanted = set()

    class Nothing:
        def kernel(self, name):
            return self

        def launch(self, *args):
            pass

    monkeypatch.setattr(cuda, "program", lambda source, definitions, _: wanted.add((source, definitions)) or Nothing())
    for x, N in itertools.product((F32, F64, BF16, F16), range(1, most_states() + 1)):
        run(Case((1, 3, 2), N, x=x), make(Case((1, 3, 2), N, x=x)))
    assert wanted == set(PROGRAMS)


def test_what_the_kernels_do_not_take(host_cuda, monkeypatch):
    """auto then goes to torch, and a call by name says why."""
    x, A = torch.randn(1, 3, 2), -torch.rand(2, 4)
    B = torch.randn(1, 3, 1, 4)
    for wrong, reason in ((A.cfloat(), "take a real A"), (-torch.rand(2, 257), "at most 256 states, got 257")):
        with pytest.raises(KernelUnavailable, match=reason):
            forward(x, x, wrong, B, B, None, None, 16, False)
        there = type("OnTheGpu", (), {"device": torch.device("cuda")})()
        assert op._choose("auto", there, wrong) == "torch" and op._choose("auto", there, A) == "cuda"
        with pytest.raises(
            BackendUnavailable, match=f"backend='cuda' cannot run here: .*{reason}.*; use backend='auto'"
        ):
            op._choose("cuda", there, wrong)


def test_the_operator_on_the_kernels(host_cuda, monkeypatch):
    """Derivatives, dtypes and all, as on a GPU, but for the device of the tensors."""
    monkeypatch.setattr(op, "_launcher", lambda backend: selective_scan)
    monkeypatch.setitem(op.SPACING, "cpu", 16)
    case = Case((2, 35, 6), x=BF16, options="reset+mask")
    i = make(case)
    leaves = [v.requires_grad_() for v in (i.x, i.dt, i.A, i.B.bfloat16(), i.C.bfloat16(), i.state)]
    y, last = selective_scan_op(*leaves[:5], None, None, leaves[5], reset=i.reset, mask=i.mask, backend="cpu")
    assert y.dtype == BF16 and last.dtype == F32 and host_cuda.launches
    grads = torch.autograd.grad((y.float(), last), leaves, (i.grad_y, i.grad_s))
    wanted = reference(replace(i, B=leaves[3], C=leaves[4]), F64)
    for got, exact in zip((y, last, *grads), wanted, strict=True):
        tolerance = 2**-7 if got.dtype == BF16 else 1e-2  # the gradient of y is rounded too
        assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()
    assert [v.dtype for v in grads] == [v.dtype for v in leaves]


@pytest.fixture
def races(host_folder):
    skip_without_compiler()
    with HostCuda("races", host_folder).installed() as host:
        yield host


def test_no_races(races):
    """By CUDA's rules, in shared and in global memory, within blocks and between them."""
    for n, split in enumerate(SPLITS):
        for shape in ((2, 37, 10), (1, 21, 70)):
            check(Case(shape, x=F32, options=OPTIONS[n % 4], strided=n % 3 == 0, **split))


@given(
    B=st.integers(1, 64),
    T=st.integers(1, 100_000),
    G=st.integers(1, 4),
    of_group=st.integers(1, 4096),
    N=st.integers(1, 256),
    dtypes=st.sampled_from(((4, 4), (2, 4), (8, 8))),
    spacing=st.sampled_from((1, 3, 16, 64)),
    backward=st.booleans(),
    device=st.sampled_from((H200, T4, A10, SMALL)),
)
def test_every_plan_can_run(B, T, G, of_group, N, dtypes, spacing, backward, device):
    tile = choose_tile(N, dtypes[1] == 8)
    assert tile.padded >= N and tile.padded < max(2 * N, 9) and 32 % tile.lanes == 0
    problem = Problem(B, T, G, of_group, tile, *dtypes)
    plan = choose_plan(problem, backward, spacing, device)
    assert plan.threads in (32, 64, 128) and 1 <= plan.stage and (not backward or plan.stage <= spacing)
    for reduces in (False, True):
        assert shared_bytes(problem, plan.threads, plan.stage, backward, reduces) <= device.shared_bytes_per_block
    assert plan.chunk % plan.stage == 0 and (plan.chunk == 0 or 32 <= plan.chunk < T + plan.stage)


def test_plans_for_an_h200():
    """Enough blocks are left whole; few are spread, and fewer cut in time, where that is worth what it costs."""
    tile = choose_tile(16, False)

    def plan(B, T, D, backward=False):
        return choose_plan(Problem(B, T, 1, D, tile, 4, 4), backward, 16, H200)

    assert plan(16, 4096, 2048) == selective_plan.Plan(128, 32) and plan(16, 4096, 2048, True).stage == 16
    assert plan(2, 4096, 2048).threads < 128 and not plan(4, 4096, 2048).chunk
    for direction in (False, True):
        few = plan(1, 32_768, 64, direction)
        assert few.chunk and -(-32_768 // few.chunk) * 4 >= 0.9 * 8 * 132
    assert not plan(1, 100, 64).chunk


def test_constants_are_those_of_the_sources():
    source = compiler.read("selective_scan.cu")
    text = "\n".join(header for _, header in source.headers)
    for constant in (
        "kGroup = sizeof(S) * V * kStates > 32 ? 2 : 4;",
        f"kSlots = {selective_plan.SLOTS};",
        f"kWarp = {selective_plan.WARP};",
        f"kThreads = {selective_plan.MAX_THREADS},",
    ):
        assert constant in text
