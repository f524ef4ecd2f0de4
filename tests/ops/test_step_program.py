"""StepProgram: each operation against torch in float64, rows that do not see each other, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from linrnn.ops import WKVState, causal_conv1d, diagonal_step, selective_scan, step_program, wkv
from linrnn.ops._backend import choose
from linrnn.ops._running_max import nothing
from linrnn.ops.step_program import StepProgram

pytestmark = pytest.mark.skipif(choose("auto", torch.zeros(1), ("cpu",)) != "cpu", reason="needs the compiled kernels")
SIZES = (1, 7, 16, 63, 130)
EPS = torch.finfo(torch.float32).eps
ACTIVATIONS = {
    None: lambda v: v,
    "silu": F.silu,
    "gelu": lambda v: F.gelu(v, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "squared_relu": lambda v: v.relu().square(),
}


def state_of(program, B):
    return [torch.randn((B, *shape), dtype=dtype) for shape, dtype in program.leaves]


def wide(*tensors):
    return [t.to(torch.complex128 if t.is_complex() else torch.float64) for t in tensors]


def close(ours, wanted, bound=8 * EPS):
    """Within a few roundings of the largest number."""
    scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
    torch.testing.assert_close(ours, wanted.to(ours.dtype), rtol=0, atol=bound * scale)


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("N", SIZES)
def test_linear(D, N):
    weight, bias, gain = torch.randn(N, D) / D**0.5, torch.randn(N), torch.randn(N)
    x = torch.randn(4, D + N)
    program = StepProgram(D + N, N)
    held = program.linear(program.x.columns(0, D), weight)
    program.linear(
        program.x.columns(0, D), weight, bias, out=program.y, add=held, gain=gain, gained=program.x.columns(D, N)
    )
    y, after = program.function()(x, [])
    x, weight, bias, gain = wide(x, weight, bias, gain)
    close(y, 2 * x[:, :D] @ weight.T + bias + gain * x[:, D:])
    assert after == []


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("centred", (False, True))
def test_norm(D, centred):
    weight, bias, x = torch.randn(D), torch.randn(D), 5 + torch.randn(3, D)
    program = StepProgram(D, D)
    program.norm(program.x, weight, bias if centred else None, eps=1e-4, centred=centred, out=program.y)
    y, _ = program.function()(x, [])
    norm = F.layer_norm if centred else F.rms_norm
    args = (bias.double(),) if centred else ()
    close(y, norm(x.double(), (D,), weight.double(), *args, eps=1e-4), 64 * EPS)  # 5 - mean loses three bits


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize(("width", "bias", "activation"), ((1, True, None), (4, False, "silu"), (5, True, "silu")))
def test_conv(D, width, bias, activation):
    weight, b, x = torch.randn(D, width), torch.randn(D) if bias else None, torch.randn(3, D)
    program = StepProgram(D, D)
    program.gate(program.conv(program.x, weight, b, activation=activation), out=program.y, local=True)
    before = state_of(program, 3)
    y, (after,) = program.function()(x, before)
    b = None if b is None else b.double()
    wanted, state = causal_conv1d(
        x[:, None].double(), weight.double(), b, before[0].double(), activation=activation, backend="reference"
    )
    close(y, wanted[:, 0])
    close(after, state, 0)


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("N", (1, 8, 13, 16, 35))
def test_selective(D, N):
    A, skip = -torch.rand(D, N) * 8, torch.randn(D)
    x = torch.randn(3, 3 * D + 2 * N)
    x[:, D : 2 * D] *= 20  # softplus on both sides
    program = StepProgram(3 * D + 2 * N, D)
    u, dt, z = (program.x.columns(i * D, D) for i in range(3))
    B, C = (program.x.columns(3 * D + i * N, N) for i in range(2))
    program.gate(program.selective(u, dt, A, B, C, skip, z), out=program.y, local=True)
    before = state_of(program, 3)
    y, (after,) = program.function()(x, before)
    u, dt, z, B, C = x.double()[:, None].split((D, D, D, N, N), -1)
    wanted, state = selective_scan(
        u, dt, A.double(), B, C, skip.double(), z, before[0].double(), dt_softplus=True, backend="reference"
    )
    close(after, state, 16 * EPS)
    close(y, wanted[:, 0], 64 * EPS)


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.complex64))
def test_diagonal(N, dtype):
    a, gain = torch.rand(N, dtype=dtype), torch.rand(N)
    u = torch.randn(3, N, dtype=dtype)
    numbers = torch.view_as_real(u).flatten(1) if dtype.is_complex else u
    program = StepProgram(numbers.shape[1], numbers.shape[1])
    program.gate(program.diagonal(program.x, a, gain), out=program.y)
    before = state_of(program, 3)
    y, (after,) = program.function()(numbers, before)
    _, wanted = diagonal_step(*wide(a, gain * u, before[0]), backend="reference")
    close(after, wanted)
    assert torch.equal(y, torch.view_as_real(after).flatten(1) if dtype.is_complex else after)


@pytest.mark.parametrize(("H", "P", "N", "G"), ((1, 1, 1, 1), (6, 5, 7, 3), (4, 32, 16, 1)))
@pytest.mark.parametrize("limits", ((0.0, torch.inf), (0.5, 1.0)))
def test_heads(H, P, N, G, limits):
    A, D, bias = -torch.rand(H), torch.randn(H), torch.randn(H)
    x = torch.randn(3, H * P + H + 2 * G * N)
    program = StepProgram(x.shape[1], H * P)
    starts = (0, H * P, H * P + H, H * P + H + G * N)
    u, dt, B, C = (program.x.columns(s, n) for s, n in zip(starts, (H * P, H, G * N, G * N), strict=True))
    y = program.heads(u, dt, A, B, C, D, bias, n_groups=G, limits=limits)
    program.gate(y, out=program.y, local=True)
    before = state_of(program, 3)
    y, (after,) = program.function()(x, before)
    u, dt, B, C = x.double().split((H * P, H, G * N, G * N), 1)
    dt = F.softplus(dt + bias.double()).clamp(*limits)
    u, (B, C) = u.view(3, H, P), (v.view(3, G, N).repeat_interleave(H // G, 1) for v in (B, C))
    wanted = (dt * A.double()).exp()[..., None, None] * before[0].double() + torch.einsum("bh,bhn,bhp->bhnp", dt, B, u)
    close(after, wanted)
    close(y, (torch.einsum("bhn,bhnp->bhp", C, wanted) + D.double()[:, None] * u).flatten(1), 64 * EPS)


@pytest.mark.parametrize("N", SIZES)
def test_wkv(N):
    w, u, x = -torch.rand(N), torch.randn(N), 4 * torch.randn(3, 2 * N)
    program = StepProgram(2 * N, N)
    k, v = program.x.columns(0, N), program.x.columns(N, N)
    program.gate(program.wkv(k, v, w, u), out=program.y, local=True)
    for past in (wkv(x[:, None, :N], x[:, None, N:], w, u)[1], None):  # and the first token
        before = list(past or (torch.full((3, N), nothing(torch.float32)), torch.zeros(3, N), torch.zeros(3, N)))
        y, after = program.function()(x, before)
        k_t, v_t = x.double()[:, None].split(N, -1)
        state = WKVState(*wide(*before))
        wanted, last = wkv(k_t, v_t, w.double(), u.double(), state, backend="reference")
        close(y, wanted[:, 0], 32 * EPS)
        for ours, theirs in zip(after, last, strict=True):
            close(ours, theirs, 32 * EPS)


@pytest.mark.parametrize("D", SIZES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(D, activation):
    x = torch.cat((8 * torch.randn(3, D), torch.randn(3, 2 * D)), 1)
    program = StepProgram(3 * D, D)
    v, value, added = (program.x.columns(i * D, D) for i in range(3))
    program.gate(v, value, activation=activation, add=added, out=program.y)
    y, _ = program.function()(x, [])
    v, value, added = x.double().chunk(3, 1)
    close(y, ACTIVATIONS[activation](v) * value + added)


def test_shift():
    mixes, x = torch.rand(2, 21), torch.randn(3, 21)
    program = StepProgram(21, 42)
    for i, mixed in enumerate(program.shift(program.x, tuple(mixes))):
        program.gate(mixed, out=program.y.columns(21 * i, 21), local=True)
    before = state_of(program, 3)
    y, (after,) = program.function()(x, before)
    close(y, torch.cat([before[0] + mix * (x - before[0]) for mix in mixes], 1))
    assert torch.equal(after, x) and after is not x


def everything(D):
    """A program with every operation, of width D."""
    program = StepProgram(D, D)
    x = program.norm(program.x, None, eps=1e-6)
    x = program.conv(program.linear(x, torch.randn(D, D) / D**0.5), torch.randn(D, 3), None, local=True)
    x = program.selective(x, x, -torch.rand(D, 11), x.columns(0, 11), x.columns(1, 11), torch.randn(D), program.x)
    x = program.diagonal(program.linear(x, torch.randn(2 * D, D), unit=2), torch.rand(D) * (0.5 + 0.5j), torch.rand(D))
    x = program.rglru(program.linear(x, torch.randn(D, 2 * D) / D**0.5), program.x, program.x, -torch.rand(D))
    x = program.wkv(x, program.x, -torch.rand(D), torch.randn(D))
    x = program.heads(
        x, program.x, -torch.rand(1), x, program.x, torch.rand(1), torch.rand(1), n_groups=1, limits=(0.0, 1.0)
    )
    for mixed in program.shift(x, (torch.rand(D), torch.rand(D))):
        x = program.gate(mixed, x, activation="gelu")
    program.linear(x, torch.randn(D, D), out=program.y, add=program.x)
    return program


@pytest.mark.parametrize("threads", (1, 2, 3))
@pytest.mark.parametrize("D", (13, 64))
def test_a_row_does_not_see_the_others(D, threads, monkeypatch):
    """Bit for bit, whatever the batch and whatever its neighbours hold."""
    monkeypatch.setattr(step_program, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(step_program, "usable_cpus", lambda: threads)
    program = everything(D)
    call, x, states = program.function(), torch.randn(9, D), state_of(program, 9)
    torch.set_num_threads(threads)
    try:
        alone = [call(x[b : b + 1], [s[b : b + 1] for s in states]) for b in range(9)]
        for B in range(1, 10):
            y, after = call(x[:B], [s[:B] for s in states])
            for b in range(B):
                assert all(
                    torch.equal(u[b], v[0]) for u, v in zip((y, *after), (alone[b][0], *alone[b][1]), strict=True)
                )
        x[3], states[0][3] = torch.nan, torch.inf
        y, after = call(x, states)
        assert y[3].isnan().all()
        assert torch.equal(y[[0, 1, 2, 4, 8]], torch.cat([alone[b][0] for b in (0, 1, 2, 4, 8)]))
    finally:
        torch.set_num_threads(1)


def test_states_are_values_and_may_be_views():
    program = everything(13)
    call, x, states = program.function(), torch.randn(4, 13), state_of(program, 4)
    kept = [s.clone() for s in states]
    y, after = call(x, states)
    assert all(torch.equal(s, k) for s, k in zip(states, kept, strict=True))
    strided = [torch.stack((s, s), -1)[..., 0] for s in states]
    assert not all(s.is_contiguous() for s in strided)
    conjugate = [s.conj().resolve_conj().conj() if s.is_complex() else s for s in strided]
    other, after_views = call(torch.stack((x, x), -1)[..., 0], conjugate)
    assert torch.equal(y, other) and all(torch.equal(a, b) for a, b in zip(after, after_views, strict=True))


def test_a_batch_of_none():
    program = everything(13)
    y, after = program.function()(torch.randn(0, 13), state_of(program, 0))
    assert y.shape == (0, 13) and all(len(s) == 0 for s in after)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (lambda x, s: (x[:, 1:], s), r"x: expected float32 of shape \(batch, 13\)"),
        (lambda x, s: (x.double(), s), "x: expected float32"),
        (lambda x, s: (x, s[1:]), "state: expected 10 tensors, got 9"),
        (lambda x, s: (x, [s[0][:1], *s[1:]]), r"state: expected torch.float32 \(2, 2, 13\) on the CPU"),
        (lambda x, s: (x, [s[0].double(), *s[1:]]), "state: expected torch.float32"),
        (lambda x, s: (x, [s[0].to("meta"), *s[1:]]), "on meta"),
    ),
)
def test_what_would_read_past_the_end_is_refused(change, message):
    program = everything(13)
    with pytest.raises(ValueError, match=message):
        program.function()(*change(torch.randn(2, 13), state_of(program, 2)))


@pytest.mark.parametrize("D", (13, 64, 130))
def test_threads_share_the_work(D, monkeypatch):
    """Two or three threads compute what one does, each its channels."""
    program = everything(D)
    x, states = torch.randn(2, D), state_of(program, 2)
    y, after = program.function()(x, states)
    monkeypatch.setattr(step_program, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(step_program, "usable_cpus", lambda: 3)
    call = program.function()
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            other, after_threads = call(x, states)
        finally:
            torch.set_num_threads(1)
        close(other, y)
        for ours, wanted in zip(after_threads, after, strict=True):
            close(ours, wanted)


def test_weights_are_read_where_they_are():
    weight = torch.randn(5, 7)
    program = StepProgram(7, 5)
    program.linear(program.x, weight, out=program.y)
    call, x = program.function(), torch.randn(2, 7)
    call(x, [])
    weight.mul_(2)
    close(call(x, [])[0], x @ weight.T)


@pytest.mark.parametrize("default", ("float64", "bfloat16", "meta"))
def test_the_defaults_of_torch_do_not_matter(default):
    """Neither the dtype nor the device of new tensors: the outputs would lie elsewhere, or in too little room."""
    program, plain = StepProgram(13, 13), torch.get_default_dtype()
    A, D, x = -torch.rand(13, 3), torch.randn(13), torch.randn(2, 13)
    with torch.device("meta") if default == "meta" else torch.device("cpu"):
        torch.set_default_dtype(plain if default == "meta" else getattr(torch, default))
        try:
            u = program.selective(program.x, program.x, A, program.x, program.x, D, program.x)
            program.gate(u, out=program.y)
            y, _ = program.function()(x, [x.new_zeros(2, 13, 3)])
        finally:
            torch.set_default_dtype(plain)
    other = StepProgram(13, 13)
    other.gate(other.selective(other.x, other.x, A, other.x, other.x, D, other.x), out=other.y)
    assert y.dtype == x.dtype and torch.equal(y, other.function()(x, [x.new_zeros(2, 13, 3)])[0])


@pytest.mark.parametrize("move", (lambda w: w.share_memory_(), lambda w: w.untyped_storage().resize_(0)))
def test_weights_that_have_moved_are_noticed(move):
    weight = torch.randn(5, 7)
    program = StepProgram(7, 5)
    program.linear(program.x, weight, out=program.y)
    call, x = program.function(), torch.randn(2, 7)
    call(x, [])
    move(weight)
    with pytest.raises(RuntimeError, match="make the frozen step again"):
        call(x, [])


def test_no_more_threads_than_cpus(monkeypatch):
    """Threads that spin for one that has no core to run on wait for milliseconds."""
    seen = []
    monkeypatch.setattr(step_program, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(step_program, "run", lambda *args: seen.append(args[-1]))
    for cpus, threads in ((1, 2), (3, 2)):
        monkeypatch.setattr(step_program, "usable_cpus", lambda cpus=cpus: cpus)
        call = everything(13).function()
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        call(torch.randn(1, 13), state_of(everything(13), 1))
    assert seen == [1, 2]


@pytest.mark.parametrize("activation", ("sigmoid", "gelu", "silu"))
def test_what_overflows_has_a_limit(activation):
    """exp(x) becomes infinity, its inverse zero; NaN only where torch has it."""
    x = torch.tensor([[-torch.inf, -3e38, -1e13, -100.0, 100.0, 1e13, 3e38, torch.inf, torch.nan]])
    program = StepProgram(9, 9)
    program.gate(program.x, activation=activation, out=program.y)
    y, _ = program.function()(x, [])
    torch.testing.assert_close(y, ACTIVATIONS[activation](x), equal_nan=True)


@pytest.mark.parametrize("unit", (1, 2))
def test_products_that_any_thread_may_do_are_done_once(unit, monkeypatch):
    """Three threads on fewer cores help each other: every output is there and the same, step after step."""
    program = StepProgram(40, 40)
    x = program.x
    for _ in range(6):
        held = program.linear(x, torch.randn(600, 40) / 40**0.5, unit=unit)
        beside = program.linear(x, torch.randn(600, 40) / 40**0.5, unit=unit, local=True)
        x = program.linear(program.gate(held, beside), torch.randn(40, 600) / 600**0.5, add=program.x)
    program.linear(x, torch.randn(40, 40), out=program.y)
    x = torch.randn(3, 40)
    wanted, _ = program.function()(x, [])
    monkeypatch.setattr(step_program, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(step_program, "usable_cpus", lambda: 3)
    call = program.function()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(call(x, [])[0], wanted) for _ in range(50))
    finally:
        torch.set_num_threads(1)
