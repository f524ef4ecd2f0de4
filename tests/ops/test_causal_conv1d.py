"""causal_conv1d against torch's convolution, its step form, the way to the CUDA package, and bad input."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from linrnn.ops import BackendUnavailable, causal_conv1d

B, T, D = 2, 41, 8


def module():
    """The module behind the function of the same name."""
    return sys.modules["linrnn.ops.causal_conv1d"]


def make(W=4, dtype=torch.float64):
    return torch.randn(B, T, D, dtype=dtype), torch.randn(D, W, dtype=dtype), torch.randn(D, dtype=dtype)


@pytest.mark.parametrize("W", (1, 2, 3, 4, 7))
@pytest.mark.parametrize("activation", (None, "silu", "swish"))
def test_equals_torchs_convolution(W, activation):
    x, weight, bias = make(W)
    y, state = causal_conv1d(x, weight, bias, activation=activation)
    wanted = F.conv1d(F.pad(x.mT, (W - 1, 0)), weight[:, None], bias, groups=D).mT
    torch.testing.assert_close(y, wanted if activation is None else F.silu(wanted))
    assert torch.equal(state, x[:, T - W + 1 :])


@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_steps_equal_the_whole(backend):
    x, weight, bias = make()
    whole, last = causal_conv1d(x, weight, bias, activation="silu", backend=backend)
    state, outs = None, []
    for t in range(T):
        y, state = causal_conv1d(x[:, t : t + 1], weight, bias, state, activation="silu", backend=backend)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), whole)
    assert torch.equal(state, last)


def test_the_state_of_a_short_sequence_has_the_older_inputs():
    x, weight, _ = make()
    state = torch.randn(B, 3, D, dtype=torch.float64)
    _, last = causal_conv1d(x[:, :2], weight, initial_state=state)
    assert torch.equal(last, torch.cat((state[:, 2:], x[:, :2]), 1))


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("at", (T - 1, T - 2, T - 5))
def test_a_reset_near_the_end_clears_the_state(masked, at):
    """Also where the reset stands on padding."""
    x, weight, bias = make()
    reset, mask = torch.zeros(B, T, dtype=torch.bool), torch.ones(B, T, dtype=torch.bool)
    reset[:, at], mask[:, at - 1 : T - 1] = True, not masked
    options = {"reset": reset, "mask": mask if masked else None}
    wanted = causal_conv1d(x, weight, bias, backend="reference", **options)
    torch.testing.assert_close(causal_conv1d(x, weight, bias, **options), wanted)
    assert (wanted[1] == 0).any() or at == T - 5


def test_the_state_does_not_keep_the_sequence_alive():
    x, weight, _ = make()
    _, state = causal_conv1d(x, weight)
    assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


class FakePackage(types.SimpleNamespace):
    """causal_conv1d's function as its documentation describes it, in torch, and what it was called with."""

    def causal_conv1d_fn(self, x, weight, bias=None, *, seq_idx=None, initial_states=None, activation=None):
        W = weight.shape[1]
        assert x.shape[1] == weight.shape[0] and x.stride(1) == 1
        assert seq_idx is None or (seq_idx.dtype == torch.int32 and initial_states is None)
        assert initial_states is None or (initial_states.stride(1) == 1 and initial_states.dtype == x.dtype)
        self.calls.append((seq_idx, initial_states))
        before = x.new_zeros(*x.shape[:2], W - 1) if initial_states is None else initial_states
        padded = torch.cat((before, x), -1)
        y = 0 if bias is None else bias[:, None]
        for j in range(W):
            tap = padded[..., j : j + x.shape[-1]]
            if seq_idx is not None:
                shifted = F.pad(seq_idx, (W - 1 - j, 0), value=-1)[:, : x.shape[-1]]
                tap = torch.where((shifted == seq_idx)[:, None], tap, 0)
            y = y + tap * weight[:, j, None]
        return y if activation is None else F.silu(y)


@pytest.mark.parametrize("case", ("plain", "state", "reset"))
@pytest.mark.parametrize("length", (2, T))
def test_the_package_gets_what_it_takes_and_gives_the_same(monkeypatch, case, length):
    fake = FakePackage(calls=[])
    monkeypatch.setattr(module(), "_package", lambda: fake)
    x, weight, bias = make(dtype=torch.float32)
    x, options = x[:, :length], {"activation": "silu"}
    options |= {"initial_state": torch.randn(B, 3, D)} if case == "state" else {}
    options |= {"reset": torch.rand(B, length) < 0.3} if case == "reset" else {}
    wanted = causal_conv1d(x, weight, bias, backend="torch", **options)
    unfit = module()._unfit
    # a CPU tensor stands in for a CUDA one
    monkeypatch.setattr(
        module(),
        "_unfit",
        lambda x, *rest: unfit(types.SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=x.shape), *rest),
    )
    monkeypatch.setattr(module(), "unwatched", lambda tensors: True)
    got = causal_conv1d(x, weight, bias, backend="cuda", **options)
    torch.testing.assert_close(got, wanted)
    assert len(fake.calls) == 1


def fits(x, weight, state=None, reset=None, mask=None):
    return module()._unfit(x, weight, state, reset, mask)


def test_what_the_package_does_not_take(monkeypatch):
    monkeypatch.setattr(module(), "_package", lambda: FakePackage(calls=[]))
    monkeypatch.setattr(module(), "unwatched", lambda tensors: True)

    def cuda(dtype=torch.float32, shape=(B, T, D)):
        return types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=shape)

    weight, flags = torch.rand(D, 4), torch.zeros(B, T, dtype=torch.bool)
    assert fits(cuda(), weight) is None and fits(cuda(), weight, reset=flags) is None
    assert "got tensors on cpu" in fits(torch.rand(B, T, D), weight)
    assert "no float64" in fits(cuda(torch.float64), weight)
    assert "divisible by 8" in fits(cuda(shape=(B, T, 12)), weight)
    assert "W of 2 to 4" in fits(cuda(), torch.rand(D, 5))
    assert "no mask" in fits(cuda(), weight, mask=flags)
    assert "no reset beside a state" in fits(cuda(), weight, torch.rand(B, 3, D), flags)
    monkeypatch.setattr(module(), "unwatched", lambda tensors: False)
    assert "traced or transformed" in fits(cuda(), weight)
    monkeypatch.setattr(module(), "unwatched", lambda tensors: True)
    monkeypatch.setattr(module(), "_package", lambda: "causal-conv1d cannot be imported (x); pip install y")
    assert "pip install" in fits(cuda(), weight)


def test_without_the_package_the_cure_is_named():
    with pytest.raises(BackendUnavailable, match="causal-conv1d runs on CUDA tensors, got tensors on cpu"):
        causal_conv1d(*make(), backend="cuda")
    found = module()._package()
    assert hasattr(found, "causal_conv1d_fn") or "pip install --no-build-isolation 'linrnn[cuda]'" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"x": torch.rand(5, 8)}, r"x must be \(B, T, D\) .* got shape \(5, 8\)"),
        ({"x": torch.rand(2, 5, 8).long()}, "x must be floating point, got torch.int64"),
        ({"weight": torch.rand(4, 8)}, r"weight must be \(D, W\) = \(8, .*\), got shape \(4, 8\)"),
        ({"weight": torch.rand(8, 0)}, r"weight must be \(D, W\) with W of at least 1, got shape \(8, 0\)"),
        ({"bias": torch.rand(4)}, r"bias must be \(D\) = \(8,\), got shape \(4,\)"),
        (
            {"initial_state": torch.rand(2, 4, 8)},
            r"initial_state must be \(B, W-1, D\) = \(2, 3, 8\), got shape \(2, 4, 8\)",
        ),
        ({"activation": "relu"}, "activation must be one of None, 'silu', 'swish', got 'relu'"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"mask": torch.zeros(2, 5)}, "mask must be bool"),
        ({"bias": torch.rand(8, device="meta")}, "bias is on meta but the other inputs are on cpu"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"backend": "triton"}, "backend='triton' has no kernel"),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{"x": torch.rand(2, 5, 8), "weight": torch.rand(8, 4), **arguments})


def test_what_is_no_tensor_is_named():
    for name in ("x", "weight", "bias", "initial_state", "reset", "mask"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            causal_conv1d(**{"x": torch.rand(2, 5, 8), "weight": torch.rand(8, 4), name: [1.0]})
