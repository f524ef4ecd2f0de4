"""The CUDA kernel of diagonal_step, on the CPU, against its torch form."""

import pytest
import torch

from linrnn.kernels import state_dtype
from linrnn.kernels.cuda.diagonal_scan import PAIRS
from linrnn.kernels.cuda.diagonal_step import _kernel, step
from linrnn.ops import diagonal_step


@pytest.fixture(autouse=True)
def forget_kernels():
    _kernel.cache_clear()
    yield
    _kernel.cache_clear()


def draw(shape, dtype):
    return torch.randn(shape, dtype=dtype if dtype.is_complex or dtype.itemsize > 2 else torch.float32).to(dtype)


@pytest.mark.parametrize("dtypes", PAIRS[::3], ids=str)
@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("per_sequence", (False, True))
def test_the_kernel_is_the_torch_form(host_cuda, dtypes, index_dtype, per_sequence):
    B, D, slots = 5, 67, 9
    a, x = draw((B, D) if per_sequence else (D,), dtypes[0]), draw((B, 2 * D), dtypes[1])[:, :D]
    pool = draw((slots, D), state_dtype(dtypes[1]))
    for index in (None, torch.tensor([3, -1, 8, 0, 5], dtype=index_dtype)):
        state = pool[:B].clone() if index is None else pool
        for wanted, got in zip(diagonal_step(a, x, state, index), step(a, x, state, index, None), strict=True):
            torch.testing.assert_close(got, wanted)
        wanted, got = state.clone(), state.clone()
        diagonal_step(a, x, state, index, out=wanted)
        step(a, x, got, index, got)
        torch.testing.assert_close(got, wanted)


def test_a_row_that_does_not_exist_gives_nan_and_touches_nothing(host_cuda):
    pool = torch.randn(4, 6)
    before = pool.clone()
    h, _ = step(torch.rand(6), torch.randn(2, 6), pool, torch.tensor([4, -2]), pool)
    assert h.isnan().all() and torch.equal(pool, before)
