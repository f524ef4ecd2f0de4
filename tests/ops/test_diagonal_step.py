"""diagonal_step against diagonal_scan at length 1, rows of a pool against rows by hand, and its errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from linrnn.ops import diagonal_scan, diagonal_step

PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.complex64, torch.complex64),
    (torch.float32, torch.complex64),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.complex64, torch.float32),
)


def draw(shape, dtype):
    return torch.randn(shape, dtype=dtype if dtype.is_complex or dtype.itemsize > 2 else torch.float32).to(dtype)


def inputs(a_dtype, x_dtype, B=5, D=7, slots=9, per_sequence=False):
    common = torch.promote_types(a_dtype, x_dtype)
    state = draw((slots, D), torch.promote_types(common, torch.float32))
    return draw((B, D) if per_sequence else (D,), a_dtype), draw((B, D), x_dtype), state


@pytest.mark.parametrize("per_sequence", (False, True))
@pytest.mark.parametrize("dtypes", PAIRS)
def test_it_is_the_scan_of_one_token(dtypes, per_sequence):
    a, x, state = inputs(*dtypes, slots=5, per_sequence=per_sequence)
    h, after = diagonal_step(a, x, state)
    wanted, final_state = diagonal_scan(a[:, None] if per_sequence else a, x[:, None], state, backend="reference")
    assert h.dtype == wanted.dtype and after.dtype == final_state.dtype
    torch.testing.assert_close(after, final_state)
    torch.testing.assert_close(h, wanted[:, 0])


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
def test_rows_of_a_pool(index_dtype):
    a, x, pool = inputs(torch.float32, torch.float32)
    index = torch.tensor([3, -1, 8, 0, 5], dtype=index_dtype)
    before = pool.clone()
    h, after = diagonal_step(a, x, pool, index)
    assert torch.equal(pool, before)
    for b, slot in enumerate(index.tolist()):
        wanted = torch.zeros(7) if slot == -1 else a * pool[slot] + x[b]
        torch.testing.assert_close(h[b], wanted)
        torch.testing.assert_close(after[b], wanted)

    h_in_place, same = diagonal_step(a, x, pool, index, out=pool)
    assert same is pool and torch.equal(h_in_place, h)
    expected = before.clone()
    expected[[3, 8, 0, 5]] = after[[0, 2, 3, 4]]
    assert torch.equal(pool, expected)


def test_outputs_do_not_share_memory():
    a, x, state = inputs(torch.float32, torch.float32, slots=5)
    h, after = diagonal_step(a, x, state)
    kept = after.clone()
    h.zero_()
    assert torch.equal(after, kept)


def test_an_empty_place_reads_nothing_of_its_input():
    a, x, pool = inputs(torch.float32, torch.float32, B=1)
    h, after = diagonal_step(a, torch.full_like(x, float("nan")), pool, torch.tensor([-1]))
    assert torch.equal(h, torch.zeros(1, 7)) and torch.equal(after, torch.zeros(1, 7))


def test_gradients():
    a, x, state = (v.requires_grad_() for v in inputs(torch.float64, torch.complex128))
    index = torch.tensor([3, -1, 8, 0, 5])
    assert torch.autograd.gradcheck(lambda a, x, s: diagonal_step(a, x, s, index), (a, x, state))


def test_empty_batch():
    a, x, pool = inputs(torch.float32, torch.float32, B=0)
    h, after = diagonal_step(a, x, pool, torch.zeros(0, dtype=torch.long))
    assert h.shape == after.shape == (0, 7)


def test_compiles():
    a, x, pool = inputs(torch.float32, torch.float32)
    index = torch.tensor([3, -1, 8, 0, 5])
    compiled = torch.compile(diagonal_step, fullgraph=True)
    for got, wanted in zip(compiled(a, x, pool, index), diagonal_step(a, x, pool, index), strict=True):
        torch.testing.assert_close(got, wanted)


ERRORS = {
    "x must be (B, D)": {"x": torch.zeros(2, 3, 4)},
    "a must be (D,) or (B, D)": {"a": torch.zeros(5)},
    "state must be (2, 4)": {"state": torch.zeros(3, 4)},
    "state must be torch.float32": {"state": torch.zeros(2, 4, dtype=torch.float64)},
    "index must be int64 or int32 of shape (2,)": {"index": torch.zeros(3, dtype=torch.long)},
    "out must be a pool like state": {"out": torch.zeros(2, 5)},
    "out takes no gradient": {"x": torch.zeros(2, 4, requires_grad=True), "out": torch.zeros(2, 4)},
    "x must be floating point or complex": {"x": torch.zeros(2, 4, dtype=torch.long)},
    "state is on meta but x is on cpu": {"state": torch.zeros(2, 4, device="meta")},
    "backend must be one of": {"backend": "fast"},
    "backend='cpu' has no kernel for this op": {"backend": "cpu"},
    "backend='cuda' runs on CUDA tensors": {"backend": "cuda"},
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    arguments = {"a": torch.rand(4), "x": torch.zeros(2, 4), "state": torch.zeros(2, 4)} | ERRORS[message]
    with pytest.raises(ValueError) as error:
        diagonal_step(**arguments)
    assert message.replace("out takes", "out= takes") in str(error.value)


@pytest.mark.parametrize("row", (-2, 2))
def test_rows_that_do_not_exist(row):
    with pytest.raises(IndexError, match=rf"index must be in \[-1, 1\], got {row}"):
        diagonal_step(torch.rand(4), torch.zeros(1, 4), torch.zeros(2, 4), torch.tensor([row]))


def test_rows_that_do_not_exist_in_compiled_code():
    """Where nobody can look, what comes out is NaN, and no state is touched."""
    pool = torch.randn(2, 4)
    before = pool.clone()
    for row in (-2, 2):
        index = torch.tensor([row, 1])
        h, after = torch.compile(diagonal_step, fullgraph=True, backend="eager")(torch.rand(4), pool, pool, index)
        assert h[0].isnan().all() and after[0].isnan().all() and h[1].isfinite().all()
        with FakeTensorMode(allow_non_fake_inputs=True):
            diagonal_step(torch.rand(4), torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    assert torch.equal(pool, before)


def test_maps_over_rows():
    a, x, pool = inputs(torch.float32, torch.float32)
    rows = torch.tensor([[3, -1, 8, 0, 5], [1, 2, 3, 4, -1]])
    h, after = torch.func.vmap(lambda index: diagonal_step(a, x, pool, index))(rows)
    for one_h, one_after, index in zip(h, after, rows, strict=True):
        torch.testing.assert_close((one_h, one_after), diagonal_step(a, x, pool, index))


def test_arguments_that_are_no_tensors():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        diagonal_step(torch.rand(4), [0.0], torch.zeros(2, 4))
