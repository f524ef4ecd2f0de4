"""The CUDA kernel of the single decoding step, on the CPU through the same launcher, against its reference."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.kernels.cuda.diagonal_scan import PAIRS
from linrnn.kernels.cuda.diagonal_step import PROGRAMS, step
from linrnn.ops.diagonal_step import diagonal_step_reference

from .host import HostCuda, skip_without_compiler

FLOAT32 = (torch.float32,) * 2
SHAPES = ((5, 9, 7), (3, 3, 130), (1, 2, 1), (4, 300, 65))  # B, S, D


def make(pair, shape, a_ndim: int, index_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """a, x, a pool of states and rows of it in any order, one of them an empty place where there are several."""
    B, S, D = shape
    a = torch.randn((D,) if a_ndim == 1 else (B, D), dtype=pair[0])
    state = torch.randn(B if index_dtype is None else S, D, dtype=state_dtype(pair[1]))
    index = None if index_dtype is None else torch.randperm(S)[:B].to(index_dtype)
    if index is not None and B > 1:
        index[B // 2] = -1
    return a, torch.randn(B, D, dtype=pair[1]), state, index


def wide(v: Tensor) -> Tensor:
    return v.to(torch.complex128 if v.is_complex() else torch.float64)


def check(pair, shape, a_ndim: int, index_dtype: torch.dtype | None, out: str) -> None:
    """`out` is "none", "pool" or "same": a new tensor, another pool, or the pool itself takes the states."""
    a, x, state, index = make(pair, shape, a_ndim, index_dtype)
    exact = diagonal_step_reference(wide(a), wide(x), wide(state), None if index is None else index.long())
    before = state.clone()
    pool = {"none": None, "pool": torch.full_like(state, 7), "same": state}[out]
    others = None if pool is None else pool.clone()
    h, after = step(a, x, state, index, pool)
    assert h.dtype == x.dtype and after.dtype == state.dtype
    torch.testing.assert_close(h, exact.to(h.dtype))
    if pool is None:
        torch.testing.assert_close(after, exact.to(after.dtype))
        assert torch.equal(state, before)
        return
    assert after is pool and (out == "same" or torch.equal(state, before))
    rows = torch.arange(len(x)) if index is None else index.long()
    others[rows[rows >= 0]] = exact.to(after.dtype)[rows >= 0]
    torch.testing.assert_close(after, others)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_every_pair_of_dtypes(host_cuda, pair):
    for a_ndim, out in itertools.product((1, 2), ("none", "pool", "same")):
        check(pair, SHAPES[0], a_ndim, torch.int64, out)


def test_every_kind_of_call(host_cuda):
    for shape, a_ndim, index, out in itertools.product(
        SHAPES, (1, 2), (None, torch.int32, torch.int64), ("none", "pool", "same")
    ):
        check(FLOAT32, shape, a_ndim, index, out)


def test_strided_tensors(host_cuda):
    """Rows of wider tensors, and columns that are not dense."""
    a, x, state, index = (torch.randn(5, 14), torch.randn(5, 14), torch.randn(9, 14), torch.randperm(18)[:10])
    index[index >= 9] = -1
    narrow = (a[:, 3:10], x[:, 2:9], state[:, 5:12], index[::2])
    apart = (a[:, ::2], x[:, ::2], state[:, ::2], index[::2])
    for strided in (narrow, apart):
        wanted = step(*(v.contiguous() for v in strided), None)
        for got, other in zip(step(*strided, None), wanted, strict=True):
            assert torch.equal(got, other)
    pool = torch.zeros(9, 14)
    h, _ = step(*narrow, pool[:, 1:8])
    taken = narrow[3][narrow[3] >= 0]
    assert torch.equal(pool[taken, 1:8], h[narrow[3] >= 0]) and (pool[:, (0, *range(8, 14))] == 0).all()


@pytest.mark.parametrize("row", (-2, 9, 2**40))
def test_a_row_that_does_not_exist_is_no_answer(host_cuda, row):
    """Its h is NaN, and no row of the pool is touched for it; the others are as ever."""
    a, x, state, _ = make(FLOAT32, (3, 9, 7), 2, torch.int64)
    index, pool = torch.tensor([4, row, 0]), torch.zeros_like(state)
    h, _ = step(a, x, state, index, pool)
    assert h[1].isnan().all() and torch.equal(pool[index[::2]], h[::2])
    assert (pool[torch.tensor([1, 2, 3, 5, 6, 7, 8])] == 0).all()
    _, after = step(a, x, state, index, None)
    assert after[1].isnan().all() and torch.equal(after[::2], h[::2])


@pytest.mark.parametrize("shape", ((0, 4, 3), (2, 4, 0)))
def test_nothing_to_step(host_cuda, shape):
    a, x, state, index = make(FLOAT32, shape, 1, torch.int64)
    h, after = step(a, x, state, index, None)
    assert h.shape == after.shape == x.shape and not host_cuda.launches


def test_rows_beyond_32_bits(host_cuda, tmp_path):
    """Pools whose rows are more than 2^31 elements apart, in a sparse file."""
    D, far = 10, 2**30 + 2
    a, x, state, index = make(FLOAT32, (3, 4, D), 1, torch.int64)
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=3 * far + 64, dtype=torch.float32)
    wanted = step(a, x, state, index, None)
    pool = file.as_strided(state.shape, (far, 1)).copy_(state)
    for one, other in zip(step(a, x, pool, index, None), wanted, strict=True):
        assert torch.equal(one, other)
    h, _ = step(a, x, pool, index, pool)
    assert torch.equal(h, wanted[0]) and torch.equal(pool[index[0]], wanted[1][0])


def test_only_listed_programs_are_asked_for(host_cuda):
    test_every_kind_of_call(host_cuda)
    assert set(host_cuda.programs) <= set(PROGRAMS)


def test_no_races(host_folder: Path):
    """Also where the new states take the place of the old ones."""
    skip_without_compiler()
    with HostCuda("races", host_folder).installed():
        for index, out in itertools.product((None, torch.int64), ("none", "pool", "same")):
            check(FLOAT32, (4, 300, 130), 2, index, out)
        a, x, state, index = make(FLOAT32, (3, 9, 7), 1, torch.int64)
        with pytest.raises(RuntimeError, match="global memory"):  # a row that comes twice is a race, and is seen
            step(a, x, state, index.fill_(2), state)
