"""A training step of one LRU layer beside one of a softmax attention layer: from which length is the LRU faster?

    python benchmarks/layer_gpu.py                          # under 100 s; writes benchmarks/results/
    python benchmarks/layer_gpu.py --compile                # both layers under torch.compile as well
    python benchmarks/layer_gpu.py --device cpu --dry-run   # tiny shapes, host clock: does the script itself work?

Forward and backward in bf16 autocast, with gradients of the input and all parameters, at a constant number of tokens,
so that only the length of the sequences changes. The layers have equal width and as many parameters, within 1 %: the
LRU has as many complex states as channels. Attention is `linrnn.layers.Attention` over scaled_dot_product_attention,
with rotary positions and, to leave it every advantage, without any. The LRU is compared with the fastest of them.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import common
import torch
from torch import Tensor, nn

from linrnn import layers

TOKENS = 65536
WIDTHS = (512, 256, 1024)
LENGTHS = tuple(2**n for n in range(8, 17))
GOAL = (512, 1024)  # at this width, the LRU is to be faster from this length
Times = dict[int, dict[str, float]]  # milliseconds by length and name


def contestants(d_model: int, compiled: bool) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {
        "LRU": layers.build("lru", d_model),
        "attention": layers.build("attention", d_model),
        "attention, no positions": layers.build("attention", d_model, positions="nope"),
    }
    sizes = {name: sum(p.numel() for p in layer.parameters()) for name, layer in found.items()}
    if max(sizes.values()) > 1.01 * min(sizes.values()):
        raise SystemExit(f"the layers are not of one size: {sizes}")
    if compiled:
        found |= {f"{name}, compiled": torch.compile(layer) for name, layer in found.items()}
    return found


def step(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; the gradients of x and of the parameters."""
    with torch.autocast(x.device.type, torch.bfloat16):
        y, _ = layer(x)
    return torch.autograd.grad(y, (x, *layer.parameters()), g.to(y.dtype))


def check(found: dict[str, nn.Module], x: Tensor, g: Tensor) -> None:
    """No speed beside a wrong answer: the LRU in bf16 autocast against itself in double precision, on the CPU."""
    for name, layer in found.items():
        if any(not v.isfinite().all() for v in step(layer, x, g)):
            raise SystemExit(f"{name}: a gradient is not finite at {tuple(x.shape)}")
    small = x[:1, :256].detach()
    exact = layers.build("lru", x.shape[-1]).double()
    exact.load_state_dict({name: v.double() for name, v in found["LRU"].state_dict().items()})
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        y = found["LRU"](small)[0].double().cpu()
        wanted = exact(small.double().cpu())[0]
    error = ((y - wanted).norm() / wanted.norm()).item()
    if not error < 2e-2:
        raise SystemExit(f"the LRU layer is off by {error:.1e} at {tuple(small.shape)}")


def measure(
    d_model: int, lengths: tuple[int, ...], tokens: int, device: torch.device, seconds: float, compiled: bool
) -> Times:
    found = {name: layer.to(device) for name, layer in contestants(d_model, compiled).items()}
    times: Times = {}
    for T in lengths:
        x = torch.randn(tokens // T, T, d_model, device=device, requires_grad=True)
        g = torch.randn_like(x)
        if T == lengths[0]:
            check(found, x, g)
        calls = {name: lambda _, layer=layer: step(layer, x, g) for name, layer in found.items()}  # noqa: B023
        times[T] = common.median_times(calls, device, seconds, least=3, block_ms=20 * seconds)
    return times


def crossover(times: Times) -> tuple[int | None, float | None]:
    """The shortest measured length from which on the LRU is always faster than the fastest attention, and where the
    two lines cross, interpolated between the last length that it loses and the first that it wins."""
    ratios = {}
    for T, row in times.items():
        best = {kind: min(ms for name, ms in row.items() if name.startswith(kind)) for kind in ("LRU", "attention")}
        ratios[T] = best["attention"] / best["LRU"]
    lost = [T for T, ratio in ratios.items() if ratio <= 1]
    won = [T for T in ratios if not lost or T > max(lost)]
    if not won:
        return None, None
    if not lost:
        return min(won), None
    before, after = max(lost), min(won)
    share = math.log(ratios[before]) / (math.log(ratios[before]) - math.log(ratios[after]))
    return after, before * (after / before) ** share


def verdict(d_model: int, times: Times) -> str:
    first, crossing = crossover(times)
    if first is None:
        text = f"d = {d_model}: attention is still faster at T = {max(times)}"
    else:
        where = f"the lines cross at about {crossing:.0f}" if crossing else "the shortest measured"
        text = f"d = {d_model}: the LRU layer is faster from T = {first} on ({where})"
    if d_model == GOAL[0]:
        met = first is not None and first <= GOAL[1]
        text += f"; goal T = {GOAL[1]}: {'met' if met else 'MISSED'}"
    return text


def table(d_model: int, tokens: int, times: Times) -> list[str]:
    names = list(next(iter(times.values())))
    lines = [f"## d = {d_model}", "", f"| T | B | {' | '.join(names)} | attention / LRU |"]
    lines.append("| ---: " * (len(names) + 3) + "|")
    for T, row in times.items():
        lru = min(ms for name, ms in row.items() if name.startswith("LRU"))
        attention = min(ms for name, ms in row.items() if name.startswith("attention"))
        cells = " | ".join(f"{ms:.3f}" for ms in row.values())
        lines.append(f"| {T} | {tokens // T} | {cells} | {attention / lru:.2f} |")
    return [*lines, "", f"**{verdict(d_model, times)}.**", ""]


def save_plot(everything: dict[int, Times], tokens: int, path: Path) -> None:
    """Milliseconds over the length, a panel for each width, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(everything), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(everything), squeeze=False)[0]
    for axis, (d_model, times) in zip(panels, sorted(everything.items()), strict=True):
        for name in next(iter(times.values())):
            colour = "#1f5fa8" if name.startswith("LRU") else "#d9711c"
            style = ":" if "compiled" in name else "--" if "no positions" in name else "-"
            values = [row[name] for row in times.values()]
            axis.plot(list(times), values, style, marker="o", markersize=4, color=colour, label=name)
        first, crossing = crossover(times)
        if first is not None:
            axis.axvline(crossing or first, color="0.6", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"d = {d_model}, {tokens} tokens")
        axis.set_xlabel("T")
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("training step of one layer (ms)")
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, next to no repetitions, any device")
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--compile", action="store_true", help="measure both layers under torch.compile as well")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the table and the plot")
    args = parser.parse_args()
    if args.device == "cpu" and not args.dry_run:
        parser.error("--device cpu measures nothing that is of use: add --dry-run")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --device cpu --dry-run tries the script")
    device, start = torch.device(args.device), time.monotonic()
    torch.manual_seed(0)
    tokens, lengths, widths, seconds = TOKENS, LENGTHS, args.widths, 0.1
    if args.dry_run:
        tokens, lengths, widths, seconds = 64, (8, 32, 64), (128,), 0.001
    path = args.out / f"layer_{common.device_slug(device)}{'_dry_run' if args.dry_run else ''}.md"

    lines = [common.head("Training step of one layer: LRU against softmax attention", "linrnn", device=device)]
    lines += [
        f"Milliseconds of forward and backward in bf16 autocast, {tokens} tokens a batch; median of events. "
        "The last column compares the fastest LRU with the fastest attention of its row.",
        "",
    ]
    print("\n".join(lines), flush=True)
    everything: dict[int, Times] = {}
    for d_model in widths:
        everything[d_model] = measure(d_model, lengths, tokens, device, seconds, args.compile)
        new = table(d_model, tokens, everything[d_model])
        print("\n".join(new), flush=True)
        lines += new
        common.write_whole(path, "\n".join(lines))
    save_plot(everything, tokens, path.with_suffix(".png"))
    common.write_whole(path, "\n".join([*lines, f"![milliseconds over T]({path.with_suffix('.png').name})", ""]))
    print(f"wrote {path} in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
