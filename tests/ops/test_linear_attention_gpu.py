"""linear_attention and delta_rule with backend="triton" on a GPU, against the loops on the CPU in double precision."""

import pytest
import torch
from torch import Tensor

from linrnn.ops import delta_rule, linear_attention

pytestmark = pytest.mark.gpu
DELTA = (False, True)
KINDS = ("none", "constant", "head", "channel")
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
# of the norm of an output or gradient: tf32x3 is float32; the others round operands to 8 or 11 bits
TOLERANCES = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make(B: int, T: int, H: int, K: int, V: int, kind: str, delta: bool) -> dict[str, Tensor]:
    inputs = {name: torch.randn(B, T, H, width) for name, width in (("q", K), ("k", K), ("v", V))}
    if delta:
        inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
        inputs["beta"] = 2 * torch.rand(B, T, H)
    shape = {"none": None, "constant": (H,), "head": (B, T, H), "channel": (B, T, H, K)}[kind]
    if shape is not None:
        inputs["log_decay"] = -(10 ** (3 * torch.rand(shape) - 3))
    inputs["initial_state"] = torch.randn(B, H, K, V)
    return inputs


def run(inputs: dict[str, Tensor], backend: str, grads: bool = True, **options) -> dict[str, Tensor]:
    """o, the final state and, of fixed cotangents, all gradients, in float64 on the CPU."""
    given = {name: v.detach().requires_grad_(grads) for name, v in inputs.items()}
    q, k, v, beta, log_decay, state = (given.get(name) for name in NAMES)
    options = {"log_decay": log_decay, "backend": backend, **options}
    if beta is None:
        o, last = linear_attention(q, k, v, state, **options)
    else:
        o, last = delta_rule(q, k, v, beta, state, **options)
    out = {"o": o, "last": last}
    if grads:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(x.shape, generator=generator).to(x) for x in (o, last)]
        out |= dict(zip(given, torch.autograd.grad((o, last), list(given.values()), cotangents), strict=True))
    return {name: x.detach().cpu().double() for name, x in out.items()}


def compare(inputs: dict[str, Tensor], dtype: torch.dtype, grads: bool = True, **options) -> None:
    """The reference gets the rounded inputs, so that only the rounding of the kernels is measured."""
    halves = ("q", "k", "v", "beta")
    rounded = {name: v.to(dtype) if name in halves else v for name, v in inputs.items()}
    wanted = run({name: v.double() for name, v in rounded.items()}, "torch", grads, **options)
    moved = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
    got = run({name: v.cuda() for name, v in rounded.items()}, "triton", grads, **moved)
    for name, want in wanted.items():
        error = ((got[name] - want).norm() / want.norm().clamp_min(1e-30)).item()
        assert error < TOLERANCES[dtype], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", DELTA)
@pytest.mark.parametrize("shape", ((1, 1, 1, 16, 16), (2, 63, 3, 64, 64), (2, 1000, 2, 128, 128), (1, 130, 2, 40, 200)))
def test_equals_the_torch_form_in_double(dtype, kind, delta, shape):
    compare(make(*shape, kind, delta), dtype)


@pytest.mark.parametrize("delta", DELTA)
def test_wide_heads(delta):
    compare(make(1, 200, 2, 256, 256, "channel", delta), torch.bfloat16)


@pytest.mark.parametrize("delta", DELTA)
@pytest.mark.parametrize("kind", KINDS)
def test_reset_and_mask(kind, delta):
    inputs = make(3, 150, 2, 32, 48, kind, delta)
    flags = {"reset": torch.rand(3, 150) < 0.05, "mask": torch.rand(3, 150) < 0.9}
    compare(inputs, torch.float32, **flags)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("delta", DELTA)
@pytest.mark.parametrize("T", (1, 5))
def test_token_by_token(dtype, kind, delta, T):
    compare(make(3, T, 2, 64, 80, kind, delta), dtype, grads=False, mode="recurrent")


def test_normalized_in_bf16():
    q, k, v = (torch.randn(2, 300, 2, 32) for _ in range(3))
    options = {"normalize": True, "log_features": True}
    wanted, _ = linear_attention(q.double(), k.double(), v.double(), **options)
    got, _ = linear_attention(*(x.cuda().bfloat16() for x in (q, k, v)), backend="triton", **options)
    assert ((got.cpu().double() - wanted).norm() / wanted.norm()).item() < 2e-2


@pytest.mark.parametrize("delta", DELTA)
def test_long_sequences_without_decay_and_with_all_of_it(delta):
    inputs = make(1, 65536, 1, 16, 16, "head", delta)
    inputs["log_decay"] = torch.where(torch.rand(1, 65536, 1) < 0.5, -1e-6, -9.2)
    compare(inputs, torch.float32)


@pytest.mark.parametrize("delta", DELTA)
def test_the_same_bits_every_time(delta):
    inputs = {name: v.cuda().bfloat16() for name, v in make(2, 500, 2, 64, 64, "channel", delta).items()}
    first, second = run(inputs, "triton"), run(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("delta", DELTA)
def test_compiles_into_one_graph(delta):
    inputs = {name: v.cuda() for name, v in make(2, 100, 2, 32, 32, "head", delta).items()}
    q, k, v, beta, log_decay, state = (inputs.get(name) for name in NAMES)

    def loss(q, k, v):
        if delta:
            o, last = delta_rule(q, k, v, beta, state, log_decay=log_decay)
        else:
            o, last = linear_attention(q, k, v, state, log_decay=log_decay)
        return o.sin().sum() + last.sin().sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        given = [x.clone().requires_grad_() for x in (q, k, v)]
        grads.append(torch.autograd.grad(function(*given), given))
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_auto_takes_the_kernels(monkeypatch):
    from linrnn.ops import _triton

    calls = []
    monkeypatch.setattr(_triton, "run", lambda *args: calls.append(args) or (args[3], args[3]))
    q = torch.randn(1, 4, 1, 16, device="cuda")
    linear_attention(q, q, q)
    assert calls
