"""selective_scan against the recurrence written as a loop: every backend, dtype and option; what it costs and says."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import BackendUnavailable, _selective_scan, diagonal_scan, selective_scan

FAST = ("torch", "cpu")
SHAPES = ((2, 1, 3, 1, 1), (3, 63, 4, 16, 2), (1, 200, 33, 2, 1), (1, 70, 70, 3, 2), (1, 66, 40, 2, 20))
COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


def make(B=2, T=63, D=6, N=3, G=1, *, dtype=torch.float64, of_A="real", flags=0) -> tuple[dict, dict]:
    """All arguments that take gradients, and the options beside them."""
    states = COMPLEX[dtype] if of_A == "complex" else dtype
    A = -2 * torch.rand(D, N, dtype=dtype)
    inputs = {
        "x": torch.randn(B, T, D, dtype=dtype),
        "dt": torch.randn(B, T, D, dtype=dtype),
        "A": torch.complex(A, 3 * torch.randn(D, N, dtype=dtype)) if of_A == "complex" else A,
        "B": torch.randn(B, T, G, N, dtype=states),
        "C": torch.randn(B, T, G, N, dtype=states),
        "D": torch.randn(D, dtype=dtype),
        "z": torch.randn(B, T, D, dtype=dtype),
        "initial_state": torch.randn(B, D, N, dtype=states),
        "dt_bias": torch.randn(D, dtype=dtype),
    }
    options: dict = {"dt_softplus": True}
    if flags & 1:
        options["reset"] = torch.rand(B, T) < 0.1
    if flags & 2:
        options["mask"] = torch.rand(B, T) < 0.8
    return inputs, options


def run(backend: str, inputs: dict, options: dict) -> list[Tensor]:
    """Outputs, and the gradients of everything for fixed cotangents of both."""
    inputs = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    y, state = selective_scan(**inputs, **options, backend=backend)
    generator = torch.Generator().manual_seed(1)
    wide = torch.complex128 if state.is_complex() else torch.float64
    cotangents = [
        torch.randn(y.shape, dtype=torch.float64, generator=generator).to(y),
        torch.randn(state.shape, dtype=wide, generator=generator).to(state),
    ]
    pairs = [(v, g) for v, g in zip((y, state), cotangents, strict=True) if v.requires_grad]
    assert pairs or not y.numel()  # the loop over no tokens has no graph
    grads = torch.autograd.grad(
        [v for v, _ in pairs], list(inputs.values()), [g for _, g in pairs], materialize_grads=True
    )
    return [y.detach(), state.detach(), *grads]


def assert_equals_the_loop(backend: str, inputs: dict, options: dict) -> None:
    for got, wanted in zip(run(backend, inputs, options), run("reference", inputs, options), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("of_A", ("real", "complex"))
@pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))
@pytest.mark.parametrize(
    "shape", ((2, 1, 3, 1, 1), (3, 63, 4, 16, 2), (1, 200, 33, 2, 1), (1, 70, 70, 3, 2), (1, 66, 40, 2, 20))
)
def test_equals_the_loop(backend, of_A, flags, shape, monkeypatch):
    monkeypatch.setattr(_selective_scan, "PIECE", 1)  # the torch form in as many pieces as it can be
    assert_equals_the_loop(backend, *make(*shape, of_A=of_A, flags=flags))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 140), st.integers(1, 4), st.integers(1, 5)),
    G=st.sampled_from((1, 2, 3)),
    of_A=st.sampled_from(("real", "complex")),
    flags=st.integers(0, 3),
    backend=st.sampled_from(FAST),
    left_out=st.sets(st.sampled_from(("D", "z", "initial_state", "dt_bias"))),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape, G, of_A, flags, backend, left_out, strided, seed):
    torch.manual_seed(seed)
    B, T, D, N = shape
    inputs, options = make(B, T, D * G, N, G, of_A=of_A, flags=flags)
    if strided:  # time and channels swapped in memory, as in (B, D, T) models, and a batch that is broadcast
        inputs |= {name: inputs[name].mT.contiguous().mT for name in ("x", "dt", "z")}
        inputs["B"] = inputs["B"][:1].expand(B, T, G, N)
    assert_equals_the_loop(backend, {name: v for name, v in inputs.items() if name not in left_out}, options)


def test_groups_may_be_left_out():
    inputs, options = make()
    short = inputs | {"B": inputs["B"][:, :, 0], "C": inputs["C"][:, :, 0]}
    for got, wanted in zip(selective_scan(**short, **options), selective_scan(**inputs, **options), strict=True):
        assert torch.equal(got, wanted)


def test_is_a_diagonal_scan_of_all_states():
    """The definition written another way, with every state in memory; and S4D's discretisation where dt is constant."""
    inputs, _ = make()
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    dt = dt.abs()
    a, u = (dt[..., None] * A).exp(), dt[..., None] * x[..., None] * B
    h, last = diagonal_scan(a.flatten(2), u.flatten(2))
    y, state = selective_scan(x, dt, A, B, C)
    torch.testing.assert_close(y, (h.unflatten(2, (6, 3)) * C).sum(-1))
    torch.testing.assert_close(state, last.unflatten(1, (6, 3)))


@pytest.mark.parametrize("of_A", ("real", "complex"))
def test_float32_is_as_exact_as_the_plain_loop(of_A):
    """At most twice the error of the loop in float32, against float64; T = 1000, steps as small as Mamba's."""
    inputs, options = make(2, 1000, 8, 16, of_A=of_A)
    inputs["dt_bias"] -= 4
    exact = run("reference", inputs, options)
    narrow = {name: v.to({torch.complex128: torch.complex64}.get(v.dtype, torch.float32)) for name, v in inputs.items()}
    loop = run("reference", narrow, options)
    for backend in FAST:
        for got, plain, wanted in zip(run(backend, narrow, options), loop, exact, strict=True):
            bound = 2 * (plain - wanted).abs().max() + 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
            assert (got - wanted).abs().max() <= bound


def test_the_kernels_exponential():
    """Against float64 over the range, where it saturates, and on NaN: states after one token without input."""
    values = torch.cat((-torch.logspace(-8, 2.1, 4000), torch.tensor([0.0, 88.7, 89.0, 1e4, -1e4, torch.nan])))
    D = len(values)
    zero, one = torch.zeros(1, 1, D), torch.ones(1, 1, 1)
    _, state = selective_scan(zero, zero + 1, values[:, None], one, one, None, None, torch.ones(1, D, 1), backend="cpu")
    wanted = values.double().exp()
    tiny = torch.finfo(torch.float32).tiny
    normal = (wanted >= tiny) & (wanted < torch.inf)
    relative = ((state[0, :, 0].double() - wanted) / wanted)[normal & (values.abs() < 80)].abs()
    # rounding A in units of log 2 costs half a unit of the exponent, as the product dt A does in the plain form
    assert (relative <= 2e-7 * values.abs()[normal & (values.abs() < 80)].clamp(min=1)).all()
    assert (state[0, wanted < tiny, 0] <= 2 * tiny).all()
    assert state[0, -6:, 0].tolist()[0] == 1 and torch.isinf(state[0, -3, 0]) and torch.isnan(state[0, -1, 0])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_storage(dtype):
    """States and sums are float32: what comes out is the float32 result, rounded once."""
    inputs, options = make(2, 300, 4, 8, dtype=torch.float32)
    sequences = {name: inputs[name].to(dtype) for name in ("x", "dt", "B", "C", "z")}
    for backend in (*FAST, "reference"):
        y, state = selective_scan(**(inputs | sequences), **options, backend=backend)
        wide, wide_state = selective_scan(
            **(inputs | {k: v.float() for k, v in sequences.items()}), **options, backend=backend
        )
        assert y.dtype == dtype and state.dtype == torch.float32
        assert torch.equal(y, wide.to(dtype)) and torch.equal(state, wide_state)
        grads = run(backend, inputs | sequences, options)[2:]
        assert [g.dtype for g in grads] == [v.dtype for v in (inputs | sequences).values()]


@pytest.mark.parametrize("backend", FAST)
def test_nothing_reaches_over_a_reset_or_out_of_padding(backend):
    inputs, options = make(1, 90, 5, 4)
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, 40] = True
    clean = run(backend, inputs, options | {"reset": reset})
    broken = {name: v.clone() for name, v in inputs.items()}
    broken["x"][0, 7] = torch.nan
    got = run(backend, broken, options | {"reset": reset})
    assert torch.equal(got[0][:, 40:], clean[0][:, 40:]) and torch.equal(got[1], clean[1])
    assert got[2][:, 40:].isfinite().all() and got[0][:, 7:40].isnan().all()

    mask = torch.rand(1, 90) < 0.6
    clean = run(backend, inputs, options | {"mask": mask})
    for name in ("x", "dt", "B", "C", "z"):
        broken[name] = torch.where(mask.view(1, 90, *(1,) * (inputs[name].ndim - 2)), inputs[name], torch.nan)
    for got, wanted in zip(run(backend, broken, options | {"mask": mask}), clean, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("of_A", ("real", "complex"))
@pytest.mark.parametrize("flags", (0, 3))
def test_gradcheck_and_gradgradcheck(backend, of_A, flags):
    inputs, options = make(1, 4, 2, 2, of_A=of_A, flags=flags)
    tensors = [v.requires_grad_() for v in inputs.values()]

    def scan(*tensors):
        return selective_scan(**dict(zip(inputs, tensors, strict=True)), **options, backend=backend)

    assert gradcheck(scan, tensors)
    assert gradgradcheck(scan, tensors)


def test_only_one_input_or_output_is_asked_for():
    inputs, options = make()
    for which, name in itertools.product((0, 1), inputs):
        grads = []
        for backend in ("reference", *FAST):
            tensors = {key: v.clone().requires_grad_(key == name) for key, v in inputs.items()}
            out = selective_scan(**tensors, **options, backend=backend)[which]
            if out.requires_grad:
                grads.append(torch.autograd.grad(out.square().sum(), tensors[name], materialize_grads=True)[0])
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


def test_torch_func():
    inputs, options = make(T=9, flags=3)
    names = ("x", "A", "B")

    def loss(backend, x, A, B):
        y, state = selective_scan(**(inputs | {"x": x, "A": A, "B": B}), **options, backend=backend)
        return y.sin().sum() + state.square().sum()

    primals = tuple(inputs[name] for name in names)
    tangents = tuple(torch.randn_like(v) for v in primals)
    results = []
    for backend in ("reference", "auto"):
        grads = torch.func.grad(lambda *v, b=backend: loss(b, *v), argnums=(0, 1, 2))(*primals)
        _, along = torch.func.jvp(lambda *v, b=backend: loss(b, *v), primals, tangents)
        many = torch.func.vmap(lambda x, b=backend: loss(b, x, *primals[1:]))(torch.stack((primals[0], tangents[0])))
        results.append((*grads, along, many))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("flags", (0, 3))
def test_compiles_and_exports(flags):
    inputs, options = make(T=70, flags=flags)

    def outputs(function):
        tensors = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        y, state = function(**tensors, **options)
        return y, state, *torch.autograd.grad(y.sin().sum() + state.sum(), list(tensors.values()))

    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outputs(compiled), outputs(selective_scan))

    class Module(torch.nn.Module):
        def forward(self, x):
            return selective_scan(**(inputs | {"x": x}), **options)

    exported = torch.export.export(Module(), (inputs["x"],)).module()
    torch.testing.assert_close(exported(inputs["x"]), Module()(inputs["x"]))


@pytest.mark.parametrize("backend", FAST)
def test_compiles_with_inputs_in_any_layout(backend):
    """Gradients of x with time innermost come out as the operator promises, and are those of eager code."""
    inputs, options = make(T=70)
    inputs["x"] = inputs["x"].mT.contiguous().mT
    x = inputs["x"].requires_grad_()

    def loss(x):
        return selective_scan(**(inputs | {"x": x}), **options, backend=backend)[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(loss(x), x))


@pytest.mark.parametrize("backend", FAST)
def test_real_B_and_C_beside_a_complex_A(backend):
    """No warning of a discarded imaginary part, and real gradients."""
    inputs, options = make(of_A="complex")
    inputs |= {name: inputs[name].real.contiguous() for name in ("B", "C")}
    assert_equals_the_loop(backend, inputs, options)


def test_operator_contract():
    """torch's own checks of the registration: fake tensors, autograd, dynamic shapes."""
    inputs, _ = make(T=9)
    tensors = [inputs[name] for name in ("x", "dt", "A", "B", "C", "initial_state")]
    flags = torch.zeros(2, 9, dtype=torch.uint8)
    for keep, arguments in ((False, tensors), (True, [v.clone().requires_grad_() for v in tensors])):
        torch.library.opcheck(_selective_scan.scan_op, (*arguments, flags, 4, keep, "auto"))


@pytest.mark.parametrize("count", (2, 3))
def test_the_number_of_threads_changes_no_bit(count):
    inputs, options = make(3, 100, 70, 16, 2, dtype=torch.float32)
    alone = run("cpu", inputs, options)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        together = run("cpu", inputs, options)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(u, v) for u, v in zip(alone, together, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_nothing_of_the_size_of_all_states_is_stored(backend, monkeypatch):
    """What autograd keeps, and the largest tensor ever made, for N = 64 states a channel."""
    monkeypatch.setattr(_selective_scan, "PIECE", 1 << 16)
    from torch.utils._python_dispatch import TorchDispatchMode

    inputs, options = make(2, 512, 32, 64, dtype=torch.float32)
    states = 2 * 512 * 32 * 64
    kept: dict[int, int] = {}

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Largest.numel = max(
                [
                    Largest.numel,
                    *(v.numel() for v in (out if isinstance(out, tuple) else (out,)) if isinstance(v, Tensor)),
                ]
            )
            return out

    def keep(v):
        kept[v.data_ptr()] = v.numel()
        return v

    tensors = {name: v.requires_grad_() for name, v in inputs.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda v: v):
        y, _ = selective_scan(**tensors, **options, backend=backend)
    assert sum(kept.values()) < states / 3
    with Largest():
        y.sum().backward()
    assert Largest.numel < states / 3


X, A_, BC = torch.randn(2, 5, 4), -torch.rand(4, 3), torch.randn(2, 5, 1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"x": X[0]}, r"x must be \(B, T, D\) .* got shape \(5, 4\)"),
        ({"x": X.long()}, r"x must be floating point, got torch.int64"),
        ({"x": X.cfloat()}, r"x must be floating point, got torch.complex64"),
        ({"dt": X[:, :4]}, r"dt must be \(B, T, D\) = \(2, 5, 4\), got shape \(2, 4, 4\)"),
        ({"A": A_[:3]}, r"A must be \(D, N\) = \(4, 3\), got shape \(3, 3\)"),
        ({"A": A_[:, :0], "B": BC[..., :0], "C": BC[..., :0]}, r"A must be \(D, N\) with N of at least 1"),
        ({"B": BC[..., :2]}, r"B must be \(B, T, G, N\) = \(2, 5, 1, 3\), got shape \(2, 5, 1, 2\)"),
        ({"B": BC.cfloat()}, r"B must be floating point, got torch.complex64"),
        ({"C": BC.expand(2, 5, 2, 3)}, r"C must be \(B, T, G, N\) = \(2, 5, 1, 3\)"),
        ({"B": BC.expand(2, 5, 3, 3), "C": BC.expand(2, 5, 3, 3)}, r"number of groups that divides D = 4, got 3"),
        ({"D": torch.ones(3)}, r"D must be \(D\) = \(4,\), got shape \(3,\)"),
        ({"z": X[:1]}, r"z must be \(B, T, D\) = \(2, 5, 4\)"),
        ({"dt_bias": torch.ones(4, 1)}, r"dt_bias must be \(D\) = \(4,\), got shape \(4, 1\)"),
        ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state must be \(B, D, N\) = \(2, 4, 3\)"),
        (
            {"initial_state": torch.zeros(2, 4, 3).cfloat()},
            r"initial_state is torch.complex64, but the inputs are real",
        ),
        ({"reset": torch.zeros(2, 5)}, r"reset must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"A": A_.to("meta")}, r"A is on meta but the other inputs are on cpu"),
        ({"backend": "fast"}, r"backend must be one of auto, reference, torch, cpu, cuda, triton, got 'fast'"),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        selective_scan(**{"x": X, "dt": X.abs(), "A": A_, "B": BC, "C": BC, **arguments})


def test_what_is_no_tensor_and_what_cannot_run_is_named():
    given = {"x": X, "dt": X.abs(), "A": A_, "B": BC, "C": BC}
    for name in (*given, "D", "z", "initial_state", "dt_bias", "reset", "mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            selective_scan(**(given | {name: [1.0]}))
    with pytest.raises(BackendUnavailable, match="backend='cuda'"):
        selective_scan(**given, backend="cuda")
