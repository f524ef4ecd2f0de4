"""wkv against formulas written another way, for keys of any size, and what it says to bad input."""

import pytest
import torch

from linrnn.ops import WKVState, diagonal_scan, wkv

B, T, D = 2, 90, 7


def make(key_size=1.0, dtype=torch.float64, T=T):
    k, v = key_size * torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    w, u = -torch.rand(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (k, v, w, u))


def softmax_over_the_past(k, v, w, u):
    """The formula, all pairs at once: weights exp(k_i + (t-1-i) w), and exp(u + k_t) for the token itself."""
    k, v, w, u = (x.double() for x in (k, v, w, u))
    t = torch.arange(k.shape[1])
    distance = (t[:, None] - t - 1)[..., None].double()
    logits = k[:, None] + torch.where(distance >= 0, distance * w, torch.where(distance == -1, u, -torch.inf))
    return torch.einsum("btid,bid->btd", logits.softmax(2), v)


@pytest.mark.parametrize("key_size", (1.0, 60.0))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-11), (torch.float32, 1e-4)))
def test_equals_the_formula_for_keys_of_any_size(key_size, dtype, tolerance):
    inputs = make(key_size, dtype)
    wanted = softmax_over_the_past(*inputs)
    for backend in ("auto", "torch", "reference"):
        o, _ = wkv(*inputs, backend=backend)
        torch.testing.assert_close(o.double(), wanted, rtol=tolerance, atol=tolerance)
        assert (o <= inputs[1].cummax(1).values + tolerance).all()  # a mean of the values so far
        assert (o >= inputs[1].cummin(1).values - tolerance).all()


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("of", ("k", "v"))
def test_nothing_reaches_over_a_reset(bad, of):
    k, v, w, u = make()
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 40] = True
    broken = {"k": k.clone(), "v": v.clone()}
    broken[of][:, 7] = bad
    clean, clean_state = wkv(k, v, w, u, reset=reset)
    for inputs in (tuple(broken.values()), tuple(x.requires_grad_() for x in broken.values())):
        o, state = wkv(*inputs, w, u, reset=reset)
        torch.testing.assert_close(o[:, 40:], clean[:, 40:])
        torch.testing.assert_close(tuple(state), tuple(clean_state))


def test_is_the_ratio_of_two_diagonal_scans():
    k, v, w, u = make()
    a, _ = diagonal_scan(w.exp(), k.exp() * v)
    b, _ = diagonal_scan(w.exp(), k.exp())
    before = [torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1) for x in (a, b)]
    now = (u + k).exp()
    o, state = wkv(k, v, w, u)
    torch.testing.assert_close(o, (before[0] + now * v) / (before[1] + now))
    torch.testing.assert_close(state.a * state.p.exp(), a[:, -1])
    torch.testing.assert_close(state.b * state.p.exp(), b[:, -1])


def test_a_constant_added_to_the_keys_changes_nothing():
    k, v, w, u = make(10.0)
    o, state = wkv(k, v, w, u)
    shifted, after = wkv(k + 40, v, w, u)
    torch.testing.assert_close(shifted, o)
    torch.testing.assert_close(after, state._replace(p=state.p + 40))


def test_a_complex_decay_turns_the_numerator_alone():
    k, v, w, u = make()
    w = torch.complex(w, 3 * torch.rand(D, dtype=torch.float64))
    top, _ = diagonal_scan(w.exp(), k.exp() * v)
    below, _ = diagonal_scan(w.real.exp(), k.exp())
    top, below = (torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1) for x in (top, below))
    now = (u + k).exp()
    o, state = wkv(k, v, w, u)
    torch.testing.assert_close(o, (top + now * v) / (below + now))
    assert o.dtype == state.a.dtype == torch.complex128 and state.b.dtype == torch.float64


@pytest.mark.parametrize("decay", (-1e-8, -0.1, -50.0))
def test_long_sequences_stay_finite(decay):
    """T = 100 000 with large keys, in float32: outputs, states and gradients, and the mean of a constant is itself."""
    k, v, w, u = make(60.0, torch.float32, T=100_000)
    v, w = torch.full_like(v, 0.7), torch.full_like(w, decay)
    leaves = [x.requires_grad_() for x in (k, v, w, u)]
    o, state = wkv(*leaves)
    # a key that stays the largest for thousands of tokens is multiplied by a rounded 1 as often
    torch.testing.assert_close(o, v.detach(), rtol=2e-4, atol=0)
    assert all(x.isfinite().all() for x in state)
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), leaves))


def test_the_denominator_never_vanishes_under_a_strong_decay():
    """A key long past does not set the scale: its exponent has decayed."""
    k, v = torch.zeros(1, 100, 1), torch.randn(1, 100, 1)
    k[:, 0] = 80.0
    o, _ = wkv(k, v, torch.tensor([-20.0]), torch.zeros(1))
    wanted = softmax_over_the_past(k, v, torch.tensor([-20.0]), torch.zeros(1))
    torch.testing.assert_close(o.double(), wanted, rtol=1e-5, atol=1e-6)


GOOD = {"k": torch.rand(2, 5, 4), "v": torch.rand(2, 5, 4), "w": -torch.rand(4), "u": torch.rand(4)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"k": torch.rand(2, 5)}, r"k must be \(B, T, D\) .* got shape \(2, 5\)"),
        ({"k": torch.rand(2, 5, 4) + 0j}, "k must be floating point, got torch.complex64"),
        ({"v": torch.rand(2, 5, 3)}, r"v must be \(B, T, D\) = \(2, 5, 4\), got shape \(2, 5, 3\)"),
        ({"w": -torch.rand(5, 4)}, r"w must be \(D\) or \(B, T, D\), got shape \(5, 4\)"),
        ({"w": torch.rand(4)}, r"w must be at most 0 \(a decay of at most 1\), got a value of 0\."),
        ({"u": torch.rand(5)}, r"u must be \(D\) = \(4,\), got shape \(5,\)"),
        ({"u": torch.rand(4, device="meta")}, "u is on meta but the other inputs are on cpu"),
        ({"reset": torch.zeros(2, 5)}, "reset must be bool"),
        ({"mask": torch.zeros(5, dtype=torch.bool)}, "mask must be bool"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"backend": "triton"}, "backend='triton' has no kernel"),
        (
            {"initial_state": WKVState(torch.rand(2, 4), torch.rand(2, 4), torch.rand(2, 3))},
            r"initial_state.b must be \(B, D\) = \(2, 4\), got shape \(2, 3\)",
        ),
        (
            {"initial_state": WKVState(torch.rand(2, 4), torch.rand(2, 4) + 0j, torch.rand(2, 4))},
            "initial_state.a is torch.complex64, but the inputs are real",
        ),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        wkv(**GOOD | arguments)


def test_what_is_no_tensor_is_named():
    for name in GOOD:
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            wkv(**GOOD | {name: [1.0]})
    with pytest.raises(TypeError, match=r"initial_state must be a WKVState \(p, a, b\), got Tensor"):
        wkv(**GOOD, initial_state=torch.zeros(2, 4))
