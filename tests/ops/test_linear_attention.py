"""linear_attention against formulas written another way, at the ends of its range, and what it says to bad input."""

import pytest
import torch
from torch import Tensor

from linrnn.ops import NormalizedState, diagonal_scan, linear_attention
from linrnn.ops._chunks import decayed_scores, unit_lower_inverse

B, T, H, K, V = 2, 75, 3, 4, 5


def make(dtype=torch.float64, T=T):
    q, k = (torch.randn(B, T, H, K, dtype=dtype) for _ in range(2))
    return q, k, torch.randn(B, T, H, V, dtype=dtype)


def segment_sums(log_decay: Tensor) -> Tensor:
    """(B, T, H, K) to (B, H, T, T, K): the sum over tokens j+1 to i, -inf above the diagonal; one sum after another."""
    g = log_decay.transpose(1, 2)
    sums = torch.full((*g.shape[:2], g.shape[2], *g.shape[2:]), -torch.inf, dtype=g.dtype)
    for j in range(g.shape[2]):
        sums[:, :, j, j] = 0
        for i in range(j + 1, g.shape[2]):
            sums[:, :, i, j] = sums[:, :, i - 1, j] + g[:, :, i]
    return sums


@pytest.mark.parametrize("shape", ((H,), (B, T, H), (B, T, H, K)))
def test_equals_the_masked_matrix_of_all_pairs(shape):
    """O = ((Q K^T) * Gamma) V, per channel where the decay is."""
    q, k, v = make()
    log_decay = -torch.rand(shape, dtype=torch.float64)
    full = log_decay.expand(B, T, H) if len(shape) == 1 else log_decay
    gamma = segment_sums(full if len(shape) == 4 else full[..., None].expand(B, T, H, K)).exp()
    wanted = torch.einsum("bihk,bjhk,bhijk,bjhv->bihv", q, k, gamma, v)
    for mode in ("chunk", "parallel", "recurrent"):
        o, _ = linear_attention(q, k, v, log_decay=log_decay, scale=1.0, mode=mode)
        torch.testing.assert_close(o, wanted, rtol=1e-11, atol=1e-11)


def test_without_decay_it_is_a_cumulative_sum():
    q, k, v = make()
    sums = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    o, S = linear_attention(q, k, v)
    torch.testing.assert_close(o, torch.einsum("bthk,bthkv->bthv", q, sums) * K**-0.5)
    torch.testing.assert_close(S, sums[:, -1])
    ones, S_ones = linear_attention(q, k, v, log_decay=torch.zeros(H, dtype=torch.float64))
    torch.testing.assert_close((ones, S_ones), (o, S))


def test_complex_decays_are_a_diagonal_scan_of_every_entry():
    """A constant decay with a phase per channel (rotary positions written as a recurrence)."""
    q, k, v = (x.to(torch.complex128) for x in make())
    log_decay = torch.complex(-torch.rand(K), 6.3 * torch.rand(K)).to(torch.complex128)
    a = log_decay.exp()[:, None].expand(H, K, V).reshape(-1)
    update = torch.einsum("bthk,bthv->bthkv", k, v).reshape(B, T, -1)
    states, last = diagonal_scan(a, update)
    wanted = torch.einsum("bthk,bthkv->bthv", q, states.view(B, T, H, K, V))
    o, S = linear_attention(q, k, v, log_decay=log_decay.expand(B, T, H, K), scale=1.0)
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(S, last.view(B, H, K, V))
    phases = torch.exp(1j * log_decay.imag * torch.arange(T)[:, None, None])  # the same by rotating q and k
    real = log_decay.real.expand(B, T, H, K)
    rotated, _ = linear_attention(q * phases, k * phases.conj(), v, log_decay=real, scale=1.0)
    torch.testing.assert_close(rotated, wanted)


def test_complex_infinities_forget():
    q, k, v = (x.to(torch.complex128) for x in make())
    log_decay = torch.zeros(B, T, H, dtype=torch.complex128)
    log_decay[:, 40] = complex(-torch.inf, 1.0)
    o, _ = linear_attention(q, k, v, log_decay=log_decay)
    alone, _ = linear_attention(q[:, 40:], k[:, 40:], v[:, 40:])
    torch.testing.assert_close(o[:, 40:], alone)


@pytest.mark.parametrize("mode", ("chunk", "recurrent", "reference"))
def test_normalized_outputs_are_means_of_the_values(mode):
    q, k, v = make()
    q, k = q.square(), k.square()
    log_decay = -torch.rand(B, T, H, dtype=torch.float64)
    o, state = linear_attention(q, k, v, log_decay=log_decay, normalize=True, mode=mode)
    assert (o <= v.cummax(1).values + 1e-12).all() and (o >= v.cummin(1).values - 1e-12).all()
    assert isinstance(state, NormalizedState) and state.m is None
    same, _ = linear_attention(7 * q, k, v, log_decay=log_decay, normalize=True, mode=mode)
    torch.testing.assert_close(same, o)
    top, S = linear_attention(q, k, v, log_decay=log_decay, mode=mode, scale=1.0)
    below, z = linear_attention(q, k, torch.ones_like(v[..., :1]), log_decay=log_decay, mode=mode, scale=1.0)
    torch.testing.assert_close(o, top / below)
    torch.testing.assert_close((state.S, state.z), (S, z.squeeze(-1)))
    with_eps, _ = linear_attention(q, k, v, log_decay=log_decay, normalize=True, eps=0.5, mode=mode)
    torch.testing.assert_close(with_eps, top / (below + 0.5))


def test_a_denominator_of_zero_gives_zero():
    q, k, v = make()
    k[:, :5] = 0
    o, _ = linear_attention(q, k, v.requires_grad_(), normalize=True)
    assert (o[:, :5] == 0).all() and o.isfinite().all()
    assert torch.autograd.grad(o.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("shape", (None, (H,), (B, T, H), (B, T, H, K)))
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-10), (torch.float32, 2e-4)))
def test_exponential_features_of_any_size(shape, dtype, tolerance):
    """Exponents of standard deviation 60, against a softmax over pairs of tokens and channels."""
    q, k, v = make()
    q, k = (60 * q).to(dtype), (60 * k).to(dtype)
    log_decay = None if shape is None else -5 * torch.rand(shape, dtype=torch.float64).to(dtype)
    full = torch.zeros(B, T, H, K) if log_decay is None else log_decay
    full = full.expand(B, T, H) if full.ndim == 1 else full
    full = full if full.ndim == 4 else full[..., None].expand(B, T, H, K)
    logits = (
        q.double().transpose(1, 2)[:, :, :, None] + k.double().transpose(1, 2)[:, :, None] + segment_sums(full.double())
    )
    weights = logits.logsumexp(-1).softmax(-1)
    wanted = torch.einsum("bhij,bjhv->bihv", weights, v)
    for mode in ("chunk", "recurrent"):
        options = {"log_decay": log_decay, "normalize": True, "log_features": True, "mode": mode}
        o, state = linear_attention(q, k, v.to(dtype), **options)
        torch.testing.assert_close(o.double(), wanted, rtol=tolerance, atol=tolerance)
        first, carried = linear_attention(q[:, :30], k[:, :30], v[:, :30].to(dtype), **_cut(options, 0, 30))
        second, last = linear_attention(q[:, 30:], k[:, 30:], v[:, 30:].to(dtype), carried, **_cut(options, 30, T))
        torch.testing.assert_close(torch.cat((first, second), 1).double(), wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(last.z * (last.m - state.m).exp(), state.z, rtol=10 * tolerance, atol=0)


def _cut(options: dict, begin: int, end: int) -> dict:
    g = options["log_decay"]
    return options | {"log_decay": g if g is None or g.ndim == 1 else g[:, begin:end]}


@pytest.mark.parametrize("channels", (False, True))
@pytest.mark.parametrize("least", (1.0, 0.9999999, 0.99, 1e-4))
def test_long_sequences_of_any_decay_in_float32(channels, least):
    """T = 65 536, decays between `least` and 1, some of them the least, against a float64 scan of every state entry."""
    T, H, K, V = 65_536, 2, 2, 2
    q, k, v = torch.randn(1, T, H, K), torch.randn(1, T, H, K), torch.randn(1, T, H, V)
    log_decay = torch.rand(1, T, H, K if channels else 1) * torch.tensor(least).log()
    log_decay[:, ::3] = torch.tensor(least).log()
    a = log_decay.double().exp()[..., None].expand(1, T, H, K, V).reshape(1, T, -1)
    update = torch.einsum("bthk,bthv->bthkv", k.double(), v.double()).reshape(1, T, -1)
    states, last = diagonal_scan(a, update)
    wanted = torch.einsum("bthk,bthkv->bthv", q.double(), states.view(1, T, H, K, V))
    given = log_decay if channels else log_decay[..., 0]
    for leaf in (q, k, v, given):
        leaf.requires_grad_()
    o, S = linear_attention(q, k, v, log_decay=given, scale=1.0)
    scale = wanted.abs().max()
    assert ((o - wanted).abs().max() / scale) < 1e-5
    assert ((S.double().flatten() - last.flatten()).abs().max() / last.abs().max()) < 1e-5
    for grad in torch.autograd.grad(o.sum() + S.sum(), (q, k, v, given)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", (None, "H", "BTH", "BTHK"))
def test_what_the_backward_keeps_grows_linearly(shape):
    def kept(T):
        q, k, v = (torch.randn(1, T, H, K, requires_grad=True) for _ in range(3))
        sizes = {"H": (H,), "BTH": (1, T, H), "BTHK": (1, T, H, K)}
        log_decay = None if shape is None else (-torch.rand(sizes[shape])).requires_grad_()
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            linear_attention(q, k, v, log_decay=log_decay)
        return total

    assert kept(4096) < 4.5 * kept(1024)


def test_half_precision_decays_beside_float32():
    q, k, v = (x.float() for x in make())
    log_decay = -torch.rand(B, T, H).to(torch.bfloat16)
    got = linear_attention(q, k, v, log_decay=log_decay)
    torch.testing.assert_close(got, linear_attention(q, k, v, log_decay=log_decay.float()))
    o, S = linear_attention(q, k, v, log_decay=log_decay.double())
    assert (o.dtype, S.dtype) == (torch.float64, torch.float64)
    o, S = linear_attention(q.half(), k.half(), v.half(), log_decay=log_decay.float())
    assert (o.dtype, S.dtype) == (torch.float16, torch.float32)


def test_scores_of_strict_and_exclusive_rows():
    """The rows of the delta rules: without the diagonal, and before their own decay."""
    from linrnn.ops._chunks import Row

    x, key, g = torch.randn(1, 1, 1, 16, K), torch.randn(1, 1, 1, 16, K), -torch.rand(1, 1, 1, 16, K)
    sums = segment_sums(g[0].transpose(1, 2)).exp()[0]
    before = torch.cat((torch.zeros_like(sums[:, :1]), sums[:, :-1]), 1)
    ((inclusive,), (strict,), (exclusive,)), _ = decayed_scores((Row(x), Row(x, False), Row(x, False, True)), (key,), g)
    for got, decays in ((inclusive, sums), (strict, sums), (exclusive, before)):
        wanted = torch.einsum("...ik,...jk,...ijk->...ij", x, key, decays)
        torch.testing.assert_close(got, wanted if got is inclusive else wanted.tril(-1))


@pytest.mark.parametrize("C", (1, 4, 8, 64))
def test_unit_lower_inverse(C):
    M = torch.randn(3, C, C, dtype=torch.float64).tril(-1) / C
    torch.testing.assert_close(unit_lower_inverse(M), torch.linalg.inv(M + torch.eye(C)))


GOOD = {"q": torch.rand(2, 5, 3, 4), "k": torch.rand(2, 5, 3, 4), "v": torch.rand(2, 5, 3, 6)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ({"q": GOOD["q"][0]}, r"q must be \(B, T, H, K\) = \('B', 'T', 'H', 'K'\), got shape \(5, 3, 4\)"),
        ({"k": torch.rand(2, 5, 3, 5)}, r"k must be \(B, T, H, K\) = \(2, 5, 3, 4\), got shape \(2, 5, 3, 5\)"),
        (
            {"v": torch.rand(2, 5, 4, 6)},
            r"v must be \(B, T, H, V\) = \(2, 5, 3, 'V'\)|v must be .* got shape \(2, 5, 4",
        ),
        ({"q": GOOD["q"].long()}, "q must be floating point or complex, got torch.int64"),
        (
            {"initial_state": torch.rand(2, 3, 6, 4)},
            r"initial_state must be \(B, H, K, V\) = \(2, 3, 4, 6\), got shape",
        ),
        ({"initial_state": torch.rand(2, 3, 4, 6) + 0j}, "initial_state is torch.complex64, but the inputs are real"),
        (
            {"log_decay": torch.rand(2, 5)},
            r"log_decay must be \(H\) or \(B, T, H\) or \(B, T, H, K\), got shape \(2, 5\)",
        ),
        ({"log_decay": -torch.rand(4)}, r"log_decay must be \(H\) = \(3,\), got shape \(4,\)"),
        ({"log_decay": torch.tensor([-1.0, 0.25, 0.0])}, r"log_decay must be at most 0 .* got a value of 0.25"),
        ({"log_decay": torch.tensor([-1.0, 0.25, 0.0]) + 1j}, r"log_decay must be at most 0 .* got a value of 0.25"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset must be bool of shape \(B, T\) = \(2, 5\)"),
        ({"mask": torch.zeros(2, 5)}, r"mask must be bool .* got torch.float32"),
        ({"mode": "fast"}, "mode must be one of chunk, recurrent, parallel, reference, got 'fast'"),
        ({"chunk_size": 0}, "chunk_size must be a positive integer, got 0"),
        ({"backend": "fast"}, "backend must be one of .* got 'fast'"),
        ({"backend": "cpu"}, "backend='cpu' has no kernel"),
        ({"log_features": True}, "log_features=True needs normalize=True and eps=0.0 .* got normalize=False, eps=0.0"),
        ({"log_features": True, "normalize": True, "eps": 0.1}, "got normalize=True, eps=0.1"),
        ({"log_features": True, "normalize": True, "q": GOOD["q"] + 0j}, "log_features=True needs real inputs"),
        ({"normalize": True, "scale": 0.5}, "scale must be None with normalize=True.* got 0.5"),
        ({"eps": 0.1}, "eps must be at least 0, and needs normalize=True, got eps=0.1, normalize=False"),
        ({"normalize": True, "eps": -0.1}, "eps must be at least 0"),
        ({"v": GOOD["v"].to("meta")}, "v is on meta but the other inputs are on cpu"),
        ({"log_decay": torch.zeros(3, device="meta")}, "log_decay is on meta but the other inputs are on cpu"),
        (
            {"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
            "mask is on meta but the other inputs are on cpu",
        ),
        (
            {"normalize": True, "initial_state": NormalizedState(torch.rand(2, 3, 4, 6), torch.rand(2, 3, 6))},
            r"initial_state.z must be \(B, H, K\) = \(2, 3, 4\), got shape \(2, 3, 6\)",
        ),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**GOOD | arguments)


@pytest.mark.parametrize("name", ("q", "k", "v", "log_decay", "reset", "mask", "initial_state"))
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        linear_attention(**GOOD | {name: [1.0]})


def test_the_state_must_fit_the_options():
    state = NormalizedState(torch.rand(2, 3, 4, 6), torch.rand(2, 3, 4))
    with pytest.raises(TypeError, match="initial_state must be a tensor, got NormalizedState"):
        linear_attention(**GOOD, initial_state=state)
    for wrong, given in (
        (state.S, "Tensor"),
        (state._replace(m=state.z), "with m"),
        ((state.S, state.z), "a tuple of 2"),
    ):
        with pytest.raises(TypeError, match=rf"NormalizedState \(S, z, None\) .* got .*{given}"):
            linear_attention(**GOOD, initial_state=wrong, normalize=True)
    with pytest.raises(TypeError, match=r"NormalizedState \(S, z, m\) .* with m = None"):
        linear_attention(**GOOD, initial_state=state, normalize=True, log_features=True)
