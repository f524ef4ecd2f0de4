"""softmax_scan against the recurrence as a loop and against softmax over all pairs: every backend and option."""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import BackendUnavailable, SoftmaxState, _softmax_scan, _softmax_torch, softmax_merge, softmax_scan

FAST = ("torch", "cpu")
NAMES = ("logits", "v", "m", "z", "y")


def make(B=2, T=63, H=3, V=5, *, size=1.0, dtype=torch.float64, flags=0, state=True) -> tuple[list[Tensor], dict]:
    """Logits, v and the fields of a state, and the options beside them."""
    inputs = [size * torch.randn(B, T, H), torch.randn(B, T, H, V)]
    if state:
        inputs += [torch.randn(B, H), 0.1 + torch.rand(B, H), torch.randn(B, H, V)]
    options = {}
    if flags & 1:
        options["reset"] = torch.rand(B, T) < 0.1
    if flags & 2:
        options["mask"] = torch.rand(B, T) < 0.8
    return [x.to(dtype) for x in inputs], options


def call(inputs, options, backend="auto") -> tuple[Tensor, ...]:
    logits, v, *state = inputs
    o, final = softmax_scan(logits, v, SoftmaxState(*state) if state else None, **options, backend=backend)
    return o, *final


def run(backend: str, inputs: list[Tensor], options: dict) -> list[Tensor]:
    """Outputs, and the gradients of everything for fixed cotangents of all four."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = call(inputs, options, backend)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x) for x in outs]
    pairs = [(x, g) for x, g in zip(outs, cotangents, strict=True) if x.requires_grad]
    assert pairs or not outs[0].numel()  # the loop over no tokens has no graph
    grads = torch.autograd.grad([x for x, _ in pairs], inputs, [g for _, g in pairs], materialize_grads=True)
    return [x.detach() for x in (*outs, *grads)]


def assert_equals_the_loop(backend: str, inputs: list[Tensor], options: dict) -> None:
    for got, wanted in zip(run(backend, inputs, options), run("reference", inputs, options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def softmax_over_the_past(logits: Tensor, v: Tensor, options: dict) -> Tensor:
    """The formula, all pairs at once; a row that sees nothing is zero."""
    B, T = logits.shape[:2]
    reset, mask = options.get("reset", torch.zeros(B, T, dtype=torch.bool)), options.get("mask")
    seen = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
    document = reset.cumsum(1)
    if options.get("reverse"):
        seen, document = seen.mT, reset.flip(1).cumsum(1).flip(1)
    seen = seen & (document[:, :, None] == document[:, None])
    if mask is not None:
        seen = seen & mask[:, None] & mask[:, :, None]
    scores = logits.mT[:, :, None].masked_fill(~seen[:, None], -torch.inf)  # (B, H, T, T)
    return torch.einsum("bhts,bshv->bthv", scores.softmax(-1).nan_to_num(), v)


@pytest.mark.parametrize("backend", ("reference", *FAST))
@pytest.mark.parametrize("flags", (0, 3))
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize(
    ("dtype", "size", "tolerance"),
    ((torch.float64, 1.0, 1e-13), (torch.float64, 1e4, 1e-13), (torch.float32, 1.0, 1e-5), (torch.float32, 1e4, 1e-5)),
)
def test_is_attention_of_a_shared_query(backend, flags, reverse, dtype, size, tolerance):
    (logits, v), options = make(T=130, size=size, flags=flags, state=False)
    logits = logits.to(dtype)
    wanted = softmax_over_the_past(logits.double(), v, options | {"reverse": reverse})
    o, state = softmax_scan(logits, v.to(dtype), **options, reverse=reverse, backend=backend)
    torch.testing.assert_close(o, wanted.to(dtype), rtol=tolerance, atol=tolerance)
    if not flags:
        last = 0 if reverse else -1
        torch.testing.assert_close(state.y / state.z[..., None], o[:, last], rtol=1e-5, atol=1e-6)
        assert torch.equal(state.m, logits.amax(1))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))
@pytest.mark.parametrize("size", (1.0, 1e4))
@pytest.mark.parametrize("shape", ((2, 1, 1, 1), (3, 63, 4, 16), (1, 130, 3, 33)))
def test_equals_the_loop(backend, flags, size, shape, monkeypatch):
    monkeypatch.setattr(_softmax_torch, "PIECE", 1000)  # the torch form in many pieces
    assert_equals_the_loop(backend, *make(*shape, size=size, flags=flags))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 70), st.integers(0, 4), st.integers(0, 18)),
    size=st.sampled_from((0.1, 1.0, 30.0, 1e4)),
    flags=st.integers(0, 3),
    backend=st.sampled_from(FAST),
    weightless=st.sampled_from((0.0, 0.3, 0.95)),
    state=st.booleans(),
    reverse=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, size, flags, backend, weightless, state, reverse, strided, seed):
    torch.manual_seed(seed)
    inputs, options = make(*shape, size=size, flags=flags, state=state)
    inputs[0][torch.rand(inputs[0].shape) < weightless] = -torch.inf
    if strided:  # heads before time in memory, and a batch that is broadcast
        inputs[0] = inputs[0].mT.contiguous().mT
        inputs[1] = inputs[1][:1].transpose(1, 2).contiguous().transpose(1, 2).expand(shape)
    assert_equals_the_loop(backend, inputs, options | {"reverse": reverse})


@pytest.mark.parametrize("backend", ("reference", *FAST))
def test_tokens_of_no_weight(backend):
    """Logits of -inf: the output is the mean of the others, or 0 while there are none, and no gradient is NaN."""
    (logits, v), _ = make(1, 40, 2, 3, state=False)
    logits[:, ::3] = -torch.inf
    logits[:, :10, 0] = -torch.inf
    o, *_ = call((logits, v), {}, backend)
    assert (o[:, :10, 0] == 0).all()
    torch.testing.assert_close(o[:, 10, 0], v[:, 10, 0])
    kept = [t for t in range(40) if t % 3]
    torch.testing.assert_close(o[:, kept, 1], call((logits[:, kept], v[:, kept]), {}, backend)[0][:, :, 1])
    for gradient in run(backend, [logits, v], {})[4:]:
        assert gradient.isfinite().all() and (gradient[:, ::3] == 0).all() and (gradient[:, :10, 0] == 0).all()
    nothing = call((torch.full_like(logits, -torch.inf), v), {}, backend)
    assert (nothing[0] == 0).all() and (nothing[2] == 0).all() and nothing[1].isfinite().all()
    assert all((g == 0).all() for g in run(backend, [torch.full_like(logits, -torch.inf), v], {})[4:])


def test_merging_is_associative_and_gives_the_scan():
    """States of stretches merged in any order are the state of the whole; the first may be that of no past."""
    (logits, v), _ = make(T=37, size=50.0, state=False)
    tokens = [SoftmaxState(logits[:, t], torch.ones_like(logits[:, t]), v[:, t]) for t in range(37)]
    _, whole = softmax_scan(logits, v)
    left = functools.reduce(softmax_merge, tokens)
    right = functools.reduce(lambda later, earlier: softmax_merge(earlier, later), reversed(tokens))
    _, empty = softmax_scan(logits[:, :0], v[:, :0])
    halves = [softmax_scan(logits[:, part], v[:, part])[1] for part in (slice(20), slice(20, None))]
    for state in (left, right, softmax_merge(empty, softmax_merge(*halves))):
        torch.testing.assert_close(state, whole)


def test_a_constant_added_to_the_logits_changes_nothing_but_m():
    inputs, options = make(flags=3)
    o, m, z, y = call(inputs, options)
    inputs[0], inputs[2] = inputs[0] + 40, inputs[2] + 40
    shifted = call(inputs, options)
    torch.testing.assert_close(shifted, (o, shifted[1], z, y))
    recent = m > -1e300  # where a reset has left nothing, m is that of nothing
    torch.testing.assert_close(shifted[1][recent], m[recent] + 40)


@pytest.mark.parametrize("backend", FAST)
def test_float32_is_as_exact_as_the_plain_loop(backend):
    """At most twice the error of the loop in float32, against float64."""
    inputs, options = make(2, 500, 3, 8, flags=3)
    exact, narrow = run("reference", inputs, options), [x.float() for x in inputs]
    loop = run("reference", narrow, options)
    for got, plain, wanted in zip(run(backend, narrow, options), loop, exact, strict=True):
        bound = 2 * (plain - wanted).abs().max() + 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert (got - wanted).abs().max() <= bound


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("size", (0.0, 60.0))
def test_a_hundred_thousand_tokens(backend, size):
    """The mean of a constant is itself; outputs, states and gradients are finite."""
    (logits, v), _ = make(1, 100_000, 2, 3, size=size, dtype=torch.float32, state=False)
    got = run(backend, [logits, torch.full_like(v, 0.7)], {})
    # the kernel sums in double; in float32 every addition may round the same way
    tolerance = 1e-6 if backend == "cpu" else 100_000 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(got[0], torch.full_like(v, 0.7), rtol=tolerance, atol=0)
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_storage(dtype):
    """Sums are float32: what comes out is the float32 result, rounded once. Logits may stay float32 beside half v."""
    inputs, options = make(2, 130, 3, 8, dtype=torch.float32, flags=3)
    inputs[1] = inputs[1].to(dtype)
    eps = torch.finfo(dtype).eps
    for backend, logits in itertools.product(("reference", *FAST), (inputs[0], inputs[0].to(dtype))):
        stored = [logits, *inputs[1:]]
        got, wide = (run(backend, x, options) for x in (stored, [x.float() for x in stored]))
        assert got[0].dtype == dtype and all(x.dtype == torch.float32 for x in got[1:4])
        assert torch.equal(got[0], wide[0].to(dtype)) and all(map(torch.equal, got[1:4], wide[1:4]))
        for gradient, other, x in zip(got[4:], wide[4:], stored, strict=True):
            assert gradient.dtype == x.dtype
            # the backward reads the rounded o
            assert (gradient - other).norm() <= 2 * eps * other.norm()
    wide = [inputs[0].double(), *inputs[1:]]
    assert [x.dtype for x in call(wide, options)] == [torch.float64] * 4


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("reverse", (False, True))
def test_nothing_reaches_over_a_reset_or_out_of_padding(backend, reverse):
    inputs, options = make(1, 90, 2, 5)
    options = {"reverse": reverse}
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, 89 - 40 if reverse else 40] = True
    clean = run(backend, inputs, options | {"reset": reset})
    for at, value in itertools.product((0, 1), (torch.nan, torch.inf)):
        broken = [x.clone() for x in inputs]
        broken[at][0, 89 - 7 if reverse else 7] = value
        got = run(backend, broken, options | {"reset": reset})
        later = [x.flip(1)[:, 40:] if reverse else x[:, 40:] for x in (got[0], clean[0], *got[4:6], *clean[4:6])]
        assert torch.equal(later[0], later[1]) and all(map(torch.equal, got[1:4], clean[1:4]))
        assert torch.equal(later[2], later[4]) and torch.equal(later[3], later[5])

    mask = torch.rand(1, 90) < 0.6
    clean = run(backend, inputs, options | {"mask": mask})
    broken = [
        *(torch.where(mask.view(1, 90, *(1,) * (x.ndim - 2)), x, torch.nan) for x in inputs[:2]),
        *inputs[2:],
    ]
    for got, wanted in zip(run(backend, broken, options | {"mask": mask}), clean, strict=True):
        assert torch.equal(got, wanted)
    assert (clean[0][~mask] == 0).all() and all((g[~mask] == 0).all() for g in clean[4:6])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("flags", (0, 3))
@pytest.mark.parametrize("state", (False, True))
def test_gradcheck_and_gradgradcheck(backend, flags, state):
    inputs, options = make(1, 5, 2, 2, state=state)
    if flags:
        options = {"reset": torch.tensor([[0, 0, 1, 0, 0]]) > 0, "mask": torch.tensor([[1, 1, 1, 0, 1]]) > 0}
    options["reverse"] = state != bool(flags)
    tensors = [x.requires_grad_() for x in inputs]
    assert gradcheck(lambda *x: call(x, options, backend), tensors)
    assert gradgradcheck(lambda *x: call(x, options, backend), tensors, fast_mode=True)


def test_only_one_input_or_output_is_asked_for():
    inputs, options = make(T=9, flags=3)
    for which, at in itertools.product(range(4), range(5)):
        grads = []
        for backend in ("reference", *FAST):
            tensors = [x.clone().requires_grad_(i == at) for i, x in enumerate(inputs)]
            out = call(tensors, options, backend)[which]
            if out.requires_grad:
                (grad,) = torch.autograd.grad(out.clamp(min=-9).square().sum(), tensors[at], materialize_grads=True)
                grads.append(grad)
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


def test_of_the_largest_logits_the_first_has_the_gradient():
    logits, v = torch.zeros(1, 6, 1, dtype=torch.float64), torch.randn(1, 6, 1, 2, dtype=torch.float64)
    for backend in ("reference", *FAST):

        def largest(l, backend=backend):
            return softmax_scan(l, v, backend=backend)[1].m.sum()

        l = logits.clone().requires_grad_()
        grads = [*(torch.autograd.grad(largest(l), l, create_graph=graph)[0] for graph in (False, True))]
        for grad in (*grads, torch.func.grad(largest)(logits)):
            assert grad.flatten().tolist() == [1, 0, 0, 0, 0, 0]


def test_torch_func():
    inputs, options = make(T=9, flags=1)

    def loss(backend, *tensors):
        o, _, z, y = call(tensors, options, backend)
        return o.sin().sum() + y.square().sum() + z.sum()

    tangents = tuple(torch.randn_like(x) for x in inputs)
    results = []
    for backend in ("reference", "auto"):
        grads = torch.func.grad(lambda *x, b=backend: loss(b, *x), argnums=(0, 1, 4))(*inputs)
        _, along = torch.func.jvp(lambda *x, b=backend: loss(b, *x), tuple(inputs), tangents)
        many = torch.func.vmap(lambda x, b=backend: loss(b, x, *inputs[1:]))(torch.stack((inputs[0], tangents[0])))
        results.append((*grads, along, many))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("flags", (0, 3))
def test_compiles_and_exports(flags):
    inputs, options = make(T=70, flags=flags)

    def outputs(function):
        tensors = [x.clone().requires_grad_() for x in inputs]
        outs = function(tensors, options)
        return *outs, *torch.autograd.grad(outs[0].sin().sum() + outs[3].sum(), tensors)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), outputs(call))

    class Module(torch.nn.Module):
        def forward(self, logits):
            return call((logits, *inputs[1:]), options)

    exported = torch.export.export(Module(), (inputs[0],)).module()
    torch.testing.assert_close(exported(inputs[0]), Module()(inputs[0]))


def test_operator_contract():
    """torch's own checks of the registration: fake tensors, autograd, dynamic shapes."""
    inputs, _ = make(T=9)
    flags = torch.zeros(2, 9, dtype=torch.uint8)
    for keep, arguments in ((False, inputs), (True, [x.clone().requires_grad_() for x in inputs])):
        torch.library.opcheck(_softmax_scan.scan_op, (*arguments, flags, False, keep, "auto"))


@pytest.mark.parametrize("count", (2, 3))
def test_the_number_of_threads_changes_no_bit(count):
    inputs, options = make(3, 100, 7, 16, dtype=torch.float32, flags=3)
    alone = run("cpu", inputs, options)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        together = run("cpu", inputs, options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(u, v) for u, v in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_what_is_kept_and_made(backend, monkeypatch):
    """Autograd keeps inputs, o, and two numbers a head and token; the torch form makes nothing of another size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(_softmax_torch, "PIECE", 1 << 12)
    inputs, _ = make(2, 512, 4, 16, dtype=torch.float32, state=False)
    size = inputs[1].numel()
    kept: dict[int, int] = {}

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            outs = out if isinstance(out, tuple) else (out,)
            Largest.numel = max([Largest.numel, *(x.numel() for x in outs if isinstance(x, Tensor))])
            return out

    def keep(x):
        kept[x.data_ptr()] = x.numel()
        return x

    logits, v = (x.requires_grad_() for x in inputs)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        o, _ = softmax_scan(logits, v, backend=backend)
    assert sum(kept.values()) <= 2 * size + 3 * size // 16 + 1000
    with Largest():
        o.sum().backward()
    assert Largest.numel <= size


L, V_ = torch.randn(2, 5, 3), torch.randn(2, 5, 3, 4)
STATE = SoftmaxState(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"logits": L[0]}, r"logits must be \(B, T, H\) .* got shape \(5, 3\)"),
        ({"logits": L.long()}, "logits must be floating point, got torch.int64"),
        ({"logits": L.cfloat()}, "logits must be floating point, got torch.complex64"),
        ({"v": V_[:, :, :2]}, r"v must be \(B, T, H, V\) = \(2, 5, 3, 4\), got shape \(2, 5, 2, 4\)"),
        ({"v": V_.cfloat()}, "v must be floating point, got torch.complex64"),
        ({"v": V_.to("meta")}, "v is on meta but the other inputs are on cpu"),
        (
            {"initial_state": STATE._replace(y=torch.zeros(2, 3, 5))},
            r"initial_state.y must be \(B, H, V\) = \(2, 3, 4\), got shape \(2, 3, 5\)",
        ),
        ({"initial_state": STATE._replace(z=STATE.z + 0j)}, "initial_state.z must be floating point"),
        ({"initial_state": STATE._replace(m=STATE.m.to("meta"))}, "initial_state.m is on meta"),
        ({"reset": torch.zeros(2, 5)}, r"reset must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"backend": "fast"}, "backend must be one of auto, reference, torch, cpu, cuda, triton, got 'fast'"),
        ({"backend": "triton"}, "backend='triton' has no kernel"),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        softmax_scan(**{"logits": L, "v": V_, **arguments})


def test_what_is_no_tensor_and_what_cannot_run_is_named():
    for name in ("logits", "v", "reset", "mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            softmax_scan(**{"logits": L, "v": V_, name: [1.0]})
    with pytest.raises(TypeError, match=r"initial_state must be a SoftmaxState \(m, z, y\), got Tensor"):
        softmax_scan(L, V_, STATE.y)
    with pytest.raises(TypeError, match=r"initial_state\.m must be a tensor, got list"):
        softmax_scan(L, V_, SoftmaxState([0.0], STATE.z, STATE.y))
    with pytest.raises(BackendUnavailable, match="backend='cuda'"):
        softmax_scan(L, V_, backend="cuda")
