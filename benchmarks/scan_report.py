"""What benchmarks/scan_gpu.py prints of its measurements: tables, goals met or missed, and a plot."""

from dataclasses import dataclass, field
from pathlib import Path

from scan_cases import BIG, NARROW, SMALL, Case, Shape, elements

OURS = "linrnn"


@dataclass
class Result:
    """Milliseconds by name at one shape; `both` is forward + backward, `graph` the forward replayed in a graph."""

    shape: Shape
    case: Case
    forward: dict[str, float] = field(default_factory=dict)
    both: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def table(result: Result, bandwidth: float) -> list[str]:
    """Rows of milliseconds, GB/s, share of the copy bandwidth and ratio to ours."""
    case, shape = result.case, result.shape
    lines = [
        f"## {shape} {case.name}",
        "",
        "| | forward ms | GB/s | share | x linrnn | forward + backward ms | GB/s | share | x linrnn | error |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in result.forward:
        cells = []
        for times, size in ((result.forward, case.forward_bytes(shape)), (result.both, case.both_bytes(shape))):
            if name not in times:
                cells += ["-"] * 4
                continue
            rate = size / times[name] * 1e3
            cells += [f"{times[name]:.4f}", f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}"]
            cells.append(f"{times[name] / times[OURS]:.2f}")
        cells.append(f"{result.errors[name]:.0e}" if name in result.errors else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    if result.graph:
        parts = (f"{name} {1e3 * ms:.2f} us" for name, ms in result.graph.items())
        lines += [f"Forward replayed in a CUDA graph: {', '.join(parts)}.", ""]
    lines += [f"- left out: {text}" for text in result.left_out]
    return [*lines, ""] if result.left_out else lines


def goals(results: list[Result], bandwidth: float) -> list[str]:
    """One line per goal and measurement, met or missed."""
    lines = []

    def judge(met: bool, text: str) -> None:
        lines.append(f"- {'met' if met else 'MISSED'}: {text}")

    for r in results:
        where = f"{r.shape} {r.case.name}"
        forward = r.case.forward_bytes(r.shape) / r.forward[OURS] * 1e3 / bandwidth
        both = r.case.both_bytes(r.shape) / r.both[OURS] * 1e3 / bandwidth
        if elements(r.shape) * r.case.x.itemsize >= BIG:
            judge(forward >= 0.9, f"{where}: forward at {forward:.0%} of the copy (goal 90 %)")
            judge(both >= 0.85, f"{where}: forward + backward at {both:.0%} of the copy (goal 85 %)")
        if r.shape == NARROW:
            for how, times in (("called", r.forward), ("in a CUDA graph", r.graph)):
                if OURS in times:
                    share = r.case.forward_bytes(r.shape) / times[OURS] * 1e3 / bandwidth
                    judge(share >= 0.7, f"{where}: {how}, forward at {share:.0%} of the copy (goal 70 %)")
        if r.shape == SMALL:
            for how, times in (("called", r.forward), ("in a CUDA graph", r.graph)):
                ratio = times[OURS] / times["torch.add"]
                judge(ratio <= 2, f"{where}: {how}, forward takes {ratio:.2f} times torch.add (goal 2)")
        for what, times in (("forward", r.forward), ("forward + backward", r.both)):
            peers = {name: ms for name, ms in times.items() if not name.startswith((OURS, "copy", "torch.add"))}
            if peers:
                best = min(peers, key=peers.__getitem__)
                ratio = peers[best] / times[OURS]
                judge(ratio > 1, f"{where}: {what}, the fastest peer ({best}) takes {ratio:.2f} times as long")
    return lines


def save_plot(results: list[Result], bandwidth: float, path: Path) -> None:
    """Share of the copy bandwidth over the length at a fixed number of tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, kind in zip(figure.subplots(1, 2, sharey=True), ("forward", "both"), strict=True):
        for case in dict.fromkeys(r.case for r in results):
            points = [r for r in results if r.case == case]
            size = (r.case.forward_bytes(r.shape) if kind == "forward" else r.case.both_bytes(r.shape) for r in points)
            shares = [s / getattr(r, kind)[OURS] * 1e3 / bandwidth for s, r in zip(size, points, strict=True)]
            axis.plot([r.shape[1] for r in points], [100 * s for s in shares], "o-", label=case.name)
        axis.set_xscale("log", base=2)
        axis.set_xlabel(f"T, at B T = {results[0].shape[0] * results[0].shape[1]}, D = {results[0].shape[2]}")
        axis.set_title("forward" if kind == "forward" else "forward + backward")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share of the bandwidth of a copy (%)")
    figure.axes[0].set_ylim(0)
    figure.axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
