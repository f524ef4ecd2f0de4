"""delta_rule and rwkv7: what the rule means, formulas written another way, stability, and bad input."""

import pytest
import torch
import torch.nn.functional as F

from linrnn.ops import delta_rule, rwkv7

B, T, H, K, V = 2, 75, 3, 6, 5


def make(dtype=torch.float64, T=T):
    q, k = (F.normalize(torch.randn(B, T, H, K, dtype=dtype), dim=-1) for _ in range(2))
    return q, k, torch.randn(B, T, H, V, dtype=dtype), torch.rand(B, T, H, dtype=dtype)


@pytest.mark.parametrize("mode", ("chunk", "recurrent"))
def test_a_key_holds_what_was_written_last(mode):
    """With beta = 1 and keys of length 1, the state at k_t is v_t; a key written again forgets what it held."""
    _, k, v, beta = make()
    k[:, T - 1] = k[:, 3]
    o, S = delta_rule(k, k, v, torch.ones_like(beta), scale=1.0, mode=mode)
    torch.testing.assert_close(o, v)
    torch.testing.assert_close(torch.einsum("bhk,bhkv->bhv", k[:, 3], S), v[:, -1])


@pytest.mark.parametrize("mode", ("chunk", "recurrent"))
def test_beta_zero_leaves_the_state(mode):
    q, k, v, beta = make()
    state = torch.randn(B, H, K, V, dtype=torch.float64)
    o, S = delta_rule(q, k, v, torch.zeros_like(beta), state, mode=mode)
    torch.testing.assert_close(S, state)
    torch.testing.assert_close(o, torch.einsum("bthk,bhkv->bthv", q, state) * K**-0.5)
    decay = torch.full((H,), -0.01, dtype=torch.float64)
    torch.testing.assert_close(
        delta_rule(q, k, v, 0 * beta, state, log_decay=decay, mode=mode)[1], state * decay.mul(T).exp()[:, None, None]
    )


def test_equals_the_triangular_system_of_all_tokens():
    """U = (I + tril(diag(beta) (K K^T * Gamma), -1))^{-1} diag(beta) V and O = tril(Q K^T * Gamma) U."""
    q, k, v, beta = make()
    log_decay = -torch.rand(B, T, H, dtype=torch.float64)
    Q, Key, Value, b, g = (x.transpose(1, 2) for x in (q, k, v, beta, log_decay))
    ends = g.cumsum(-1)
    gamma = (ends[..., :, None] - ends[..., None, :]).tril().exp().tril()
    system = torch.eye(T) + b[..., None] * (Key @ Key.mT * gamma).tril(-1)
    U = torch.linalg.solve(system, b[..., None] * Value)
    wanted = ((Q @ Key.mT * gamma) @ U).transpose(1, 2)
    o, _ = delta_rule(q, k, v, beta, log_decay=log_decay, scale=1.0)
    torch.testing.assert_close(o, wanted)


def test_is_a_case_of_the_recurrence_of_rwkv7():
    q, k, v, beta = make()
    log_decay = -torch.rand(B, T, H, K, dtype=torch.float64)
    state = torch.randn(B, H, K, V, dtype=torch.float64)
    wanted = delta_rule(q, k, v, beta, state, log_decay=log_decay, scale=1.0)
    bk = beta[..., None] * k
    for mode in ("chunk", "recurrent", "parallel"):
        got = rwkv7(q, log_decay, bk, v, -k * log_decay.exp(), bk, state, mode=mode)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("same_keys", (False, True))
@pytest.mark.parametrize(("beta", "tolerance"), ((1.0, 5e-6), (1.99, 2e-4)))
def test_stays_bounded_in_float32(same_keys, beta, tolerance):
    """4096 tokens with the hardest keys, all the same, and reflections that never contract: errors add up, no more."""
    T = 4096
    q, k, v, _ = make(torch.float32, T)
    k = k[:, :1].expand(k.shape) if same_keys else k
    betas = torch.full((B, T, H), beta)
    exact = delta_rule(q.double(), k.double(), v.double(), betas.double(), scale=1.0, mode="recurrent")
    for got, wanted in zip(delta_rule(q, k, v, betas, scale=1.0), exact, strict=True):
        assert (got - wanted).norm() <= tolerance * wanted.norm()


def test_a_gate_that_closes_is_a_reset():
    q, k, v, beta = make()
    log_decay = torch.zeros(B, T, H, dtype=torch.float64)
    log_decay[:, 40] = -torch.inf
    o, S = delta_rule(q, k, v, beta, log_decay=log_decay)
    alone = delta_rule(q[:, 40:], k[:, 40:], v[:, 40:], beta[:, 40:])
    torch.testing.assert_close((o[:, 40:], S), alone)


GOOD = {
    "q": torch.rand(2, 5, 3, 4),
    "k": torch.rand(2, 5, 3, 4),
    "v": torch.rand(2, 5, 3, 6),
    "beta": torch.rand(2, 5, 3),
}
COMMON = (
    ({"k": torch.rand(2, 5, 3, 5)}, r"k must be \(B, T, H, K\) = \(2, 5, 3, 4\), got shape \(2, 5, 3, 5\)"),
    ({"v": torch.rand(2, 4, 3, 6)}, r"v must be \(B, T, H, V\) = .* got shape \(2, 4, 3, 6\)"),
    ({"v": torch.rand(2, 5, 3, 6) + 0j}, "v must be floating point, got torch.complex64"),
    (
        {"initial_state": torch.rand(3, 4, 6)},
        r"initial_state must be \(B, H, K, V\) = \(2, 3, 4, 6\), got shape \(3, 4, 6\)",
    ),
    ({"reset": torch.zeros(5, dtype=torch.bool)}, r"reset must be bool of shape \(B, T\)"),
    ({"mode": "fast"}, "mode must be one of chunk, recurrent, parallel, reference, got 'fast'"),
    ({"chunk_size": 2.0}, "chunk_size must be a positive integer, got 2.0"),
    ({"backend": "cpu"}, "backend='cpu' has no kernel"),
    ({"v": torch.rand(2, 5, 3, 6, device="meta")}, "v is on meta but the other inputs are on cpu"),
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        *COMMON,
        ({"beta": torch.rand(2, 5)}, r"beta must be \(B, T, H\) = \(2, 5, 3\), got shape \(2, 5\)"),
        ({"beta": GOOD["beta"] + 1.5}, r"beta must be in \[0, 2\], got a value of 2\."),
        ({"beta": GOOD["beta"] - 1.5}, r"beta must be in \[0, 2\], got a value of -1\."),
        ({"log_decay": torch.ones(3)}, "log_decay must be at most 0 .* got a value of 1"),
        (
            {"log_decay": torch.rand(2, 5)},
            r"log_decay must be \(H\) or \(B, T, H\) or \(B, T, H, K\), got shape \(2, 5\)",
        ),
    ),
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        delta_rule(**GOOD | arguments)


@pytest.mark.parametrize("name", ("q", "k", "v", "beta", "log_decay", "initial_state", "mask"))
def test_what_is_no_tensor_is_named(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
        delta_rule(**GOOD | {name: [1.0]})


GOOSE = {name: torch.rand(2, 5, 3, 4) for name in "rkab"} | {
    "v": torch.rand(2, 5, 3, 6),
    "log_decay": -torch.rand(2, 5, 3, 4),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        *COMMON,
        ({"a": torch.rand(2, 5, 3, 3)}, r"a must be \(B, T, H, K\) = \(2, 5, 3, 4\), got shape \(2, 5, 3, 3\)"),
        ({"b": torch.rand(2, 5, 3)}, r"b must be \(B, T, H, K\) = \(2, 5, 3, 4\), got shape \(2, 5, 3\)"),
        ({"log_decay": -torch.rand(2, 5, 3)}, r"log_decay must be \(B, T, H, K\), got shape \(2, 5, 3\)"),
        ({"log_decay": torch.rand(2, 5, 3, 4)}, "log_decay must be at most 0"),
    ),
)
def test_bad_input_of_rwkv7(arguments, message):
    with pytest.raises(ValueError, match=message):
        rwkv7(**GOOSE | arguments)


@pytest.mark.parametrize("name", ("r", "k", "v", "a", "b", "log_decay"))
def test_what_is_no_tensor_is_named_by_rwkv7(name):
    with pytest.raises(TypeError, match=f"{name} must be a tensor, got NoneType"):
        rwkv7(**GOOSE | {name: None})
