"""Every registered layer under the same properties: a new layer gets them by registering."""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn import layers
from linrnn.decode.state import leaves, map_leaves, nbytes
from linrnn.layers import RecurrentLayer
from linrnn.models.optim import param_groups

D = 16
NAMES = layers.available()
# those that are built to look both ways have no causal form, and no state
CAUSAL = [n for n in NAMES if "bidirectional: bool = True" not in str(inspect.signature(layers.layer_class(n)))]
# every way of looking that a layer offers: (name, bidirectional)
WAYS = [(name, False) for name in CAUSAL] + [(name, True) for name in NAMES if "bidirectional" in layers.options(name)]
LOWERED = ("hgrn", "lru", "mamba")  # by inductor, a quarter of a minute each; the other layers when asked for
each_layer = pytest.mark.parametrize("name", NAMES)
each_causal = pytest.mark.parametrize("name", CAUSAL)
each_way = pytest.mark.parametrize(("name", "bidirectional"), WAYS)

Run = Callable[[Tensor, Any], tuple[Tensor, Any]]


def make(name: str, dtype: torch.dtype = torch.float64, **kwargs: Any) -> RecurrentLayer:
    return layers.build(name, d_model=D, **kwargs).to(dtype)


def make_way(name: str, bidirectional: bool) -> RecurrentLayer:
    return make(name, **({"bidirectional": True} if bidirectional else {}))


def some_state(layer: RecurrentLayer, batch: int) -> Any:
    """A state that the layer can be in, as leaves of a graph."""
    with torch.no_grad():
        _, state = layer(torch.randn(batch, 5, D, dtype=next(layer.parameters()).dtype))
    return map_leaves(lambda t: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t, state)


def differentiable(state: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(state) if leaf.requires_grad]


def everything(layer: RecurrentLayer, run: Run, x: Tensor, state: Any, real: Tensor | None) -> list[Tensor]:
    """Outputs (on real tokens), final state and what follows it, and the gradients of all these by all there is.

    `run` may return a list of final states, each of some rows of the batch.
    """
    x = x.detach().clone().requires_grad_()
    state = map_leaves(lambda t: t.detach().clone().requires_grad_(t.requires_grad), state)
    y, final = run(x, state)
    results = [y if real is None else torch.where(real[..., None], y, 0)]
    if layer.causal:
        finals = final if isinstance(final, list) else [final]
        probe = torch.linspace(-1, 1, 3 * D, dtype=x.dtype).view(1, 3, D)
        results.append(torch.cat([layer(probe.expand(len(next(leaves(f))), 3, D), f)[0] for f in finals]))
        if layer.state_size is not None:  # a growing cache may hold the same tokens in another order
            results += [torch.cat(parts) for parts in zip(*(list(leaves(f)) for f in finals), strict=True)]
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=x.dtype)
    for result in results:
        numbers = torch.view_as_real(result) if result.is_complex() else result
        loss = loss + (numbers * torch.randn(numbers.shape, generator=generator, dtype=numbers.dtype)).sum()
    sources = [x, *differentiable(state), *layer.parameters()]
    grads = torch.autograd.grad(loss, sources, allow_unused=True)
    return results + [torch.zeros_like(s) if g is None else g for s, g in zip(sources, grads, strict=True)]


def assert_same(
    layer: RecurrentLayer, run: Run, other: Run, x: Tensor, state: Any = None, real: Tensor | None = None
) -> None:
    ours, theirs = everything(layer, run, x, state, real), everything(layer, other, x, state, real)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9)


def row_of(state: Any, row: int) -> Any:
    return map_leaves(lambda t: t[row : row + 1], state)


def in_steps(layer: RecurrentLayer) -> Run:
    def run(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        ys = []
        for x_t in x.unbind(1):
            y_t, state = layer.step(x_t, state)
            ys.append(y_t)
        return torch.stack(ys, 1), state

    return run


def in_pieces(layer: RecurrentLayer, lengths: list[int]) -> Run:
    def run(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        ys = []
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state)
            ys.append(y)
        return torch.cat(ys, 1), state

    return run


# 1, 2: forward, steps and pieces


@each_causal
@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize("start", ["zero", "given"])
def test_forward_equals_steps(name: str, T: int, start: str) -> None:
    layer = make(name)
    state = layer.init_state(2) if start == "zero" else some_state(layer, 2)
    assert_same(layer, layer, in_steps(layer), torch.randn(2, T, D, dtype=torch.float64), state)


@each_causal
def test_no_state_is_the_zero_state(name: str) -> None:
    layer = make(name)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    assert_same(layer, layer, lambda x, _: layer(x, layer.init_state(2)), x)


@each_causal
@pytest.mark.parametrize("lengths", [[3, 4], [0, 7], [7, 0], [1, 0, 5, 1], [62, 1], [20, 0, 0, 43]])
def test_forward_equals_pieces(name: str, lengths: list[int]) -> None:
    layer = make(name)
    x = torch.randn(2, sum(lengths), D, dtype=torch.float64)
    assert_same(layer, layer, in_pieces(layer, lengths), x, some_state(layer, 2))
    assert_same(layer, layer, in_pieces(layer, lengths), x)


@each_causal
def test_forward_equals_random_pieces(name: str) -> None:
    layer = make(name)
    for _ in range(5):
        cuts = sorted(torch.randint(0, 64, (3,)).tolist())
        lengths = [b - a for a, b in zip([0, *cuts], [*cuts, 63], strict=True)]
        x = torch.randn(2, 63, D, dtype=torch.float64)
        assert_same(layer, layer, in_pieces(layer, lengths), x, some_state(layer, 2))


@each_causal
def test_states_are_values(name: str) -> None:
    layer = make(name)
    state = map_leaves(Tensor.detach, some_state(layer, 2))
    before = map_leaves(Tensor.clone, state)
    x_t = torch.randn(2, D, dtype=torch.float64)
    with torch.no_grad():
        first, _ = layer.step(x_t, state)
        layer(torch.randn(2, 7, D, dtype=torch.float64), state)
        again, _ = layer.step(x_t, state)
    assert torch.equal(first, again)
    for now, then in zip(leaves(state), leaves(before), strict=True):
        assert torch.equal(now, then)


# 3: causality


@each_causal
@pytest.mark.parametrize("t", [0, 3, 62])
def test_later_tokens_change_no_output(name: str, t: int) -> None:
    layer = make(name)
    x = torch.randn(2, 63, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, t:] += 1
    y, y_changed = layer(x)[0], layer(changed)[0]
    torch.testing.assert_close(y[:, :t], y_changed[:, :t], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(y[:, t], y_changed[:, t])


@each_way
def test_first_output_sees_the_last_token_only_if_bidirectional(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional)
    x = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0][:, 0].sum(), x)
    assert bool(grad[:, -1].abs().sum() > 0) == bidirectional


# 4: packed documents and padding


@each_way
@pytest.mark.parametrize("documents", [[[5, 1, 9], [14, 1]], [[1, 14], [15]], [[30, 33], [1, 62]]])
def test_packed_documents_equal_separate_runs(name: str, bidirectional: bool, documents: list[list[int]]) -> None:
    layer = make_way(name, bidirectional)
    T = sum(documents[0])
    reset = torch.zeros(2, T, dtype=torch.bool)
    for row, lengths in enumerate(documents):
        reset[row, [sum(lengths[:i]) for i in range(1, len(lengths))]] = True

    def apart(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        rows, finals = [], []
        for row, lengths in enumerate(documents):
            pieces = x[row : row + 1].split(lengths, 1)
            runs = [layer(piece, row_of(state, row) if i == 0 else None) for i, piece in enumerate(pieces)]
            rows.append(torch.cat([y for y, _ in runs], 1))
            finals.append(runs[-1][1])
        return torch.cat(rows), finals

    together = functools.partial(layer, reset=reset)
    x = torch.randn(2, T, D, dtype=torch.float64)
    assert_same(layer, together, apart, x)
    if not bidirectional:
        assert_same(layer, together, apart, x, some_state(layer, 2))


@each_causal
def test_reset_of_the_first_token_drops_the_state(name: str) -> None:
    layer = make(name)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    reset = torch.zeros(2, 7, dtype=torch.bool)
    reset[:, 0] = True
    state = some_state(layer, 2)
    assert_same(layer, functools.partial(layer, reset=reset), lambda x, _: layer(x), x, state)


def padding(kind: str, T: int) -> Tensor:
    time = torch.arange(T)
    lengths = torch.tensor([T, T // 2, 1, 0])[:, None]  # the last row is all padding
    if kind == "right":
        return time < lengths
    if kind == "left":
        return time >= T - lengths
    return torch.rand(4, T) < torch.tensor([1.0, 0.7, 0.2, 0.0])[:, None]


@each_way
@pytest.mark.parametrize("kind", ["right", "left", "ragged"])
@pytest.mark.parametrize("T", [7, 63])
def test_padding_changes_nothing(name: str, bidirectional: bool, kind: str, T: int) -> None:
    layer = make_way(name, bidirectional)
    mask = padding(kind, T)
    x = torch.randn(4, T, D, dtype=torch.float64)
    x = torch.where(mask[..., None], x, torch.nan)

    def alone(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, finals = torch.zeros_like(x), []
        for row in range(4):
            y_row, final = layer(x[row, mask[row]][None], row_of(state, row))
            y = y.index_put((torch.tensor(row), mask[row].nonzero()[:, 0]), y_row[0])
            finals.append(final)
        return y, finals

    padded = functools.partial(layer, mask=mask)
    assert_same(layer, padded, alone, x, real=mask)
    if not bidirectional:
        assert_same(layer, padded, alone, x, some_state(layer, 4), mask)


@each_way
def test_padding_inside_packed_documents(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional)
    T, first = 20, 11
    mask = torch.rand(2, T) < 0.7
    mask[:, first] = torch.tensor([True, False])  # a document may begin with padding
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[:, first] = True
    x = torch.randn(2, T, D, dtype=torch.float64)

    def apart(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y1, _ = layer(x[:, :first], state, mask=mask[:, :first])
        y2, final = layer(x[:, first:], None, mask=mask[:, first:])
        return torch.cat((y1, y2), 1), final

    together = functools.partial(layer, reset=reset, mask=mask)
    assert_same(layer, together, apart, x, None if bidirectional else some_state(layer, 2), mask)


@each_way
def test_all_true_mask_and_all_false_reset_change_nothing(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    mask, reset = torch.ones(2, 7, dtype=torch.bool), torch.zeros(2, 7, dtype=torch.bool)
    assert_same(layer, layer, functools.partial(layer, mask=mask, reset=reset), x)


# 5: precision


@each_way
def test_gradcheck(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional)
    x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    state = None if bidirectional else some_state(layer, 2)
    names, values = zip(*layer.named_parameters(), strict=True)
    initial = [] if state is None else differentiable(state)

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        given = iter(rest)
        start = map_leaves(lambda t: next(given) if t.requires_grad else t, state)
        parameters = dict(zip(names, given, strict=True))
        y, final = torch.func.functional_call(layer, parameters, (x, start))
        return (y, *(leaf for leaf in leaves(final) if leaf.requires_grad))

    assert torch.autograd.gradcheck(run, (x, *initial, *values), fast_mode=True)


# From x to y a layer rounds to its input's precision at most about ten times (weights, projections, states, output),
# each time by at most the unit roundoff u relative to numbers that pass to y with a gain of about one. Independent
# roundings add in the root mean square; adding them all up, 10 u, is a bound with room. A decay or a carry in bf16
# would miss it by far: at |λ| = 0.999 it is wrong by 100 %.
@each_way
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(name: str, bidirectional: bool, dtype: torch.dtype) -> None:
    layer = make_way(name, bidirectional).to(dtype)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 1000, D).to(dtype)
    with torch.no_grad():
        y, final = layer(x)
        expected, expected_final = exact(x.double())
    u = torch.finfo(dtype).eps / 2
    assert y.dtype == dtype
    assert relative_error(y, expected) < 10 * u
    if layer.state_size is not None:
        for ours, theirs in zip(leaves(final), leaves(expected_final), strict=True):
            assert ours.dtype in (torch.float32, torch.complex64)
            assert relative_error(ours, theirs) < 10 * u


def relative_error(x: Tensor, exact: Tensor) -> float:
    return ((x.to(exact.dtype) - exact).abs().pow(2).mean() / exact.abs().pow(2).mean()).sqrt().item()


@each_way
def test_float32_agrees_with_float64(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional).float()
    x = torch.randn(2, 1000, D)
    with torch.no_grad():
        error = relative_error(layer(x)[0], copy.deepcopy(layer).double()(x.double())[0])
    assert error < 100 * torch.finfo(torch.float32).eps


@each_way
def test_a_hundred_thousand_tokens(name: str, bidirectional: bool) -> None:
    layer = make(name, torch.float32, **({"bidirectional": True} if bidirectional else {}))
    if name in CAUSAL and make(name).state_size is None:
        pytest.skip("quadratic in T")
    with torch.no_grad():
        y, final = layer(torch.randn(1, 100_000, D))
    assert y.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in leaves(final))


# 6: torch's own machinery


def assert_compiled_same(layer: RecurrentLayer, backend: str, **kwargs: Any) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(2, 6, D, requires_grad=True)
    results = []
    for run in (layer, compiled):
        y, final = run(x, **kwargs)
        loss = y.square().sum() + sum(leaf.abs().square().sum() for leaf in differentiable(final))
        results.append([y, *leaves(final), *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        # sums round by what is large in them
        largest = max(1.0, *(t.abs().max().item() for t in (ours, theirs) if t.numel()))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * largest)


@each_way
@pytest.mark.parametrize("arguments", [set(), {"mask"}, {"mask", "reset", "state"}])
def test_traces_without_breaks(name: str, bidirectional: bool, arguments: set[str]) -> None:
    layer = make_way(name, bidirectional).float()
    flags = torch.arange(6) < torch.tensor([[6], [4]])
    kwargs = {"mask": flags, "reset": flags, "state": None if bidirectional else some_state(layer, 2)}
    torch._dynamo.reset()
    assert_compiled_same(layer, "aot_eager", **{k: v for k, v in kwargs.items() if k in arguments})


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # torch's own imports
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning")
@pytest.mark.filterwarnings("ignore:.torch._prims_common.check. is deprecated:FutureWarning")  # its own lowerings
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bidirectional"),
    [pytest.param(name, name not in CAUSAL, marks=() if name in LOWERED else pytest.mark.exhaustive) for name in NAMES],
)
def test_inductor(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional).float()
    assert_compiled_same(layer, "inductor", mask=torch.arange(6) < torch.tensor([[6], [4]]))


@each_way
def test_state_dict_and_deepcopy(name: str, bidirectional: bool) -> None:
    layer, other = make_way(name, bidirectional), make_way(name, bidirectional)
    x = torch.randn(2, 7, D, dtype=torch.float64)
    assert not torch.equal(layer(x)[0], other(x)[0])
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], other(x)[0])
    assert torch.equal(layer(x)[0], copy.deepcopy(layer)(x)[0])


@each_way
def test_autocast(name: str, bidirectional: bool) -> None:
    layer = make(name, torch.float32, **({"bidirectional": True} if bidirectional else {}))
    x = torch.randn(2, 63, D)
    expected, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
        if not bidirectional:
            half, state = layer(x[:, :30])
            rest, state = layer(x[:, 30:62], state)
            last, state = layer.step(x[:, 62], state)
            pieces = torch.cat((half, rest, last[:, None]), 1)
            assert relative_error(pieces, expected.detach()) < 10 * 2**-8
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in layer.parameters())
    assert relative_error(y.detach(), expected.detach()) < 10 * 2**-8


@each_way
@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 0), (3, 0), (0, 5)])
def test_small_shapes(name: str, bidirectional: bool, B: int, T: int) -> None:
    layer = make_way(name, bidirectional)
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    flags = torch.ones(B, T, dtype=torch.bool)
    state = None if bidirectional else some_state(layer, B)
    for kwargs in ({}, {"mask": flags}, {"reset": flags}, {"mask": flags, "reset": flags}):
        y, final = layer(x, state, **kwargs)
        assert y.shape == x.shape
        y.sum().backward()
        if T == 0 and not bidirectional:
            for ours, theirs in zip(leaves(final), leaves(state), strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.gpu
@each_way
def test_gpu_agrees_with_cpu(name: str, bidirectional: bool) -> None:
    layer = make_way(name, bidirectional).float()
    x, mask, reset = torch.randn(4, 63, D), padding("ragged", 63), torch.rand(4, 63) < 0.1
    for kwargs in ({}, {"mask": mask}, {"mask": mask, "reset": reset}):
        expected, _ = layer(x, **kwargs)
        layer.cuda()
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                y, _ = layer(x.cuda(), **{name: flags.cuda() for name, flags in kwargs.items()})
            assert y.isfinite().all()
            real = kwargs.get("mask", torch.ones_like(mask))
            assert relative_error(y.cpu()[real], expected[real]) < 20 * torch.finfo(dtype).eps
        layer.cpu()


# 7: memory


@each_causal
def test_state_memory(name: str) -> None:
    layer = make(name, torch.float32)
    state, sizes = None, []
    with torch.no_grad():
        for T in (1, 63, 1000):
            _, state = layer(torch.randn(2, T, D), state)
            sizes.append(nbytes(state))
            assert sum(leaf.untyped_storage().nbytes() for leaf in leaves(state)) <= max(2 * nbytes(state), 4096)
    if layer.state_size is None:
        assert sizes[0] < sizes[1] < sizes[2]
    else:
        assert sizes == [2 * 4 * layer.state_size] * 3 == [nbytes(layer.init_state(2))] * 3


# The interface


@each_layer
def test_built_from_d_model_alone(name: str) -> None:
    for d_model in (16, 48, 112, 208):
        layer = layers.build(name, d_model=d_model)
        assert layer(torch.randn(1, 2, d_model))[0].shape == (1, 2, d_model)


@each_layer
def test_constructor_takes_d_model_then_keywords(name: str) -> None:
    first, *rest = inspect.signature(layers.layer_class(name)).parameters.values()
    assert first.name == "d_model"
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in rest)


@each_layer
def test_optim_hints_name_parameters(name: str) -> None:
    layer = make(name)
    param_groups(layer, 1e-3, 0.1)  # asks every module inside, for its own parameters only
    own = dict(layer.named_parameters())
    for parameter, hint in layer.optim_hints().items():
        assert parameter in own
        assert set(hint) <= {"lr_scale", "weight_decay"}


@each_layer
def test_parameters_are_real(name: str) -> None:
    assert all(p.is_floating_point() for p in make(name).parameters())


@pytest.mark.parametrize("value", [0, -16, 1.5, "16", True])
@each_layer
def test_bad_d_model(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match="d_model"):
        layers.build(name, d_model=value)


def test_unknown_name_or_keyword() -> None:
    with pytest.raises(ValueError, match=r"'gru'.*expected one of.*lru"):
        layers.build("gru", d_model=D)
    with pytest.raises(ValueError, match=r"d_stat: unknown to 'lru'.*d_state"):
        layers.build("lru", d_model=D, d_stat=4)


@each_layer
@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (None, TypeError, "x: expected a floating point tensor"),
        (torch.zeros(2, 5, D, dtype=torch.int64), ValueError, "x: expected a floating point tensor"),
        (torch.zeros(2, 5, D, dtype=torch.float32), ValueError, "x: expected torch.float64"),
        (torch.zeros(5, D, dtype=torch.float64), ValueError, r"x: expected shape \(batch, time, 16\), got \(5, 16\)"),
        (torch.zeros(2, 5, 8, dtype=torch.float64), ValueError, r"x: expected shape .* got \(2, 5, 8\)"),
    ],
)
def test_bad_x(name: str, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name)(x)


@each_layer
@pytest.mark.parametrize("argument", ["reset", "mask"])
def test_bad_flags(name: str, argument: str) -> None:
    layer, x = make(name), torch.zeros(2, 5, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"{argument}: expected a bool tensor, got torch.int64"):
        layer(x, **{argument: torch.ones(2, 5, dtype=torch.int64)})
    with pytest.raises(TypeError, match=f"{argument}: expected a bool tensor, got list"):
        layer(x, **{argument: [True]})
    with pytest.raises(ValueError, match=rf"{argument}: expected shape \(2, 5\), got \(5,\)"):
        layer(x, **{argument: torch.ones(5, dtype=torch.bool)})


@each_causal
def test_another_device(name: str) -> None:
    layer, x = make(name), torch.zeros(2, 5, D, dtype=torch.float64)
    flags = torch.ones(2, 5, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="x: expected a tensor on cpu like the parameters, got one on meta"):
        layer(x.to("meta"))
    with pytest.raises(ValueError, match="mask: expected a tensor on cpu"):
        layer(x, mask=flags)
    with pytest.raises(ValueError, match="state: expected a tensor on cpu"):
        layer(x, map_leaves(lambda t: t.to("meta"), layer.init_state(2)))


@each_layer
def test_nan_in_padding_reaches_no_gradient(name: str) -> None:
    layer = make(name)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    x = torch.where(mask[..., None], torch.randn(2, 9, D, dtype=torch.float64), torch.nan)
    layer(x, mask=mask)[0][mask].sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@each_causal
def test_bad_state(name: str) -> None:
    layer, x = make(name), torch.zeros(2, 5, D, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"state: expected .*State or None, got Tensor"):
        layer(x, torch.zeros(2, D))
    with pytest.raises(ValueError, match=r"state\.\w+: expected shape \(2, .*got \(3,"):
        layer(x, layer.init_state(3))
    with pytest.raises(ValueError, match=r"state\.\w+: expected .*, got torch.int32"):
        layer(x, map_leaves(Tensor.int, map_leaves(lambda t: t.real, layer.init_state(2))))
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 0, got -1"):
        layer.init_state(-1)


@each_causal
def test_bad_step(name: str) -> None:
    layer = make(name)
    with pytest.raises(ValueError, match=r"x_t: expected a tensor of shape \(batch, 16\)"):
        layer.step(torch.zeros(2, 5, D, dtype=torch.float64), None)


@pytest.mark.parametrize("name", [name for name, bidirectional in WAYS if bidirectional])
def test_bidirectional_layers_carry_nothing(name: str) -> None:
    layer = make(name, bidirectional=True)
    x = torch.zeros(2, 5, D, dtype=torch.float64)
    assert layer(x)[1] is None
    assert layer.state_size is None
    with pytest.raises(ValueError, match="step: a bidirectional layer"):
        layer.step(x[:, 0], None)
    with pytest.raises(RuntimeError, match="init_state: a bidirectional layer"):
        layer.init_state(2)
    with pytest.raises(ValueError, match="state: a bidirectional layer takes none"):
        layer(x, (x,))
