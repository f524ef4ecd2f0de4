"""Gated attention (GAU, FLASH) and Nyström attention beside softmax attention, at equal numbers of weights.

    pip install -e '.[bench]' && python benchmarks/attention.py     # a quarter of an hour; writes benchmarks/results/
    python benchmarks/attention.py --lengths 1024 --widths 256 --no-write

A block of 12 D² weights mixes B sequences of T tokens: softmax attention (torch's scaled_dot_product_attention) and a
gated feed-forward network of 8 D², which is what two layers of gated attention replace in the paper. Without norms and
residuals. All run in one process, interleaved, and the fastest run counts; memory is warm. Forward + backward takes the
gradients of the input and of every parameter. Where FLASH-pytorch is installed, its layers are timed too: with norms,
biases, relative positions and residuals, and without documents, padding and states.
"""

import argparse
import math
from collections.abc import Callable

import common
import torch
from torch import Tensor, nn

import linrnn
from linrnn import layers
from linrnn.models.ffn import GatedFFN

LENGTHS, WIDTHS, B = (1024, 2048, 4096), (256, 512), 4
BASELINE = "attention + gated network"


class Stack(nn.Module):
    """Layers one after the other, whatever they return beside their output."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            y = part(x)
            x = y[0] if isinstance(y, tuple) else y
        return x


def blocks(d_model: int, bidirectional: bool) -> dict[str, nn.Module]:
    """What is measured, by name; the baseline first."""

    def layer(name: str, **options: str) -> nn.Module:
        return layers.build(name, d_model, bidirectional=bidirectional, **options)

    found: dict[str, nn.Module] = {
        BASELINE: Stack(layer("attention"), GatedFFN(d_model, 8 / 3)),
        "attention alone": Stack(layer("attention")),
        "two GAU": Stack(layer("gau"), layer("gau")),
        "two GAU, softmax_plus": Stack(*(layer("gau", attention="softmax_plus") for _ in range(2))),
        "two FLASH": Stack(layer("flash"), layer("flash")),
    }
    if bidirectional:
        found["Nyström + gated network"] = Stack(layer("nystrom"), GatedFFN(d_model, 8 / 3))
    try:
        import flash_pytorch
    except ImportError:
        return found
    for name in ("GAU", "FLASH"):
        theirs = (getattr(flash_pytorch, name)(dim=d_model, causal=not bidirectional) for _ in range(2))
        found[f"- FLASH-pytorch, two {name}"] = Stack(*theirs)
    return found


def calls(block: nn.Module, x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Forward, and forward + backward."""
    sources = [x.detach().requires_grad_(), *block.parameters()]

    def forward() -> object:
        with torch.no_grad():
            return block(x)

    def both() -> object:
        y = block(sources[0])
        return torch.autograd.grad(y, sources, torch.ones_like(y), allow_unused=True)

    return common.synchronized(forward, x.device), common.synchronized(both, x.device)


def multiplications(block: nn.Module, T: int) -> float:
    """Of a forward pass, or NaN for a peer's block, which nothing is known of."""
    try:
        return sum(linrnn.flops(part, T) for part in block.parts)
    except TypeError:
        return math.nan


def measure(T: int, d_model: int, bidirectional: bool, device: torch.device, seconds: float) -> list[str]:
    """A table: milliseconds, and in brackets how many times those of the baseline."""
    found = {name: block.to(device) for name, block in blocks(d_model, bidirectional).items()}
    x = torch.randn(B, T, d_model, device=device)
    runs = {name: calls(block, x) for name, block in found.items()}
    times = [common.best_times({name: pair[i] for name, pair in runs.items()}, seconds, most=20) for i in (0, 1)]
    base = multiplications(found[BASELINE], T)
    lines = [f"## T = {T}, D = {d_model}, {'both ways' if bidirectional else 'causal'}", ""]
    lines += [
        "| | weights / D² | multiplications | forward | forward + backward |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, block in found.items():
        weights = sum(p.numel() for p in block.parameters()) / d_model**2
        share = multiplications(block, T) / base
        cells = [f"{ms[name]:.1f} ({ms[name] / ms[BASELINE]:.2f})" for ms in times]
        lines.append(
            f"| {name} | {weights:.1f} | {'-' if math.isnan(share) else f'{share:.2f}'} | {' | '.join(cells)} |"
        )
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each block, at each size")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    common.keep_memory_warm()
    torch.manual_seed(0)
    lines = [common.head("Gated attention beside softmax attention", "linrnn", "FLASH-pytorch", device=device)]
    lines += [
        f"B = {B}, float32. Milliseconds; in brackets, and for multiplications (`linrnn.flops`: of all pairs), the",
        f"ratio to {BASELINE}. A line that begins with - is a peer.",
        "",
    ]
    for T in args.lengths:
        for d_model in args.widths:
            for bidirectional in (False, True):
                table = measure(T, d_model, bidirectional, device, args.seconds)
                lines += table
                print("\n".join(table), flush=True)
    if not args.no_write:
        where = f"cpu_{args.threads}threads" if device.type == "cpu" else common.device_slug(device)
        path = common.RESULTS / f"attention_{where}.md"
        common.write_whole(path, "\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
