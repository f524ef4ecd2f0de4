"""The append-only buffers of caches: what they hold is a concatenation, and older views never change."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from linrnn.decode.state import clone, select
from linrnn.layers import Attention
from linrnn.layers.append import append

pytestmark = pytest.mark.filterwarnings("error")


def storages(tensors: list[Tensor]) -> int:
    return len({t.untyped_storage().data_ptr() for t in tensors})


def test_chains_and_branches_are_concatenations() -> None:
    grown: list[tuple[Tensor, Tensor]] = []  # a view, and a copy of what it holds
    for step in range(200):
        new = torch.randn(2, int(torch.randint(0, 4, ())), 3, 5)
        # mostly on from the newest, sometimes from an older one
        past, held = (None, new[:, :0]) if not grown else grown[-1 if step % 5 else int(torch.randint(len(grown), ()))]
        grown.append((append(past, new), torch.cat((held, new), 1)))
    for view, held in grown:
        assert torch.equal(view, held)


def test_buffers_are_copied_seldom_and_are_not_much_too_large() -> None:
    views = [append(None, torch.randn(2, 1, 7))]
    for _ in range(2000):
        views.append(append(views[-1], torch.randn(2, 1, 7)))
    assert storages(views) < 20
    assert all(v.untyped_storage().nbytes() <= 1.5 * v.nbytes + 2 * 9 * 7 * 4 for v in views)


def test_second_to_append_copies() -> None:
    past = append(None, torch.randn(2, 5, 3))
    a, b = torch.randn(2, 2, 2, 3)
    one, other = append(past, a), append(past, b)
    assert storages([past, one]) == 1 and storages([past, other]) == 2
    assert torch.equal(one, torch.cat((past, a), 1)) and torch.equal(other, torch.cat((past, b), 1))
    assert storages([other, append(other, a)]) == 1  # and has room again


def test_windows_and_rows_of_a_buffer() -> None:
    past = append(None, torch.randn(3, 6, 2, 4))
    new = torch.randn(3, 1, 2, 4)
    for part, more in (
        (past[:, 2:], new),
        (past[1:2], new[1:2]),
        (past[::2], new[::2]),
        (past[:, :, 1:], new[:, :, 1:]),
    ):
        held = past.clone()
        assert torch.equal(append(part, more), torch.cat((part, more), 1))
        assert torch.equal(past, held)
    assert torch.equal(append(past[:, :3], new), torch.cat((past[:, :3], new), 1))
    assert torch.equal(append(past.transpose(2, 3), new.transpose(2, 3)), torch.cat((past, new), 1).transpose(2, 3))


def test_time_is_where_it_was() -> None:
    past, new = append(None, torch.randn(3, 3, 2)), torch.randn(3, 1, 2)
    held = past.clone()
    assert torch.equal(append(past.transpose(0, 1), new), torch.cat((held.transpose(0, 1), new), 1))
    assert torch.equal(append(past, new), torch.cat((held, new), 1))


def test_heads_lie_one_after_the_other() -> None:
    past = append(append(None, torch.randn(2, 3, 4, 5)), torch.randn(2, 1, 4, 5))
    assert past.stride()[1:] == (5, past.stride(0) // 4, 1)


def test_copies_have_no_room() -> None:
    past, new = append(None, torch.randn(2, 5, 3)), torch.randn(2, 1, 3)
    for other in (past.clone(), copy.deepcopy(past), past[[1, 0]], past.double(), past + 0):
        assert torch.equal(append(other, new), torch.cat((other.float(), new), 1))
        assert storages([other, append(other, new)]) == 2


def test_gradients_flow_and_buffers_leave_graphs_alone() -> None:
    past, new = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(append, (past.requires_grad_(), new.requires_grad_()))
    view, w = append(None, past.detach()), torch.randn(4, requires_grad=True, dtype=torch.float64)
    loss = (view * w).square().sum()  # keeps the view
    append(view, new.detach())
    loss.backward()  # raises if the view's version had moved
    assert w.grad is not None


def test_inference_mode_and_back() -> None:
    new = torch.randn(2, 1, 3)
    with torch.inference_mode():
        past = append(append(None, new), new)
    with torch.no_grad():
        assert torch.equal(append(past, new), torch.cat((new, new, new), 1))


def test_vmap() -> None:
    past, new = append(None, torch.randn(2, 5, 3)), torch.randn(4, 2, 1, 3)
    with torch.no_grad():
        got = torch.vmap(append, (None, 0))(past, new)
    assert torch.equal(got, torch.cat((past.expand(4, 2, 5, 3), new), 2))


def test_threads_that_share_a_past() -> None:
    start, n = threading.Barrier(8), 50
    pasts = [append(None, torch.randn(1, 4, 8)) for _ in range(n)]

    def run(seed: int) -> bool:
        start.wait()
        mine = torch.full((1, 1, 8), float(seed))
        return all(torch.equal(append(past, mine), torch.cat((past, mine), 1)) for past in pasts)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


@pytest.mark.parametrize("kwargs", [{}, {"window": 9}, {"window": 9, "sink": 2}])
def test_attention_goes_on_from_any_state(kwargs: dict[str, int]) -> None:
    layer = Attention(16, **kwargs).double()
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    with torch.no_grad():
        expected, states = layer(x)[0], [layer.init_state(2)]
        for t in range(40):
            y, state = layer.step(x[:, t], states[-1])
            torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
            states.append(state)
        for t in torch.randperm(39)[:12].tolist():  # rollback, and two futures
            for state in (states[t], clone(states[t]), select(states[t], [0, 1])):
                layer.step(torch.randn(2, 16, dtype=torch.float64), state)
                y, state = layer.step(x[:, t], state)
                torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(
                    layer.step(x[:, t + 1], state)[0], expected[:, t + 1], rtol=1e-12, atol=1e-12
                )
    if not kwargs:
        assert storages([state.k for state in states]) < 8


def test_attention_reads_the_cache_where_it_is() -> None:
    """A step allocates less than the cache once the buffer has room: nothing of it is copied."""
    from linrnn.decode.live import LiveBytes

    layer = Attention(64, n_heads=4)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 2000, 64))
        for x in torch.randn(20, 1, 64):
            with LiveBytes() as live:
                state = layer.step(x, state)[1]
            assert live.peak < state.k.nbytes / 4
