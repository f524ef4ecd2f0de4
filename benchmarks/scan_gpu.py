"""diagonal_scan on a GPU beside a copy and torch.add of the same bytes and the scans of the peers.

    pip install accelerated-scan fla-core    # and mamba-ssm, where it can be built; those that are missing are named
    python benchmarks/scan_gpu.py                    # everything, many minutes; writes benchmarks/results/
    python benchmarks/scan_gpu.py --quick            # three shapes, three dtypes, under 150 s
    python benchmarks/scan_gpu.py --sweep            # the launch plans around the one that the rule chooses
    python benchmarks/scan_gpu.py --device cpu --dry-run    # tiny shapes, host clock: does the script itself work?

A time is the median of blocks of calls between CUDA events, going round sets of inputs larger than the L2 cache.
GB/s count only the bytes that must move (each input read once, each output written once; nothing for a constant a),
and the share is that of the bandwidth of a large copy, read and write counted. No speed stands beside a wrong answer:
everything is compared with the scan in double precision at the shape that is measured.
"""

import argparse
import sys
import time
from pathlib import Path

import common
import scan_launch
import scan_peers
import scan_sweep
import torch
from scan_cases import (
    CASES,
    DRY_LENGTHS,
    DRY_SHAPES,
    LENGTHS,
    NARROW,
    QUICK_CASES,
    QUICK_SHAPES,
    SHAPES,
    Case,
    Shape,
)
from scan_report import OURS, Result, goals, save_plot, table
from torch import Tensor

from linrnn.ops import diagonal_scan


def ours(a: Tensor, x: Tensor) -> Tensor:
    return diagonal_scan(a, x, backend="cuda" if x.is_cuda else "auto")[0]


def exact(a: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h and the gradients of x and of a written out, in double precision and by the torch form."""
    wide = torch.complex128 if x.is_complex() else torch.float64
    a = a.to(wide if a.is_complex() else torch.float64).expand(x.shape).contiguous().requires_grad_()
    x = x.to(wide).requires_grad_()
    h = diagonal_scan(a, x, backend="torch")[0]
    grad_a, grad_x = torch.autograd.grad(h, (a, x), g.to(wide))
    return h.detach(), grad_x, grad_a


def measure(
    shape: Shape, case: Case, peers: list[scan_peers.Peer], device: torch.device, seconds: float, patience: float
) -> Result:
    """Everything at one shape. A peer that is wrong or fails is left out and named; one that takes longer than
    `patience` seconds leaves `peers` for good."""
    result = Result(shape, case)
    count = common.rounds(case.both_bytes(shape), device)
    sets = [case.inputs(shape, device) for _ in range(count)]
    wanted = exact(*sets[0])
    mine = scan_peers.Peer(OURS, ours, constant=True, accepts=lambda a, x: True)
    error, fault = mine.wrong(*sets[0], wanted)
    if fault:
        raise SystemExit(f"linrnn is wrong at {shape} {case.name}: {fault}")
    result.errors[OURS] = error

    measure_ours(result, mine, sets, device, seconds)
    for peer in tuple(peers):
        if not peer.accepts(*sets[0][:2]):
            continue
        try:
            with common.time_limit(patience):
                result.errors[peer.name], fault = peer.wrong(*sets[0], wanted)
                if fault:
                    result.left_out.append(f"{peer.name}: {fault}")
                    continue
                times = measure_peer(peer, sets, device, seconds / 2)
                result.forward[peer.name], result.both[peer.name] = times
        except Exception as error:  # whatever a peer raises, the others are measured
            if isinstance(error, TimeoutError):
                peers.remove(peer)
            result.left_out.append(f"{peer.name}: {scan_peers.first_line(error)}")
    return result


def measure_ours(result: Result, mine: scan_peers.Peer, sets: list, device: torch.device, seconds: float) -> None:
    """Times a copy, torch.add and ours, taking turns."""
    shape, case, count = result.shape, result.case, len(sets)
    leaves = [mine.inputs(a, x) for a, x, _ in sets]
    to_copy, to_copy_twice = (
        [torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device=device) for _ in range(count)]
        for size in (case.forward_bytes(shape), case.both_bytes(shape))
    )
    forward = {
        "copy": lambda i: to_copy[i % count].clone(),
        "torch.add": lambda i: torch.add(*sets[i % count][:2], out=torch.empty_like(sets[i % count][1])),
        OURS: lambda i: ours(*sets[i % count][:2]),
    }
    both = {
        "copy": lambda i: to_copy_twice[i % count].clone(),
        OURS: lambda i: torch.autograd.grad(ours(*leaves[i % count]), leaves[i % count], sets[i % count][2]),
    }
    with torch.no_grad():
        result.forward = common.median_times(forward, device, seconds)
        if sets[0][1].nbytes < 16 << 20 or shape == NARROW:  # where launches may cost as much as the kernels
            calls = 4 * count
            graphs = {name: common.captured(function, calls, device) for name, function in forward.items()}
            times = common.median_times(graphs, device, seconds, block_ms=0.1)
            result.graph = {name: ms / calls for name, ms in times.items()}
    result.both = common.median_times(both, device, seconds)


def measure_peer(peer: scan_peers.Peer, sets: list, device: torch.device, seconds: float) -> tuple[float, float]:
    own = [(*peer.inputs(a, x), peer.layout(g)) for a, x, g in sets]

    def forward(i: int) -> Tensor:
        return peer.scan(*own[i % len(own)][:2])

    def both(i: int) -> tuple[Tensor, ...]:
        gate, value, g = own[i % len(own)]
        h = peer.scan(gate, value)
        return torch.autograd.grad(h, (gate, value), g.to(h.dtype))

    with torch.no_grad():
        first = common.median_times({"": forward}, device, seconds, least=3)[""]
    return first, common.median_times({"": both}, device, seconds, least=3)[""]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, next to no repetitions, any device")
    parser.add_argument("--quick", action="store_true", help="three shapes, three dtypes, fewer peers")
    parser.add_argument(
        "--peers",
        choices=("all", "quick", "none"),
        help="which others (default: all; --quick: those that compile fast)",
    )
    parser.add_argument("--sweep", action="store_true", help="only: time the launch plans around the rule's own")
    parser.add_argument("--shapes", nargs="*", metavar="B,T,D", help="these shapes instead")
    parser.add_argument("--cases", nargs="*", choices=CASES, help="these dtypes instead")
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing new after this long (600)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the tables")
    args = parser.parse_args()
    if args.device == "cpu" and not args.dry_run:
        parser.error("--device cpu measures nothing that is of use: add --dry-run")
    if not args.device.startswith(("cuda", "cpu")):
        parser.error(f"--device: expected cuda, cuda:N or cpu, got {args.device}")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --device cpu --dry-run tries the script")
    try:
        args.shapes = args.shapes and [tuple(map(int, s.split(","))) for s in args.shapes]
    except ValueError:
        parser.error(f"--shapes: expected B,T,D with whole numbers, got {' '.join(args.shapes)}")
    if any(len(s) != 3 or min(s) < 1 for s in args.shapes or ()):
        parser.error("--shapes: expected three numbers B,T,D, each at least 1")
    return args


def main() -> None:
    args, start = arguments(), time.monotonic()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)
    torch.manual_seed(0)
    cases = [CASES[name] for name in args.cases or (QUICK_CASES if args.quick or args.dry_run else CASES)]
    shapes = args.shapes or (DRY_SHAPES if args.dry_run else QUICK_SHAPES if args.quick else SHAPES)
    seconds, patience = (0.002, 20.0) if args.dry_run else (0.1, 20.0) if args.quick else (0.2, 90.0)
    slug = common.device_slug(device) + ("_dry_run" if args.dry_run else "_quick" if args.quick else "")
    path = args.out / f"scan{'_sweep' if args.sweep else ''}_{slug}.md"

    packages = ("linrnn", "triton", "accelerated-scan", "fla-core", "mamba-ssm")
    lines = [common.head("Diagonal scan on a GPU", *packages, device=device)]
    bandwidth = common.copy_bandwidth(device, 1 << 20 if args.dry_run else 2 << 30)
    lines += [f"Copy within the device: {bandwidth / 1e9:.0f} GB/s, read and write counted.", ""]

    def publish(*new: str) -> None:
        lines.extend(new)
        print("\n".join(new), flush=True)
        common.write_whole(path, "\n".join(lines))

    print("\n".join(lines), flush=True)
    if args.sweep:
        for text in scan_sweep.sweep(shapes, cases, device, bandwidth, seconds, start + args.seconds):
            publish(text)
        print(f"wrote {path}")
        return
    which = args.peers or ("quick" if args.quick else "all")
    peers, missing = ([], []) if which == "none" else scan_peers.find(which == "quick")
    publish(*(f"- not here: {text}" for text in missing), "")
    results, lengths, late = [], [], []
    for shape in shapes:
        for case in cases:
            if time.monotonic() - start > args.seconds:
                late.append(f"{shape} {case.name}")
                continue
            results.append(measure(shape, case, peers, device, seconds, patience))
            publish(*table(results[-1], bandwidth))
    publish("## Launching", "", *scan_launch.report(device, args.dry_run), "")
    for shape in DRY_LENGTHS if args.dry_run else () if args.quick or args.shapes else LENGTHS:
        for case in cases:
            if time.monotonic() - start > args.seconds:
                late.append(f"{shape} {case.name}")
                continue
            lengths.append(measure(shape, case, [], device, seconds, patience))
            publish(*table(lengths[-1], bandwidth))
    if lengths:
        save_plot(lengths, bandwidth, path.with_suffix(".png"))
        publish(f"![share of the copy bandwidth over the length]({path.with_suffix('.png').name})", "")
    if late:
        publish(f"Not reached within {args.seconds:.0f} s: {'; '.join(late)}.", "")
    publish("## Goals", "", *goals(results + lengths, bandwidth), "")
    print(f"wrote {path} in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
