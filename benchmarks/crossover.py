"""Measured time of attention, LRU and linear attention against the length, and where they should cross by their counts.

    pip install -e '.[bench]' && python benchmarks/crossover.py     # minutes; writes benchmarks/results/
    python benchmarks/crossover.py --lengths 64 256 1024 --no-write

One sequence through one layer of width D: causal softmax attention, an LRU, linear attention, and beside them the
feed-forward network of 8 D² weights that a Transformer has. All run in one process, interleaved, and the fastest run
counts; memory is warm. Forward + backward takes the gradients of the input and of every parameter. A layer that takes
longer than `--most` seconds at a length is left out at greater ones.

A predicted crossover is `linrnn.crossover`: from that T on attention does more multiplications than the other layer. A
measured one is where it begins to take longer for good, between two lengths on straight lines of log time over log T.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from torch import nn

from linrnn import crossover, flops, layers

LENGTHS = tuple(2**i for i in range(4, 14))
D = 256
ATTENTION = "attention"
KINDS = ("forward", "forward + backward")
Times = dict[str, dict[int, float]]  # of each layer, milliseconds by length


@dataclass(frozen=True)
class Crossing:
    """From which length on attention costs more than another layer; None: not within the lengths measured."""

    other: str
    predicted: int | None
    measured: dict[str, float | None]  # by kind


def modules(d_model: int) -> dict[str, nn.Module]:
    """What is measured, by name: attention, and what it is compared with."""
    ffn = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))
    found: dict[str, nn.Module] = {name: layers.build(name, d_model) for name in (ATTENTION, "lru", "linear_attention")}
    return found | {"feed-forward": ffn}


def calls(layer: nn.Module, T: int, d_model: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Forward, and forward + backward, of one sequence of T tokens."""
    x = torch.randn(1, T, d_model, device=device, requires_grad=True)
    sources = [x, *layer.parameters()]

    def output() -> torch.Tensor:
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def forward() -> object:
        with torch.no_grad():
            return output()

    def both() -> object:
        y = output()
        return torch.autograd.grad(y, sources, torch.ones_like(y), allow_unused=True)

    return {kind: common.synchronized(run, device) for kind, run in zip(KINDS, (forward, both), strict=True)}


def measure(found: dict[str, nn.Module], lengths: list[int], d_model: int, device, seconds: float, most: float):
    """Milliseconds of every layer at every length, by kind."""
    times: dict[str, Times] = {kind: {name: {} for name in found} for kind in KINDS}
    for before, T in zip([None, *lengths], lengths, strict=False):
        for kind in KINDS:
            done = times[kind]
            runs = {
                name: calls(layer, T, d_model, device)[kind]
                for name, layer in found.items()
                if before is None or done[name].get(before, math.inf) <= 1e3 * most
            }
            for name, ms in common.best_times(runs, seconds).items():
                done[name][T] = ms
        print(f"T = {T}: " + ", ".join(f"{name} {ms[T]:.2f} ms" for name, ms in times[KINDS[0]].items() if T in ms))
    return times


def measured_crossover(a: dict[int, float], b: dict[int, float]) -> float | None:
    """The length from which on a takes longer than b for good, or None; the first length where it always does."""
    lengths = sorted(set(a) & set(b))
    ratios = [math.log(a[T] / b[T]) for T in lengths]
    last = max((i for i, ratio in enumerate(ratios) if ratio <= 0), default=-1)
    if last == len(lengths) - 1:
        return None
    if last < 0:
        return float(lengths[0])
    share = ratios[last] / (ratios[last] - ratios[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def crossings(found: dict[str, nn.Module], times: dict[str, Times]) -> list[Crossing]:
    """Of attention with each of the others."""
    return [
        Crossing(
            name,
            crossover(found[ATTENTION], layer),
            {kind: measured_crossover(done[ATTENTION], done[name]) for kind, done in times.items()},
        )
        for name, layer in found.items()
        if name != ATTENTION
    ]


def report(found: dict[str, nn.Module], times: dict[str, Times], d_model: int) -> list[str]:
    """Tables: crossovers, and milliseconds with the multiplications of a forward pass."""
    lines = ["| attention costs more than | predicted from T = | measured, forward | measured, forward + backward |"]
    lines.append("| --- | ---: | ---: | ---: |")
    shortest = min(next(iter(times[KINDS[0]].values())))
    for crossing in crossings(found, times):
        cells = []
        for T in crossing.measured.values():
            cells.append("not within these lengths" if T is None else f"<= {T:.0f}" if T <= shortest else f"{T:.0f}")
        lines.append(f"| {crossing.other} | {crossing.predicted or 'never'} | " + " | ".join(cells) + " |")
    lines += ["", f"The T² in attention's 4 T D² + 2 T² D is more than half of it from T = {2 * d_model + 1} on.", ""]
    for kind, done in times.items():
        lines += [f"## {kind}, ms", "", "| T | " + " | ".join(done) + " |", "| ---: |" + " ---: |" * len(done)]
        for T in sorted({T for of_layer in done.values() for T in of_layer}):
            cells = (f"{of_layer[T]:.2f}" if T in of_layer else "-" for of_layer in done.values())
            lines.append(f"| {T} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        "## multiplications, millions",
        "",
        "| T | " + " | ".join(found) + " |",
        "| ---: |" + " ---: |" * len(found),
    ]
    for T in sorted(times[KINDS[0]][ATTENTION]):
        lines.append(f"| {T} | " + " | ".join(f"{flops(layer, T) / 1e6:.1f}" for layer in found.values()) + " |")
    return [*lines, ""]


def save_plot(found: dict[str, nn.Module], times: dict[str, Times], d_model: int, path: Path) -> None:
    """Microseconds of a token over the length, a panel for each kind; dotted lines: where attention should cross."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    colours = {name: f"C{i}" for i, name in enumerate(found)}
    for axis, (kind, done) in zip(figure.subplots(1, 2, sharex=True), times.items(), strict=True):
        for name, of_layer in done.items():
            per_token = [1e3 * ms / T for T, ms in of_layer.items()]
            axis.plot(list(of_layer), per_token, "o-", markersize=4, color=colours[name], label=name)
        for crossing in crossings(found, times):
            if crossing.predicted is not None:
                label = f"{crossing.other}: predicted from {crossing.predicted}"
                axis.axvline(crossing.predicted, linestyle=":", color=colours[crossing.other], label=label)
            T = crossing.measured[kind]
            if T is not None and T > min(done[ATTENTION]):
                label = f"{crossing.other}: measured from {T:.0f}"
                axis.axvline(T, linestyle="-", linewidth=0.8, color=colours[crossing.other], label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{kind}, D = {d_model}")
        axis.set_xlabel("T")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    figure.axes[0].set_ylabel("microseconds a token")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--d-model", type=int, default=D)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each layer, at each length and kind")
    parser.add_argument("--most", type=float, default=4.0, help="seconds of a call after which a layer is left out")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    if device.type == "cpu":
        common.keep_memory_warm()
    torch.manual_seed(0)
    lines = [common.head("Where attention begins to cost more", "linrnn", device=device)]
    found = {name: layer.to(device) for name, layer in modules(args.d_model).items()}
    times = measure(found, sorted(set(args.lengths)), args.d_model, device, args.seconds, args.most)
    heads = found[ATTENTION].n_heads
    lines += [f"One sequence, D = {args.d_model}, {heads} heads of {args.d_model // heads}, float32.", ""]
    lines += report(found, times, args.d_model)
    print("\n".join(lines))
    if not args.no_write:
        where = f"cpu_{args.threads}threads" if device.type == "cpu" else common.device_slug(device)
        path = common.RESULTS / f"crossover_{where}.md"
        save_plot(found, times, args.d_model, path.with_suffix(".png"))
        common.write_whole(path, "\n".join([*lines, f"![time of a token]({path.stem}.png)", ""]))
        print(f"wrote {path} and {path.stem}.png")


if __name__ == "__main__":
    main()
