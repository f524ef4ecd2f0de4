"""diagonal_ssm: its forms against the loop, both ways, derivatives, precision, compiled code and bad input."""

import itertools

import pytest
import torch

from linrnn.ops import diagonal_ssm, diagonal_ssm_bidirectional

B, D, N = 3, 4, 3
FLAGS = ("none", "mask", "reset", "both")


def make(T, is_complex=True, dtype=torch.float64):
    """log_a, b, c, x and a state, as leaves of a graph."""
    log_a = -torch.rand(D, N, dtype=dtype)
    b, c, h = torch.randn(D, N, dtype=dtype), torch.randn(D, N, dtype=dtype), torch.randn(B, D, N, dtype=dtype)
    if is_complex:
        log_a = torch.complex(log_a, 3 * torch.randn(D, N, dtype=dtype))
        b, c, h = (torch.complex(v, torch.randn_like(v)) for v in (b, c, h))
    return [v.requires_grad_() for v in (log_a, b, c, torch.randn(B, T, D, dtype=dtype), h)]


def flags(kind, T):
    """Rows with many, few and no real tokens; with many and few documents."""
    out = {}
    if kind in ("mask", "both"):
        out["mask"] = torch.rand(B, T) < torch.tensor([0.8, 0.2, 0.0])[:, None]
    if kind in ("reset", "both"):
        out["reset"] = torch.rand(B, T) < torch.tensor([0.2, 0.02, 0.1])[:, None]
    return out


def everything(run, inputs, mask=None):
    """Results (y on real tokens alone), and the gradients of a random function of them."""
    results = run(*inputs)
    y, *rest = results if isinstance(results, tuple) else (results,)
    results = [y if mask is None else torch.where(mask[..., None], y, 0), *rest]
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.view_as_real(v) if v.is_complex() else v for v in results]
    loss = sum((v * torch.randn(v.shape, generator=generator, dtype=v.dtype)).sum() for v in numbers)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return results + [torch.zeros_like(v) if g is None else g for v, g in zip(inputs, grads, strict=True)]


def assert_same(ours, theirs, inputs, mask=None, tolerance=1e-11):
    for p, q in zip(everything(ours, inputs, mask), everything(theirs, inputs, mask), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def ssm(mode, **kwargs):
    return lambda *inputs: diagonal_ssm(*inputs, mode=mode, **kwargs)


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize(("is_complex", "T"), ((True, 1), (True, 63), (True, 64), (True, 65), (True, 200), (False, 65)))
def test_forms_equal_the_loop(is_complex, T, kind):
    inputs, kwargs = make(T, is_complex), flags(kind, T)
    for mode, start in itertools.product(("auto", "scan", "chunk", "conv"), (True, False)):
        these = inputs if start else inputs[:4]
        assert_same(ssm(mode, **kwargs), ssm("reference", **kwargs), these, kwargs.get("mask"))


def test_a_thousand_tokens():
    inputs = make(1000)
    for mode in ("scan", "chunk", "conv"):
        assert_same(ssm(mode), ssm("reference"), inputs, tolerance=1e-10)


@pytest.mark.parametrize("mode", ("scan", "chunk", "conv"))
@pytest.mark.parametrize("kind", ("real", "complex"))
def test_a_decay_to_nothing(mode, kind):
    """log_a = -inf: the state is what the token writes, in every form and with every gradient."""
    log_a, b, c, x, h = (v.detach() for v in make(150))
    if kind == "real":
        log_a, b, c, h = (v.real.contiguous() for v in (log_a, b, c, h))
    log_a = log_a.clone()
    log_a[0, 0] = -torch.inf
    inputs = tuple(v.requires_grad_() for v in (log_a, b, c, x, h))
    y, last = diagonal_ssm(*inputs, mode=mode)
    finite = log_a.detach().clone()
    finite[0, 0] = -800
    expected, last_expected = diagonal_ssm(finite, *inputs[1:], mode="reference")
    torch.testing.assert_close((y, last), (expected, last_expected), rtol=1e-10, atol=1e-10)
    grads = torch.autograd.grad(y.sum() + last.abs().sum(), inputs)
    assert all(torch.view_as_real(g).isfinite().all() if g.is_complex() else g.isfinite().all() for g in grads)


def test_gradients_of_every_sample():
    """torch.func's vmap of grad, in the form "scan" that short inputs take and in chunks."""
    log_a, b, c, x, _ = (v.detach() for v in make(9))

    def loss(c, x, mode):
        return diagonal_ssm(log_a, b, c, x[None], mode=mode)[0].square().sum()

    for mode in ("scan", "chunk"):
        each = torch.func.vmap(torch.func.grad(lambda c, x, m=mode: loss(c, x, m)), in_dims=(None, 0))(c, x)
        apart = torch.stack([torch.func.grad(lambda c, x, m=mode: loss(c, x, m))(c, row) for row in x])
        torch.testing.assert_close(each, apart)


def test_the_loop_is_the_convolution_with_its_response():
    log_a, b, c, x, _ = make(40)
    kernel = (c * torch.exp(log_a * torch.arange(40)[:, None, None]) * b).real.sum(-1)  # (T, D)
    expected = torch.stack([(kernel[: t + 1].flip(0) * x[:, : t + 1]).sum(1) for t in range(40)], 1)
    torch.testing.assert_close(diagonal_ssm(log_a, b, c, x, mode="reference")[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ("scan", "chunk", "conv", "reference"))
@pytest.mark.parametrize("T", (0, 1, 7, 130))
def test_pieces_equal_the_whole(mode, T):
    *coefficients, x, h = make(200)

    def pieces(*inputs):
        y1, h1 = diagonal_ssm(*inputs[:3], inputs[3][:, :T], inputs[4], mode=mode if T else "auto")
        y2, h2 = diagonal_ssm(*inputs[:3], inputs[3][:, T:], h1, mode=mode)
        return torch.cat((y1, y2), 1), h2

    assert_same(pieces, ssm(mode), [*coefficients, x, h])


@pytest.mark.parametrize("at", (199, 198, 150))
def test_a_reset_near_the_end_clears_the_state(at):
    """Also where the reset stands on padding, and no token follows; what was infinite is gone."""
    *inputs, h = make(200)
    reset, mask = torch.zeros(B, 200, dtype=torch.bool), torch.ones(B, 200, dtype=torch.bool)
    reset[:, at], mask[:, at:199] = True, False
    mask[0, at:] = False
    _, final = diagonal_ssm(*inputs, torch.full_like(h, torch.inf), reset=reset, mask=mask, mode="chunk")
    expected = diagonal_ssm(*inputs, h, reset=reset, mask=mask, mode="reference")[1]
    torch.testing.assert_close(final, expected, rtol=1e-12, atol=1e-12)
    assert not final[0].any()


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("T", (1, 70))
def test_both_ways(T, kind):
    log_a, b, c, x, _ = make(T)
    back, kwargs = make(T)[2], flags(kind, T)
    mask, reset = kwargs.get("mask"), kwargs.get("reset")
    if kind == "both":  # padding and resets at one token: a document ahead begins before its padding
        reset[0, 5 % T], mask[0, 5 % T] = True, False

    def by_rows(log_a, b, c, back, x):
        """Every document of every row alone, there and back by the loop."""
        y = 0 * x
        for row in range(B):
            document = torch.zeros(T, dtype=torch.long) if reset is None else reset[row].cumsum(0)
            for i in document.unique():
                real = (document == i) if mask is None else (document == i) & mask[row]
                alone = x[row, real][None]
                if alone.shape[1]:
                    there = diagonal_ssm(log_a, b, c, alone, mode="reference")[0]
                    here = diagonal_ssm(log_a, b, back, alone.flip(1), mode="reference")[0].flip(1)
                    y = y.index_put((torch.tensor(row), real.nonzero()[:, 0]), (there + here)[0])
        return y

    for mode in ("auto", "scan", "chunk", "conv"):

        def ours(log_a, b, c, back, x, mode=mode):
            return diagonal_ssm_bidirectional(log_a, b, c, back, x, reset=reset, mask=mask, mode=mode)

        assert_same(ours, by_rows, [log_a, b, c, back, x], mask)


@pytest.mark.parametrize("mode", ("scan", "chunk", "conv"))
def test_derivatives(mode):
    inputs = make(9)

    def run(log_a, b, c, x, h):
        return diagonal_ssm(log_a, b, c, x[:2], h[:2], mode=mode)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_the_scan_in_pieces_of_time(monkeypatch):
    """Recomputed in the backward pass: what is kept does not grow with N."""
    module = __import__("sys").modules["linrnn.ops.diagonal_ssm"]
    inputs, kwargs = make(63), flags("both", 63)
    expected = everything(ssm("scan", **kwargs), inputs, kwargs["mask"])
    monkeypatch.setattr(module, "PIECE", 10 * B * D * N)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: saved.append(v.numel()) or v, lambda v: v):
        y, _ = diagonal_ssm(*inputs, mode="scan", **kwargs)
    assert y.shape == (B, 63, D) and max(saved, default=0) < B * 63 * D * N
    for p, q in zip(everything(ssm("scan", **kwargs), inputs, kwargs["mask"]), expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ("scan", "chunk", "conv"))
def test_float32(mode):
    """At most eight times the error of the loop in float32, on a long and slowly decaying sequence."""
    log_a, b, c, x, h = make(1000)
    log_a = torch.complex(log_a.real * 0.01, log_a.imag).detach()
    exact = diagonal_ssm(log_a, b, c, x, h, mode="reference")
    single = [v.detach().to(torch.complex64 if v.is_complex() else torch.float32) for v in (b, c, x, h)]
    loop = diagonal_ssm(log_a.to(torch.complex64), *single, mode="reference")
    ours = diagonal_ssm(log_a, *single, mode=mode)
    for v, w, z in zip(ours, loop, exact, strict=True):
        assert v.dtype == w.dtype
        assert (v - z).abs().pow(2).mean() <= (8 * 8) * (w - z).abs().pow(2).mean()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("mode", ("scan", "chunk", "conv"))
def test_half_precision_is_a_format(mode, dtype):
    log_a, b, c, x, h = (v.detach() for v in make(200))
    x, single = x.to(dtype), [v.to(torch.complex64) for v in (log_a, b, c, h)]
    with torch.autocast("cpu", torch.bfloat16):
        y, final = diagonal_ssm(*single[:3], x, single[3], mode=mode)
    expected, expected_final = diagonal_ssm(log_a, b, c, x.double(), h, mode="reference")
    assert y.dtype == dtype and final.dtype == torch.complex64
    torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)
    torch.testing.assert_close(final, expected_final.to(torch.complex64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("mode", "kind"), (("chunk", "mask"), ("conv", "mask"), ("auto", "both")))
def test_compiled(mode, kind):
    inputs, kwargs = make(70), flags(kind, 70)
    torch._dynamo.reset()
    compiled = torch.compile(diagonal_ssm, fullgraph=True, backend="aot_eager")
    assert_same(
        lambda *inputs: compiled(*inputs, mode=mode, **kwargs), ssm("reference", **kwargs), inputs, kwargs["mask"]
    )


def test_forms_that_auto_takes(monkeypatch):
    module = __import__("sys").modules["linrnn.ops.diagonal_ssm"]
    taken = []

    def watch(name):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: taken.append(name) or function(*args))

    for name in ("_scan", "chunked_ssm", "fft_conv"):
        watch(name)
    *coefficients, x, _ = make(70)
    often = torch.arange(70).expand(B, 70) % 4 == 0
    x = x.detach()
    for run, expected in (
        (lambda: diagonal_ssm(*coefficients, x), "chunked_ssm"),
        (lambda: diagonal_ssm(*coefficients, x[:, :7].repeat(99, 1, 1)), "_scan"),
        (lambda: diagonal_ssm(*coefficients, x[:1]), "_scan"),
        (lambda: diagonal_ssm(*coefficients, x, reset=often), "_scan"),
        (lambda: diagonal_ssm_bidirectional(*coefficients, coefficients[2], x), "chunked_ssm"),
        (lambda: diagonal_ssm_bidirectional(*coefficients, coefficients[2], x.repeat(2, 1, 1)), "fft_conv"),
    ):
        taken.clear()
        run()
        assert set(taken) == {expected}


def test_torch_func_over_pieces_of_time(monkeypatch):
    """torch.func knows no hooks of saved tensors, with which a piece would be computed again."""
    monkeypatch.setattr(__import__("sys").modules["linrnn.ops.diagonal_ssm"], "PIECE", 1)
    log_a, b, c, x, _ = make(3)

    def loss(x):
        return diagonal_ssm(log_a, b, c, x, mode="scan")[0].square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)


def test_bad_input():
    log_a, b, c, x, h = (v.detach() for v in make(5))
    for change, message in (
        ({"mode": "fft"}, "mode must be one of auto, chunk, conv, scan, reference, got 'fft'"),
        ({"x": x[0]}, r"x must be \(B, T, D\)"),
        ({"x": x + 0j}, "x must be floating point, got torch.complex128"),
        ({"log_a": log_a + 2}, "log_a must be at most 0"),
        ({"log_a": log_a[0]}, r"log_a must be \(D, N\), got shape \(3,\)"),
        ({"b": b[:3]}, r"b must be \(D, N\) = \(4, 3\), got shape \(3, 3\)"),
        ({"c": c[:, :2]}, r"c must be \(D, N\) = \(4, 3\), got shape \(4, 2\)"),
        ({"initial_state": h[:2]}, r"initial_state must be \(B, D, N\)"),
        ({"mask": torch.ones(5, dtype=torch.bool)}, r"mask must be bool of shape \(B, T\) = \(3, 5\)"),
        ({"reset": torch.ones(3, 5)}, "reset must be bool"),
        ({"b": b.to("meta")}, "b is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            diagonal_ssm(**({"log_a": log_a, "b": b, "c": c, "x": x} | change))
    with pytest.raises(ValueError, match=r"initial_state is torch\.complex128, but the inputs are real"):
        diagonal_ssm(log_a.real, b.real, c.real, x, h)
    with pytest.raises(TypeError, match="b must be a tensor, got float"):
        diagonal_ssm(log_a, 1.0, c, x)
    with pytest.raises(ValueError, match=r"c_reverse must be \(D, N\) = \(4, 3\), got shape \(4, 2\)"):
        diagonal_ssm_bidirectional(log_a, b, c, c[:, :2], x)
