"""DeltaNet and gated DeltaNet: the recurrence written out, transformers with the same weights, what is stored."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.layers import DeltaNet, GatedDeltaNet

D, H, K, V = 16, 2, 6, 10


def randomized(layer: Any) -> Any:
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer.double()


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    """The causal convolution of x (T, D) as written: the last tap meets the current token."""
    T, W = len(x), weight.shape[1]
    padded = torch.cat((x.new_zeros(W - 1, x.shape[1]), x))
    return torch.stack([(padded[t : t + W] * weight.mT).sum(0) for t in range(T)])


def naive(layer: Any, x: Tensor, decays: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sequence x (T, D), token by token."""
    q, k, v = (x @ layer.qkv.weight.mT).split((H * K, H * K, H * V), 1)
    if layer.conv.streams == "qkv":
        q, k, v = filtered(torch.cat((q, k, v), 1), layer.conv.conv.weight).split((H * K, H * K, H * V), 1)
    elif layer.conv.streams == "k":
        k = filtered(k, layer.conv.conv.weight)
    q, k, v = F.silu(q).view(-1, H, K), F.silu(k).view(-1, H, K), F.silu(v).view(-1, H, V)
    beta = (x @ layer.beta.weight.mT).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    S, ys = x.new_zeros(H, K, V), []
    for t in range(len(x)):
        outs = []
        for h in range(H):
            q_t, k_t = (z[t, h] / (z[t, h].square().sum() + 1e-6).sqrt() for z in (q, k))
            decayed = S[h] if decays is None else S[h] * decays[t, h]
            transition = torch.eye(K, dtype=x.dtype) - beta[t, h] * torch.outer(k_t, k_t)
            S[h] = transition @ decayed + beta[t, h] * torch.outer(k_t, v[t, h])
            o = S[h].mT @ q_t / K**0.5
            outs.append(o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight)
        y = torch.cat(outs)
        ys.append(y if layer.gate is None else y * F.silu(x[t] @ layer.gate.weight.mT))
    return torch.stack(ys) @ layer.out.weight.mT, S


@pytest.mark.parametrize("layer_type", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize("conv", ["none", "k", "qkv"])
@pytest.mark.parametrize(("allow_neg_eigval", "use_gate"), [(False, True), (True, False)])
def test_is_its_equations(layer_type: Any, conv: str, allow_neg_eigval: bool, use_gate: bool) -> None:
    layer = layer_type(
        D, n_heads=H, d_key=K, d_value=V, conv=conv, allow_neg_eigval=allow_neg_eigval, use_gate=use_gate
    )
    layer, x = randomized(layer), torch.randn(2, 33, D, dtype=torch.float64)
    with torch.no_grad():
        y, state = layer(x)
        for row in range(2):
            decays = None
            if layer_type is GatedDeltaNet:
                dt = F.softplus(x[row] @ layer.a.weight.mT + layer.dt_bias)
                decays = (-layer.A_log.exp() * dt).exp()
                assert decays.min() < 0.7
            expected, S = naive(layer, x[row], decays)
            torch.testing.assert_close(y[row], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(state.S[row], S, rtol=1e-10, atol=1e-10)
    assert (state.conv is None) == (conv == "none")


@pytest.mark.parametrize("layer_type", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize("conv", ["none", "k"])
def test_other_convolutions_run_in_steps_and_pieces(layer_type: Any, conv: str) -> None:
    # the contract test runs conv="qkv"
    layer, x = layer_type(D, conv=conv).double(), torch.randn(2, 21, D, dtype=torch.float64)
    expected, final = layer(x)
    for lengths in ([1] * 21, [5, 0, 16]):
        state, ys = layer.init_state(2), []
        for piece in x.split(lengths, 1):
            y, state = layer(piece, state)
            ys.append(y)
        torch.testing.assert_close(torch.cat(ys, 1), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state.S, final.S, rtol=1e-10, atol=1e-10)
    reset, mask = torch.rand(2, 21) < 0.2, torch.rand(2, 21) < 0.7
    y, _ = layer(x, reset=reset, mask=mask)
    for row in range(2):
        documents = reset[row].cumsum(0)
        for document in documents.unique():
            real = (documents == document) & mask[row]
            torch.testing.assert_close(y[row, real], layer(x[row, real][None])[0][0], rtol=1e-10, atol=1e-10)


def oracle(allow_neg_eigval: bool) -> tuple[Any, GatedDeltaNet, Any]:
    """OLMo Hybrid's gated DeltaNet in transformers as it is initialised, ours with its weights, an empty cache."""
    pytest.importorskip("transformers")
    from transformers import DynamicCache, OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=H,
        linear_num_value_heads=H,
        linear_key_head_dim=K,
        linear_value_head_dim=V,
        linear_allow_neg_eigval=allow_neg_eigval,
    )
    theirs = OlmoHybridGatedDeltaNet(config, layer_idx=0)
    ours = GatedDeltaNet(D, n_heads=H, d_key=K, d_value=V, allow_neg_eigval=allow_neg_eigval)
    ours.load_state_dict(
        {
            "qkv.weight": torch.cat([m.weight for m in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]).detach(),
            "conv.conv.weight": theirs.conv1d.weight[:, 0].detach(),
            "beta.weight": theirs.b_proj.weight.detach(),
            "a.weight": theirs.a_proj.weight.detach(),
            "gate.weight": theirs.g_proj.weight.detach(),
            "norm.weight": theirs.o_norm.weight.detach(),
            "out.weight": theirs.o_proj.weight.detach(),
            "A_log": theirs.A_log.detach(),
            "dt_bias": theirs.dt_bias.detach(),
        }
    )
    return theirs, ours, DynamicCache(config=config)


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_transformers_whole_sequence(allow_neg_eigval: bool) -> None:
    theirs, ours, _ = oracle(allow_neg_eigval)
    x = torch.randn(2, 131, D)
    x, again = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x)[0], theirs(again)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.A_log.grad, theirs.A_log.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.conv.conv.weight.grad, theirs.conv1d.weight.grad[:, 0], rtol=1e-4, atol=1e-5)


def test_transformers_prefill_and_steps() -> None:
    theirs, ours, cache = oracle(False)
    x, state = torch.randn(2, 20, D), None
    with torch.no_grad():
        for piece in x.split([7, 6, *(1 for _ in range(7))], 1):
            expected = theirs(piece, cache_params=cache)
            y, state = ours(piece, state)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert state is not None
    torch.testing.assert_close(state.S, cache.get_recurrent_state(0), rtol=1e-5, atol=1e-5)


def test_reads_back_what_it_wrote_and_overwrites() -> None:
    layer = DeltaNet(D, n_heads=1, conv="none").double()
    with torch.no_grad():
        layer.beta.weight.fill_(100)  # β = 1 for tokens of a positive sum
        x = torch.rand(1, 3, D, dtype=torch.float64)
        qkv = F.silu(layer.qkv(x))
        k, v = qkv[0, :, D : 2 * D], qkv[0, :, 2 * D :]
        _, state = layer(x)
    key = k[2] / k[2].norm()
    torch.testing.assert_close(key @ state.S[0, 0], v[2], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        _, twice = layer(x[:, 2:], state)  # the same key and value again: nothing left to learn
    torch.testing.assert_close(twice.S, state.S, rtol=1e-4, atol=1e-5)


def test_beta_covers_its_range() -> None:
    # |eigenvalue| <= 1 in both ranges: a state only ever shrinks where nothing new is written
    for allow_neg_eigval in (False, True):
        layer = DeltaNet(D, n_heads=1, conv="none", allow_neg_eigval=allow_neg_eigval).double()
        with torch.no_grad():
            layer.beta.weight.fill_(100)
            layer.qkv.weight[2 * D :].zero_()  # values of zero
            state = layer.init_state(1)._replace(S=torch.randn(1, 1, D, D, dtype=torch.float64))
            x = torch.rand(1, 1, D, dtype=torch.float64)
            key = F.silu(layer.qkv(x))[0, 0, D : 2 * D]
            key = key / key.norm()
            _, after = layer(x, state)
        expected = -1.0 if allow_neg_eigval else 0.0
        torch.testing.assert_close(key @ after.S[0, 0], expected * (key @ state.S[0, 0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer_type", [DeltaNet, GatedDeltaNet])
def test_reflections_in_half_precision_stay_in_the_unit_ball(layer_type: Any) -> None:
    # β of 2 and a key rounded to bf16 have an eigenvalue below -1: over many tokens the state would explode
    layer = layer_type(D, n_heads=1, conv="none", allow_neg_eigval=True).bfloat16()
    with torch.no_grad():
        layer.beta.weight.fill_(100)
        if layer_type is GatedDeltaNet:
            layer.A_log.fill_(-100)
        layer.qkv.weight[2 * D :].zero_()
        state = layer.init_state(16)._replace(S=torch.randn(16, 1, D, D))
        _, after = layer(torch.rand(16, 1, D).bfloat16().expand(16, 2000, D), state)  # one key a row, again and again
    assert (after.S.flatten(1).norm(dim=1) < 1.001 * state.S.flatten(1).norm(dim=1)).all()


def test_initialisation() -> None:
    torch.manual_seed(1)
    layer = GatedDeltaNet(64, n_heads=4096, d_key=1, d_value=1)
    A, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 0 < A.min() < 1 and 15 < A.max() <= 16.001 and abs(A.mean() - 8) < 0.5
    assert 0.99e-3 < dt.min() and dt.max() < 0.101 and abs(dt.log().mean() - torch.tensor(1e-2).log()) < 0.1


@pytest.mark.parametrize("layer_type", [DeltaNet, GatedDeltaNet])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_heads": 3}, "n_heads: expected a divisor of 16, got 3"),
        ({"d_key": 0}, "d_key: expected an integer >= 1, got 0"),
        ({"d_value": -2}, "d_value: expected an integer >= 1, got -2"),
        ({"conv": "kv"}, "conv: expected one of 'none', 'k', 'qkv', got 'kv'"),
        ({"conv_width": 0}, "conv_width: expected an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(layer_type: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_type(D, **kwargs)


@pytest.mark.parametrize("kwargs", [{"dt_min": 0.0}, {"dt_min": 0.2, "dt_max": 0.1}])
def test_bad_time_steps(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dt_min, dt_max: expected 0 < dt_min <= dt_max"):
        GatedDeltaNet(D, **kwargs)
