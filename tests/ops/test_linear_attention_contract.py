"""Every op with a matrix state, wkv and the short convolution under the same properties: a new one is one more case."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from linrnn.ops import (
    NormalizedState,
    WKVState,
    causal_conv1d,
    delta_rule,
    linear_attention,
    reset_from_cu_seqlens,
    rwkv7,
    wkv,
)

H, K, V, D = 2, 3, 5, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """An op as a function of named tensors: sequences (B, T, ...), weights without time, and the parts of a state."""

    inputs: Callable[[int, int], dict[str, Tensor]]  # (B, T)
    state: Callable[[int], dict[str, Tensor]]  # (B)
    call: Callable[..., tuple[Tensor, tuple[Tensor, ...]]]  # (inputs, state or None, **options)
    fast: tuple[dict, ...]  # options of the ways to run that are compared with the reference
    slow: dict = dataclasses.field(default_factory=lambda: {"mode": "reference"})
    fixed: tuple[str, ...] = ()  # inputs without time


def normal(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def decay(*shape: int) -> Tensor:
    """Log decays of all sizes: from almost none to what leaves nothing."""
    return -torch.rand(shape, dtype=torch.float64) * 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-3, 1)


MODES = ({"chunk_size": 16}, {"chunk_size": 13}, {"chunk_size": 64}, {"mode": "parallel"}, {"mode": "recurrent"})


def attention(shape: str, **options) -> Case:
    """linear_attention with log decays of a shape."""
    normalized, logs = options.get("normalize", False), options.get("log_features", False)
    complex_ = options.pop("complex_", False)
    dtype = torch.complex128 if complex_ else torch.float64

    def inputs(B, T):
        q, k = normal(B, T, H, K, dtype=dtype), normal(B, T, H, K, dtype=dtype)
        if normalized:
            q, k = (3 * q, 3 * k) if logs else (q.square() + 0.1, k.square() + 0.1)
        found = {"q": q, "k": k, "v": normal(B, T, H, V, dtype=dtype)}
        sizes = {"H": (H,), "BTH": (B, T, H), "BTHK": (B, T, H, K)}
        if shape in sizes:
            g = decay(*sizes[shape])
            found["log_decay"] = torch.complex(g, normal(*g.shape)) if complex_ else g
        return found

    def state(B):
        parts = {"S": normal(B, H, K, V, dtype=dtype)}
        parts |= {"z": 1 + torch.rand(B, H, K, dtype=dtype)} if normalized else {}
        return parts | ({"m": normal(B, H, K)} if logs else {})

    def call(inputs, state, **more):
        if normalized and state is not None:
            state = NormalizedState(**state)
        elif state is not None:
            state = state["S"]
        o, final = linear_attention(initial_state=state, **inputs, **options, **more)
        return o, (final,) if isinstance(final, Tensor) else tuple(part for part in final if part is not None)

    return Case(inputs, state, call, MODES, fixed=("log_decay",) if shape == "H" else ())


def delta(shape: str) -> Case:
    def inputs(B, T):
        k = F.normalize(normal(B, T, H, K), dim=-1)
        found = {
            "q": normal(B, T, H, K),
            "k": k,
            "v": normal(B, T, H, V),
            "beta": 0.1 + 1.8 * torch.rand(B, T, H).double(),
        }
        sizes = {"H": (H,), "BTH": (B, T, H), "BTHK": (B, T, H, K)}
        return found | ({"log_decay": decay(*sizes[shape])} if shape in sizes else {})

    def call(inputs, state, **more):
        o, final = delta_rule(**inputs, initial_state=None if state is None else state["S"], **more)
        return o, (final,)

    return Case(inputs, lambda B: {"S": normal(B, H, K, V)}, call, MODES, fixed=("log_decay",) if shape == "H" else ())


def goose() -> Case:
    def inputs(B, T):
        kappa = F.normalize(normal(B, T, H, K), dim=-1)
        found = {name: normal(B, T, H, K) for name in "rk"} | {"v": normal(B, T, H, V)}
        return found | {"log_decay": decay(B, T, H, K), "a": -kappa, "b": kappa * torch.rand_like(kappa)}

    def call(inputs, state, **more):
        o, final = rwkv7(**inputs, initial_state=None if state is None else state["S"], **more)
        return o, (final,)

    return Case(inputs, lambda B: {"S": normal(B, H, K, V)}, call, MODES)


def token_mix(varying: bool, complex_: bool) -> Case:
    dtype = torch.complex128 if complex_ else torch.float64

    def inputs(B, T):
        w = decay(*((B, T, D) if varying else (D,)))
        w = torch.complex(w, normal(*w.shape)) if complex_ else w
        return {"k": 5 * normal(B, T, D), "v": normal(B, T, D, dtype=dtype), "w": w, "u": normal(D)}

    def call(inputs, state, **more):
        o, final = wkv(**inputs, initial_state=None if state is None else WKVState(**state), **more)
        return o, tuple(final)

    def state(B):
        return {"p": normal(B, D), "a": normal(B, D, dtype=dtype), "b": 1 + torch.rand(B, D, dtype=torch.float64)}

    fast = ({"backend": "torch"}, {"backend": "auto"})
    return Case(inputs, state, call, fast, {"backend": "reference"}, ("u",) if varying else ("u", "w"))


def convolution(W: int, activation: str | None) -> Case:
    def inputs(B, T):
        return {"x": normal(B, T, D), "weight": normal(D, W), "bias": normal(D)}

    def call(inputs, state, **more):
        o, final = causal_conv1d(
            **inputs, initial_state=None if state is None else state["state"], activation=activation, **more
        )
        return o, (final,)

    slow = {"backend": "reference"}
    return Case(inputs, lambda B: {"state": normal(B, W - 1, D)}, call, ({},), slow, ("weight", "bias"))


CASES = {
    "plain": attention(""),
    "retnet": attention("H"),
    "mamba2": attention("BTH"),
    "gla": attention("BTHK"),
    "complex": attention("BTH", complex_=True),
    "complex per channel": attention("BTHK", complex_=True),
    "normalized": attention("", normalize=True),
    "normalized, decayed": attention("BTH", normalize=True, eps=0.1),
    "exponential": attention("", normalize=True, log_features=True),
    "exponential, constant decay": attention("H", normalize=True, log_features=True),
    "exponential, decayed": attention("BTHK", normalize=True, log_features=True),
    "deltanet": delta(""),
    "constant gate deltanet": delta("H"),
    "gated deltanet": delta("BTH"),
    "channel gated deltanet": delta("BTHK"),
    "rwkv7": goose(),
    "rwkv4": token_mix(False, False),
    "rwkv4, w in time": token_mix(True, False),
    "complex rwkv4": token_mix(False, True),
    "conv": convolution(4, "silu"),
    "conv of 2": convolution(2, None),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FLAGS = pytest.mark.parametrize("flags", (0, 1, 2, 3), ids=("plain", "reset", "mask", "reset+mask"))


def options_of(flags: int, B: int, T: int) -> dict[str, Tensor]:
    found = {"reset": torch.rand(B, T) < 0.1, "mask": torch.rand(B, T) < 0.8}
    return {name: v for name, v, bit in zip(found, found.values(), (1, 2), strict=True) if flags & bit}


def run(case: Case, inputs: dict, state: dict | None, options: dict) -> list[Tensor]:
    """Outputs on real tokens and gradients, for cotangents that depend on the shapes alone."""
    leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
    initial = None if state is None else {name: v.detach().requires_grad_() for name, v in state.items()}
    o, final = case.call(leaves, initial, **options)
    every = [*leaves.values(), *(() if initial is None else initial.values())]
    nothing = 0 * sum(v.real.sum() for v in every)  # so that the outputs have a graph even where T = 0
    outs = [v + nothing.to(v.dtype) for v in (o, *final)]
    generator = torch.Generator().manual_seed(1)
    cotangents = []
    for v in outs:
        wide = torch.complex128 if v.is_complex() else torch.float64
        cotangents.append(torch.randn(v.shape, dtype=wide, generator=generator).to(v.dtype))
    grads = torch.autograd.grad(outs, every, cotangents, materialize_grads=True)
    return [v.detach() for v in outs] + list(grads)


def same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        bound = tolerance * max(1.0, y.abs().max().item() if y.numel() else 0.0)
        torch.testing.assert_close(x, y, rtol=0, atol=bound, msg=lambda m, i=i: f"result {i}: {m}")


@each_case
@FLAGS
def test_equals_the_loop(case, flags):
    """Outputs, final states and all gradients, of every mode and at chunk sizes that do not divide T."""
    for B, T, with_state in ((2, 1, True), (2, 37, True), (1, 70, False)):
        inputs, state = case.inputs(B, T), case.state(B) if with_state else None
        options = options_of(flags, B, T)
        wanted = run(case, inputs, state, options | case.slow)
        for fast in case.fast:
            same(run(case, inputs, state, options | fast), wanted)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(sorted(CASES)),
    B=st.integers(0, 3),
    T=st.integers(0, 40),
    flags=st.integers(0, 3),
    with_state=st.booleans(),
    way=st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_any_shape(name, B, T, flags, with_state, way, seed):
    torch.manual_seed(seed)
    case = CASES[name]
    inputs, state, options = case.inputs(B, T), case.state(B) if with_state else None, options_of(flags, B, T)
    fast = case.fast[way % len(case.fast)]
    if B and T:
        same(run(case, inputs, state, options | fast), run(case, inputs, state, options | case.slow))
    else:
        o, final = case.call(inputs, state, **options, **fast)
        assert o.shape[:2] == (B, T) and all(len(part) == B for part in final)
        if T == 0 and state is not None:
            assert all(torch.equal(x, y) for x, y in zip(final, state.values(), strict=True))


def part(case: Case, inputs: dict, rows: slice | Tensor, times: slice | Tensor) -> dict[str, Tensor]:
    return {name: v if name in case.fixed else v[rows][:, times] for name, v in inputs.items()}


@each_case
def test_pieces_with_a_carried_state_equal_the_whole(case):
    inputs, state = case.inputs(2, 45), case.state(2)
    for v in (*inputs.values(), *state.values()):
        v.requires_grad_()
    whole, whole_final = case.call(inputs, state, **case.fast[0])
    pieces, carried = [], state
    for begin, end in ((0, 0), (0, 20), (20, 21), (21, 45)):
        o, final = case.call(part(case, inputs, slice(None), slice(begin, end)), carried, **case.fast[0])
        carried = dict(zip(state, final, strict=True))
        pieces.append(o)
    together = torch.cat(pieces, 1)
    same([together, *carried.values()], [whole, *whole_final])
    every = [*inputs.values(), *state.values()]
    losses = [
        sum((v * v.conj()).real.sum() for v in outs) for outs in ((whole, *whole_final), (together, *carried.values()))
    ]
    wanted, got = (torch.autograd.grad(loss, every) for loss in losses)
    same(list(got), list(wanted))


@each_case
def test_packed_documents_equal_separate_runs(case):
    bounds = [0, 0, 1, 1, 30, 45]
    inputs = case.inputs(1, 45)
    packed, _ = case.call(inputs, None, reset=reset_from_cu_seqlens(torch.tensor(bounds), 45), **case.fast[0])
    for begin, end in itertools.pairwise(bounds):
        alone, _ = case.call(part(case, inputs, slice(None), slice(begin, end)), None, **case.slow)
        same([packed[:, begin:end]], [alone])


@each_case
def test_padding_is_invisible_whatever_stands_there(case):
    """Left, right and in between; NaN in a padded token reaches neither the real tokens nor a gradient."""
    inputs, state = case.inputs(4, 45), case.state(4)
    mask = torch.zeros(4, 45, dtype=torch.bool)
    mask[0, :30], mask[1, 13:], mask[2, 10:11], mask[3, ::3] = True, True, True, True
    dirty = {}
    for name, v in inputs.items():
        real = mask[(...,) + (None,) * (v.ndim - 2)] if name not in case.fixed else torch.ones(())
        dirty[name] = (v if name in case.fixed else torch.where(real, v, torch.nan)).requires_grad_()
    o, final = case.call(dirty, state, mask=mask, **case.fast[0])
    assert o.isfinite().all()
    loss = sum((v * v.conj()).real.sum() for v in (o[mask], *final))
    grads = dict(zip(dirty, torch.autograd.grad(loss, dirty.values()), strict=True))
    for b in range(4):
        row, real = slice(b, b + 1), mask[b]
        alone = {n: v.detach().requires_grad_() for n, v in part(case, inputs, row, real).items()}
        o_alone, final_alone = case.call(alone, {n: v[row] for n, v in state.items()}, **case.slow)
        same([o[row, real], *(v[row] for v in final)], [o_alone, *final_alone])
        loss = sum((v * v.conj()).real.sum() for v in (o_alone, *final_alone))
        for (name, _), grad in zip(alone.items(), torch.autograd.grad(loss, alone.values()), strict=True):
            if name not in case.fixed:
                same([grads[name][row, real]], [grad])
                assert (grads[name][b, ~real] == 0).all()


@each_case
@pytest.mark.parametrize("with_state", (False, True))
def test_a_row_of_padding_leaves_the_state(case, with_state):
    inputs, state = case.inputs(2, 9), case.state(2) if with_state else None
    mask = torch.zeros(2, 9, dtype=torch.bool)
    o, final = case.call(inputs, state, mask=mask, **case.fast[0])
    _, untouched = case.call(part(case, inputs, slice(None), slice(0, 0)), state, **case.fast[0])
    assert (o == 0).all() and all(torch.equal(x, y) for x, y in zip(final, untouched, strict=True))


SMALL = ("retnet", "mamba2", "gla", "complex per channel", "normalized, decayed", "exponential, decayed")
SMALL += ("gated deltanet", "channel gated deltanet", "rwkv7", "rwkv4", "complex rwkv4", "conv")


def flat(case: Case, B: int, T: int, **options) -> tuple[Callable, tuple[Tensor, ...]]:
    """The op as a function of tensors, and tensors for it."""
    inputs, state = case.inputs(B, T), case.state(B)

    def function(*tensors):
        values = dict(zip([*inputs, *state], tensors, strict=True))
        o, final = case.call({n: values[n] for n in inputs}, {n: values[n] for n in state}, **options)
        return o, *final

    return function, tuple(v.detach() for v in (*inputs.values(), *state.values()))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("flags", (0, 3))
def test_gradcheck_and_gradgradcheck(name, flags):
    options = {"reset": torch.tensor([[0, 0, 1, 0, 0]]).bool(), "mask": torch.tensor([[1, 1, 1, 0, 1]]).bool()}
    function, tensors = flat(CASES[name], 1, 5, **(options if flags else {}), **CASES[name].fast[0])
    tensors = tuple(v.requires_grad_() for v in tensors)
    assert gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("name", SMALL)
class TestTorchFunc:
    """Each transform against the same transform of the loop."""

    def losses(self, name):
        torch.manual_seed(1)
        fast, tensors = flat(CASES[name], 2, 9, **CASES[name].fast[0])
        torch.manual_seed(1)
        slow, _ = flat(CASES[name], 2, 9, **CASES[name].slow)
        return [lambda *x, f=f: sum((v * v.conj()).real.sum() for v in f(*x)) for f in (fast, slow)], tensors

    def test_grad_and_jvp(self, name):
        losses, tensors = self.losses(name)
        got, wanted = (torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors) for loss in losses)
        same(list(got), list(wanted))
        tangents = tuple(torch.randn_like(v) for v in tensors)
        got, wanted = (torch.func.jvp(loss, tensors, tangents)[1] for loss in losses)
        assert got.abs() > 1e-3  # not the silent zero of a missing formula
        same([got], [wanted])

    def test_vmap_and_per_sample_gradients(self, name):
        losses, tensors = self.losses(name)
        stacked = [torch.stack([v, v.roll(1, 0)]) for v in tensors[1:]]
        for transform in (lambda f: f, functools.partial(torch.func.grad, argnums=(0, 1, 2))):
            got, wanted = (
                torch.func.vmap(transform(f), (None, *[0] * len(stacked)))(tensors[0], *stacked) for f in losses
            )
            same(
                list(got) if isinstance(got, tuple) else [got], list(wanted) if isinstance(wanted, tuple) else [wanted]
            )


@pytest.mark.parametrize("name", ("retnet", "gla", "exponential, decayed", "gated deltanet", "rwkv7", "rwkv4", "conv"))
def test_compile_fullgraph(name):
    case = CASES[name]
    function, tensors = flat(case, 2, 11, **options_of(3, 2, 11), **({"chunk_size": 4} if case.fast is MODES else {}))
    tensors = tuple(v.requires_grad_() for v in tensors)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)
    got, wanted = ([*f(*tensors)] for f in (compiled, function))
    same(got, wanted)
    got, wanted = (torch.autograd.grad(sum(v.sum() for v in outs), tensors) for outs in (got, wanted))
    same(list(got), list(wanted))
    torch.compiler.reset()


@each_case
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_a_format_not_an_accumulator(case, dtype):
    """The error of the output is its own rounding; states are float32."""
    inputs, state = case.inputs(2, 300), case.state(2)
    if any(v.is_complex() for v in inputs.values()):
        pytest.skip("torch has no complex numbers of half precision that add up")
    keep = ("log_decay", "w", "u", "weight", "bias")
    half = {n: v.float() if n in keep else v.to(dtype) for n, v in inputs.items()}
    o, final = case.call(half, {n: v.float() for n, v in state.items()}, **case.fast[0])
    exact, exact_final = case.call(
        {n: v.double() for n, v in half.items()}, {n: v.float().double() for n, v in state.items()}, **case.slow
    )
    assert o.dtype == dtype and all(v.dtype == torch.float32 for v in final)
    float32_error = 1e-5 * exact.abs().max()
    assert ((o.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + float32_error).all()
    same([v.double() for v in final], list(exact_final), 1e-4)


@each_case
def test_float32_error_at_most_twice_the_loops(case):
    """Against float64, over several draws: the plain float32 loop sets the bound."""
    worst: dict = {}
    for seed in range(4):
        torch.manual_seed(seed)
        inputs, state = case.inputs(1, 500), case.state(1)
        narrow = lambda v: v.to(torch.complex64 if v.is_complex() else torch.float32)  # noqa: E731
        low = {n: narrow(v) for n, v in inputs.items()}, {n: narrow(v) for n, v in state.items()}
        wide = [
            {n: v.to(torch.complex128 if v.is_complex() else torch.float64) for n, v in part.items()} for part in low
        ]
        exact = run(case, *wide, case.fast[0])
        for way, options in (("fast", case.fast[0]), ("slow", case.slow)):
            for i, (got, wanted) in enumerate(zip(run(case, *low, options), exact, strict=True)):
                error = ((got - wanted).norm() / (wanted.norm() + 1e-30)).item()
                worst[way, i] = max(worst.get((way, i), 0.0), error)
    results = {i for _, i in worst}
    for i in results:
        assert worst["fast", i] <= 2 * worst["slow", i] + 16 * torch.finfo(torch.float32).eps, (i, worst)


@each_case
@pytest.mark.parametrize("T", (1, 5))
def test_nothing_given_or_returned_shares_memory(case, T):
    inputs, state = case.inputs(2, T), case.state(2)
    o, final = case.call(inputs, state, **case.fast[0])
    before = [v.clone() for v in (*state.values(), *inputs.values())]
    kept = [v.clone() for v in final]
    o.zero_()
    assert all(torch.equal(x, y) for x, y in zip(kept, final, strict=True))
    for v in final:
        v.zero_()
    assert all(torch.equal(x, y) for x, y in zip(before, (*state.values(), *inputs.values()), strict=True))


@each_case
def test_autocast_keeps_sums_in_float32(case):
    inputs, state = case.inputs(2, 40), case.state(2)
    narrow = lambda v: v.to(torch.complex64 if v.is_complex() else torch.float32)  # noqa: E731
    inputs, state = ({n: narrow(v) for n, v in part.items()} for part in (inputs, state))
    wanted = case.call(inputs, state, **case.fast[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.call(inputs, state, **case.fast[0])
    assert all(torch.equal(x, y) for x, y in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True))


@each_case
def test_meta_tensors_give_shapes(case):
    inputs, state = case.inputs(2, 20), case.state(2)
    o, final = case.call(inputs, state, **case.fast[0])
    meta = [{n: v.to("meta") for n, v in part.items()} for part in (inputs, state)]
    o_meta, final_meta = case.call(*meta, **case.fast[0])
    assert [v.shape for v in (o_meta, *final_meta)] == [v.shape for v in (o, *final)] and o_meta.is_meta


@pytest.mark.parametrize("name", ("rwkv4", "conv"))
def test_compile_of_a_second_length(name):
    """torch.compile then makes T a symbol, which no arithmetic of ours may stumble over."""
    functions = {}
    for T in (11, 21):
        function, tensors = flat(CASES[name], 2, T, **CASES[name].fast[0])
        compiled = functions.setdefault(name, torch.compile(function, fullgraph=True, backend="aot_eager"))
        same(list(compiled(*tensors)), list(function(*tensors)))
    torch.compiler.reset()
