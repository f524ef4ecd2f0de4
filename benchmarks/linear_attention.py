"""The ops with matrix states beside matrix products of the same size and the functions of the peers.

    pip install -e '.[bench,hf]' && python benchmarks/linear_attention.py     # minutes; writes benchmarks/results/
    python benchmarks/linear_attention.py --lengths 4096 --no-write           # one length

The ceiling, "matrix products", is torch.bmm on contiguous chunks of 64 tokens with the shapes that linear attention in
chunks cannot do without: Q K^T, its product with V, K^T V and Q S. All run in one process, interleaved, and the
fastest run counts; memory is warm. Forward+backward takes the gradient of every input. Every peer's output is compared
with ours before it is timed. A peer that needs far more than its turn is timed twice only, and left out (a dash) where
its memory or time grows out of hand.
"""

import argparse
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from torch import Tensor

from linrnn.ops import NormalizedState, WKVState, causal_conv1d, delta_rule, linear_attention, rwkv7, wkv

LENGTHS = (256, 1024, 4096, 16384, 65536)
B, H, K, D = 2, 4, 64, 256
QUADRATIC, LOOPS = 4096, 1024  # the longest sequence for peers that are quadratic, or loop over tokens

Op = Callable[..., Tensor]


def inputs(T: int, device: torch.device) -> dict[str, Tensor]:
    def normal(*shape):
        return torch.randn(shape, device=device)

    k = F.normalize(normal(B, T, H, K), dim=-1)
    named = {"q": normal(B, T, H, K), "k": k, "v": normal(B, T, H, K), "beta": torch.rand(B, T, H, device=device)}
    named |= {"head": -torch.rand(H, device=device), "token": -0.1 * torch.rand(B, T, H, device=device) - 1e-3}
    named |= {"channel": -0.1 * torch.rand(B, T, H, K, device=device), "a": -k, "b": k * torch.rand_like(k)}
    named |= {
        "x": normal(B, T, D),
        "weight": normal(D, 4),
        "key": 3 * normal(B, T, D),
        "w": -torch.rand(D, device=device),
    }
    return named | {"u": normal(D)}


def matrix_products(T: int, device: torch.device) -> Callable[[], object]:
    C = 64
    q, k, v, S = (torch.randn(B * H * T // C, n, K, device=device) for n in (C, C, C, K))

    def run():
        return torch.bmm(torch.bmm(q, k.mT), v), torch.bmm(k.mT, v), torch.bmm(q, S)

    return run


def ours() -> dict[str, tuple[tuple[str, ...], Op]]:
    """Name -> (inputs, op)."""
    return {
        "linear attention": (("q", "k", "v"), lambda q, k, v: linear_attention(q, k, v)[0]),
        "constant decay (RetNet)": (
            ("q", "k", "v", "head"),
            lambda q, k, v, g: linear_attention(q, k, v, log_decay=g)[0],
        ),
        "decay per token (Mamba-2)": (
            ("q", "k", "v", "token"),
            lambda q, k, v, g: linear_attention(q, k, v, log_decay=g)[0],
        ),
        "decay per channel (GLA)": (
            ("q", "k", "v", "channel"),
            lambda q, k, v, g: linear_attention(q, k, v, log_decay=g)[0],
        ),
        "exponential features": (
            ("q", "k", "v"),
            lambda q, k, v: linear_attention(q, k, v, normalize=True, log_features=True)[0],
        ),
        "gated delta rule": (
            ("q", "k", "v", "beta", "token"),
            lambda q, k, v, b, g: delta_rule(q, k, v, b, log_decay=g)[0],
        ),
        "delta rule, decay per channel": (
            ("q", "k", "v", "beta", "channel"),
            lambda q, k, v, b, g: delta_rule(q, k, v, b, log_decay=g)[0],
        ),
        "RWKV-7": (("q", "channel", "k", "v", "a", "b"), lambda *x: rwkv7(*x)[0]),
        "RWKV-4": (("key", "x", "w", "u"), lambda *x: wkv(*x)[0]),
        "short convolution": (("x", "weight"), lambda x, weight: causal_conv1d(x, weight, activation="silu")[0]),
    }


def peers(device: torch.device) -> dict[str, dict[str, tuple[Op, int]]]:
    """Our name -> peer's name -> (op on the same inputs, the longest T it is given)."""
    found: dict[str, dict[str, tuple[Op, int]]] = {name: {} for name in ours()}
    longest = LENGTHS[-1]

    def softmax(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    def quadratic(q, k, v, g):
        q, k, v, sums = (x.transpose(1, 2) for x in (q, k, v, g.cumsum(1)))
        decays = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril()
        return ((q @ k.mT * decays * K**-0.5) @ v).transpose(1, 2)

    def shifted(x, weight):
        return F.silu(F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], groups=D)).mT

    found["linear attention"]["softmax attention (SDPA), not the same function"] = (softmax, QUADRATIC * 4)
    found["decay per token (Mamba-2)"]["all pairs in torch"] = (quadratic, QUADRATIC)
    found["short convolution"]["F.conv1d"] = (shifted, longest)
    if device.type == "cuda":
        fla_peers(found)
        return found
    try:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
        from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu
    except ImportError as error:
        print(f"transformers left out: {error}")
        return found

    def mamba2(q, k, v, g):  # its decay is A * dt and its value x * dt
        x, A = v / -g[..., None], -torch.ones(H)
        return mamba2_chunk_scan(x, -g, A, k, q * K**-0.5, chunk_size=64, return_final_states=True)[0]

    found["decay per token (Mamba-2)"]["transformers Mamba-2"] = (mamba2, QUADRATIC * 4)
    found["gated delta rule"]["transformers Qwen3-Next"] = (
        lambda q, k, v, b, g: torch_chunk_gated_delta_rule(q, k, v, g, b)[0],
        longest,
    )
    found["delta rule, decay per channel"]["transformers Kimi"] = (
        lambda q, k, v, b, g: chunk_kimi_delta_attention(q, k, v, g, b)[0],
        QUADRATIC,
    )
    found["RWKV-4"]["transformers RWKV (loop)"] = (
        lambda k, v, w, u: rwkv_linear_attention_cpu((-w).log(), u, k, v)[0],
        LOOPS,
    )
    return found


def fla_peers(found: dict[str, dict[str, tuple[Op, int]]]) -> None:
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        print(f"fla left out: {error}")
        return
    longest = LENGTHS[-1]
    found["linear attention"]["fla"] = (lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)[0], longest)
    found["decay per token (Mamba-2)"]["fla"] = (lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0], longest)
    found["decay per channel (GLA)"]["fla"] = (lambda q, k, v, g: chunk_gla(q, k, v, g)[0], longest)
    found["gated delta rule"]["fla"] = (lambda q, k, v, b, g: chunk_gated_delta_rule(q, k, v, g, b)[0], longest)


def agrees(name: str, peer: str, op: Op, reference: Op, tensors: list[Tensor]) -> bool:
    """Whether a peer computes what we do, as far as tf32 can tell: no speed beside a wrong answer."""
    with torch.no_grad():
        got, wanted = op(*tensors), reference(*tensors)
    error = ((got - wanted).abs().max() / wanted.abs().max()).item()
    if not error < 2e-3:
        print(f"{peer} left out: it and ours disagree on {name}, relative error {error:.1e}")
        return False
    return True


def measure(T: int, device: torch.device, seconds: float) -> list[tuple[str, float, float]]:
    """Rows (name, forward ms, forward+backward ms), the ceiling first; a peer follows the op that it computes."""
    named = inputs(T, device)
    both, forward = {}, {"matrix products": common.synchronized(matrix_products(T, device), device)}
    found = peers(device)
    for name, (args, op) in ours().items():
        tensors = [named[arg] for arg in args]
        runs = {name: op} | {f"- {peer}": f for peer, (f, longest) in found[name].items() if longest >= T}
        for label, f in runs.items():
            if label != name and "not the same" not in label and not agrees(name, label, f, op, tensors):
                continue
            leaves = [x.detach().requires_grad_() for x in tensors]

            def backward(f=f, leaves=leaves):
                o = f(*leaves)
                return torch.autograd.grad(o, leaves, torch.ones_like(o))

            def no_grad(f=f, tensors=tensors):
                with torch.no_grad():
                    return f(*tensors)

            forward[label], both[label] = common.synchronized(no_grad, device), common.synchronized(backward, device)
    times = common.best_times(forward, seconds)
    times_both = common.best_times(both, seconds)
    return [(name, ms, times_both.get(name, float("nan"))) for name, ms in times.items()]


def decoding(device: torch.device) -> str:
    """Microseconds of one decoding step, B = 1, on one thread."""
    calls, named = 100, {n: v[:1, :1] if v.ndim > 2 else v for n, v in inputs(1, device).items()}
    q, k, v, b, g, channel = (named[n] for n in ("q", "k", "v", "beta", "token", "channel"))
    S, x = torch.randn(1, H, K, K, device=device), named["x"]
    z, wide = torch.ones(1, H, K, device=device), torch.ones(1, D, device=device)
    steps: dict[str, Callable[[], object]] = {
        "S * 2": lambda: S * 2,
        "linear attention": lambda: linear_attention(q, k, v, S),
        "decay per token": lambda: linear_attention(q, k, v, S, log_decay=g),
        "decay per channel": lambda: linear_attention(q, k, v, S, log_decay=channel),
        "exponential features": lambda: linear_attention(
            q, k, v, NormalizedState(S, z, z), normalize=True, log_features=True
        ),
        "gated delta rule": lambda: delta_rule(q, k, v, b, S, log_decay=g),
        "RWKV-7": lambda: rwkv7(q, channel, k, v, named["a"], named["b"], S),
        "RWKV-4": lambda: wkv(named["key"], x, named["w"], named["u"], WKVState(0 * wide, wide, wide)),
        "short convolution": lambda: causal_conv1d(x, named["weight"], None, torch.zeros(1, 3, D, device=device)),
    }
    with torch.inference_mode():
        runs = {n: common.synchronized(lambda f=f: [f() for _ in range(calls)], device) for n, f in steps.items()}
        times = common.best_times(runs)
    return "; ".join(f"{name} {1e3 * ms / calls:.0f} us" for name, ms in times.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each function, at each length")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    torch.manual_seed(0)
    lines = [common.head("Linear attention and its family", "linrnn", "transformers", "flash-linear-attention")]
    lines += [
        f"B = {B}, H = {H}, K = V = {K} (RWKV-4 and the convolution: D = {D}), float32, chunks of 64 (RWKV-7: 32).",
        "Milliseconds; in brackets the ratio of the forward to the matrix products, of both to the forward.",
        "A line that begins with - is a peer, on the inputs of the op above it.",
        "",
    ]
    for T in args.lengths:
        rows = measure(T, device, args.seconds)
        ceiling = rows[0][1]
        lines += [f"## T = {T}", "", "| | forward | forward + backward |", "| --- | ---: | ---: |"]
        for name, forward, both in rows:
            cell = f"{both:.2f} ({both / forward:.1f})" if both == both else "-"
            lines.append(f"| {name} | {forward:.2f} ({forward / ceiling:.2f}) | {cell} |")
        lines.append("")
        print("\n".join(lines[-len(rows) - 5 :]), flush=True)
    torch.set_num_threads(1)
    lines += [f"One decoding step, B = 1, float32, one thread: {decoding(device)}.", ""]
    print(lines[-2])
    if not args.no_write:
        where = f"cpu_{args.threads}threads" if device.type == "cpu" else "gpu"
        path = common.RESULTS / f"linear_attention_{where}.md"
        path.write_text("\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
