"""The CUDA kernels and their loader on a GPU: every plan, layout and pair of dtypes, the step, and failed launches."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from linrnn.kernels import cuda, state_dtype
from linrnn.kernels.cuda.diagonal_scan import PAIRS, backward, forward
from linrnn.ops import diagonal_step

from .host_scans import LAYOUTS, OPTIONS, PLANS, Case, check, lay_out, make

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEP = ("diagonal_step.cu", ("LINRNN_A=float", "LINRNN_X=float", "LINRNN_INDEX=int"))


def run_on_gpu(case: Case) -> list[Tensor]:
    """h, the final state and the gradients of x, a and the initial state, from tensors in the layout of the case."""
    i, plan = make(case), PLANS[case.plan]

    def moved(v: Tensor | None, layout: str = "dense") -> Tensor | None:
        return None if v is None else lay_out(v.contiguous().to(DEVICE), layout)

    a, x, grad_h = (moved(v, case.layout) for v in (i.a, i.x, i.grad_h))
    state, flags, grad_final_state = (moved(v) for v in (i.state, i.flags, i.grad_final_state))
    assert a is not None and x is not None
    h, final_state = forward(a, x, state, flags, case.reverse, plan=plan)
    again = h if case.layout == "expanded" else lay_out(h, case.layout)
    grads = backward(a, again, state, flags, grad_h, grad_final_state, case.reverse, True, plan=plan)
    found = [h, final_state, grads[0], grads[1], grads[2]]
    torch.cuda.synchronize()
    return [v.cpu() for v in found if v is not None]


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing has written is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_pair_of_dtypes_in_every_plan(pair, plan):
    """With all that there is to choose beside, in turn; an even and an odd number of channels."""
    kinds = itertools.product((3, 1, 2), (False, True), OPTIONS)
    for n, (a_ndim, reverse, options) in enumerate(kinds):
        case = Case(pair, (2, 37, 10 + n % 2), a_ndim, plan, options, with_state=n % 3 > 0, reverse=reverse)
        check(case, run_on_gpu(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pair", (PAIRS[0], PAIRS[4], PAIRS[8]), ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_layout_of_the_inputs(layout, pair, plan):
    for shape, reverse in (((3, 37, 10), False), ((2, 64, 34), True)):
        case = Case(pair, shape, 3, plan, "reset+mask", True, reverse, layout)
        check(case, run_on_gpu(case))


@pytest.mark.parametrize("T", (1, 2, 7, 63, 64, 65, 300, 3000))
@pytest.mark.parametrize("D", (1, 3, 64, 130))
def test_every_length_and_width(T, D):
    for plan in PLANS:
        case = Case((torch.float32, torch.float32), (2, T, D), 1 + T % 3, plan, with_state=T % 2 == 0)
        check(case, run_on_gpu(case))


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_every_time(plan):
    case = Case((torch.float32, torch.float32), (3, 300, 130), 1, plan)
    first = run_on_gpu(case)
    for _ in range(5):
        for got, wanted in zip(run_on_gpu(case), first, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("per_sequence", (False, True))
def test_step(dtypes, per_sequence):
    """One decoding step on rows of a pool, -1 an empty place; against the torch form on the CPU."""
    B, D, slots = 5, 67, 9
    a, x, pool = (
        torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(dtype)
        for shape, dtype in (
            ((B, D) if per_sequence else (D,), dtypes[0]),
            ((B, D), dtypes[1]),
            ((slots, D), state_dtype(dtypes[1])),
        )
    )
    places = torch.tensor([3, -1, 8, 0, 5])
    for index in (None, places, places.int()):
        state = pool[:B].clone() if index is None else pool
        there = [None if v is None else v.to(DEVICE) for v in (a, x, state, index)]
        wanted, got = diagonal_step(a, x, state, index), diagonal_step(*there, backend="cuda")
        torch.testing.assert_close([v.cpu() for v in got], list(wanted))
        assert torch.equal(there[2].cpu(), state)  # without out= the pool is left alone
        wanted_pool = state.clone()
        diagonal_step(a, x, state, index, out=wanted_pool)
        diagonal_step(*there, out=there[2], backend="cuda")
        torch.testing.assert_close(there[2].cpu(), wanted_pool)


def test_a_step_with_a_row_that_does_not_exist_gives_nan_and_touches_nothing():
    pool = torch.randn(4, 6, device=DEVICE)
    before = pool.clone()
    index = torch.tensor([4, -2], device=DEVICE)
    h, _ = diagonal_step(torch.rand(6, device=DEVICE), torch.randn(2, 6, device=DEVICE), pool, index, out=pool)
    assert h.isnan().all() and torch.equal(pool, before)


def test_steps_in_a_graph():
    """A captured step is replayed on the states that the one before left, and on another list of rows."""
    a, x, pool = torch.rand(64, device=DEVICE), torch.randn(3, 64, device=DEVICE), torch.randn(8, 64, device=DEVICE)
    index = torch.tensor([7, 0, 2], device=DEVICE)
    expected = pool.clone()
    diagonal_step(a, x, pool.clone(), index, backend="cuda")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h, _ = diagonal_step(a, x, pool, index, out=pool, backend="cuda")
    for rows in ([7, 0, 2], [7, 0, 2], [1, -1, 3]):
        index.copy_(torch.tensor(rows))
        graph.replay()
        for b, row in enumerate(rows):
            if row >= 0:
                expected[row] = a * expected[row] + x[b]
                torch.testing.assert_close(h[b], expected[row])
    torch.testing.assert_close(pool, expected)


def test_properties_are_those_that_torch_reports():
    found, wanted = cuda.properties(0), torch.cuda.get_device_properties(0)
    assert found.name == wanted.name and found.capability == (wanted.major, wanted.minor)
    assert found.multiprocessors == wanted.multi_processor_count and found.l2_bytes == wanted.L2_cache_size
    assert found.shared_bytes_per_block >= 48 << 10
    assert cuda.unavailable(0) is None


def test_a_failed_launch_names_what_failed():
    kernel = cuda.program(*STEP, 0).kernel("diagonal_step")
    if kernel._argument_bytes is None:
        pytest.skip("the driver is older than CUDA 12.4 and cannot say how large a kernel's struct is")
    with pytest.raises(ValueError, match=r"diagonal_step takes a struct of 112 bytes, got 8"):
        kernel.launch(1, 32, 0, cuda.current_stream(0), bytes(8))
    with pytest.raises(cuda.CudaError, match=r"launching kernel diagonal_step of .*block=1024, shared_bytes=0 .*CUDA_"):
        kernel.launch(1, 1024, 0, cuda.current_stream(0), bytes(112))  # more threads than its launch bounds
    with pytest.raises(cuda.CudaError, match=r"finding kernel nothing in diagonal_step\.cu"):
        cuda.program(*STEP, 0).kernel("nothing")
    # and the context lives on
    torch.testing.assert_close(torch.ones(3, device=DEVICE).sum().item(), 3.0)


def test_diagnosis_says_yes():
    result = subprocess.run([sys.executable, "-P", "-m", "linrnn.kernels.cuda"], capture_output=True, text=True)
    assert result.returncode == 0 and "kernels run  yes" in result.stdout, result.stdout + result.stderr
