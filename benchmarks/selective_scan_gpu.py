"""The CUDA kernels of selective_scan against what the machine can do, and their launch plans against others.

    python benchmarks/selective_scan_gpu.py                          # under two minutes; writes benchmarks/results/
    python benchmarks/selective_scan_gpu.py --sweep                  # the plans around the rule's own as well
    python benchmarks/selective_scan_gpu.py --device cpu --dry-run   # tiny shapes, host clock: does the script work?

Times are of the kernels alone, forward (with the states that the backward needs kept) and backward, medians of blocks
of calls between CUDA events. Two floors stand beside them: bytes (each input read once, each output written once) over
the bandwidth of a large copy, and exponentials over the rate of the special function unit, 16 a clock and
multiprocessor, one for each state and token (the backward takes 1.75: decays are computed again). No speed stands
beside a wrong answer: results are compared with the torch form in double precision at a part of the shape. For the
layer and the peers see ssm.py.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import common
import torch
from torch import Tensor

from linrnn.kernels.cuda import properties
from linrnn.kernels.cuda.selective_plan import Plan, Problem, choose_plan, choose_tile
from linrnn.ops import _selective_scan, selective_scan

# B, T, D, N; the first is the one of the goal
SHAPES = ((8, 4096, 2048, 16), (8, 2048, 1024, 16), (32, 1024, 2048, 16), (1, 16_384, 2048, 16), (1, 65_536, 64, 16))
MORE_STATES = ((8, 1024, 2048, 64), (8, 1024, 1024, 128))
DRY = ((1, 40, 6, 16),)
DTYPES = (torch.float32, torch.bfloat16)
SPACING = _selective_scan.SPACING["cuda"]
Shape = tuple[int, int, int, int]


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """x, dt, A, B, C and the gradient of y, as Mamba has them."""
    B, T, D, N = shape
    x, Bs, Cs = (torch.randn(B, T, *last, device=device).to(dtype) for last in ((D,), (1, N), (1, N)))
    dt = 0.1 * torch.rand(B, T, D, device=device)
    A = -torch.arange(1, N + 1, device=device).float().expand(D, N).contiguous()
    return x, dt, A, Bs, Cs, torch.randn(B, T, D, device=device)


def passes(inputs: tuple[Tensor, ...], device: torch.device):
    """forward(plan) and backward(plan); on a CPU, where there is but the rule, by its own kernels."""
    x, dt, A, Bs, Cs, grad = inputs
    kernels = _selective_scan._launcher("cuda" if device.type == "cuda" else "cpu")
    chosen = {} if device.type != "cuda" else {"plan": None}

    def forward(plan: Plan | None = None) -> tuple[Tensor, ...]:
        return kernels.forward(x, dt, A, Bs, Cs, None, None, SPACING, True, **(chosen and {"plan": plan}))

    checkpoints = forward()[2]

    def backward(plan: Plan | None = None) -> tuple[Tensor, ...]:
        return kernels.backward(x, dt, A, Bs, Cs, None, checkpoints, grad, None, SPACING, **(chosen and {"plan": plan}))

    return {"forward": forward, "backward": backward}


def check(inputs: tuple[Tensor, ...], device: torch.device) -> float:
    """The largest error of outputs and gradients, relative to the largest number of each, at a part of the shape."""
    part = tuple(v[:1, :512] if v.ndim > 2 else v for v in inputs)
    results = []
    for dtype, backend in ((None, device.type), (torch.float64, "torch")):
        leaves = [v.detach().to(dtype or v.dtype).requires_grad_() for v in part[:5]]
        y, _ = selective_scan(*leaves, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, part[5].to(y.dtype))])
    return max(((u.double() - v).abs().max() / v.abs().max()).item() for u, v in zip(*results, strict=True))


def floors(shape: Shape, dtype: torch.dtype, bandwidth: float, exponentials: float) -> dict[str, tuple[float, float]]:
    """Milliseconds of bytes and of exponentials, at least, by pass."""
    B, T, D, N = shape
    rows, kept, coefficients = B * T * D, 4 * B * T * D * N / SPACING, 2 * B * T * N * dtype.itemsize
    forward = rows * (dtype.itemsize + 4 + 4) + kept + coefficients
    backward = rows * (2 * dtype.itemsize + 4 + 4 + 4) + kept + 2 * coefficients
    powers = rows * N / exponentials * 1e3
    return {"forward": (forward / bandwidth * 1e3, powers), "backward": (backward / bandwidth * 1e3, powers)}


def clock(device: torch.device) -> float:
    """Hertz of the multiprocessors at most, as the driver says."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", f"--id={device.index or 0}"]
    return 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def rule(shape: Shape, dtype: torch.dtype, backward: bool, device: torch.device) -> Plan:
    B, T, D, N = shape
    problem = Problem(B, T, 1, D, choose_tile(N, False), dtype.itemsize, 4)
    return choose_plan(problem, backward, SPACING, properties(device.index or 0))


def neighbours(plan: Plan, T: int, backward: bool) -> Iterator[Plan]:
    """Other sizes of blocks, of stages (of the forward), and of chunks of time."""
    for threads in (32, 64, 128):
        yield replace(plan, threads=threads)
    for stage in () if backward else (8, 16, 64):
        yield replace(plan, stage=stage, chunk=plan.chunk // stage * stage)
    for parts in (0, 2, 4, 8, 16, 32):
        chunk = -(-T // parts // plan.stage) * plan.stage if parts else 0
        yield replace(plan, chunk=chunk)


def sweep(name: str, call, plan: Plan, T: int, device: torch.device, seconds: float) -> str:
    """A line: the rule's plan and the fastest of its neighbours."""
    times = {plan: common.median_times({"": lambda _: call(plan)}, device, seconds)[""]}
    for other in neighbours(plan, T, name == "backward"):
        if other in times:
            continue
        try:
            times[other] = common.median_times({"": lambda _, p=other: call(p)}, device, seconds)[""]
        except (RuntimeError, ValueError) as error:  # no room for it
            print(f"  {other} does not run: {str(error).splitlines()[0][:100]}")
    best = min(times, key=times.__getitem__)
    return f"- {name}: the rule's {plan} {times[plan]:.3f} ms; the fastest {best} {times[best]:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda (the default), or cpu with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, next to no repetitions")
    parser.add_argument("--sweep", action="store_true", help="also time the launch plans around the rule's own")
    parser.add_argument("--seconds", type=float, default=110, help="begin nothing new after this long (110)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the table")
    args = parser.parse_args()
    if args.device == "cpu" and not args.dry_run:
        parser.error("--device cpu measures nothing that is of use: add --dry-run")
    if args.device != "cpu" and not torch.cuda.is_available():
        parser.error("no GPU: torch.cuda.is_available() is False; --device cpu --dry-run tries the script")
    device, start = torch.device(args.device), time.monotonic()
    torch.manual_seed(0)
    shapes, seconds = (DRY, 0.002) if args.dry_run else (SHAPES + MORE_STATES, 0.1)
    bandwidth = common.copy_bandwidth(device, 1 << 20 if args.dry_run else 2 << 30)
    gpu = device.type == "cuda"
    rate = 16 * torch.cuda.get_device_properties(device).multi_processor_count * clock(device) if gpu else 1e9
    lines = [
        common.head("selective_scan on a GPU", "linrnn", device=device if gpu else None),
        f"Copy within the device: {bandwidth / 1e9:.0f} GB/s; {rate / 1e12:.2f}e12 exponentials a second at most.",
        "",
        "| B, T, D, N | x | pass | ms | bytes at least | exponentials at least | times the larger | error |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    swept = []
    for shape in shapes:
        for dtype in DTYPES:
            if time.monotonic() - start > args.seconds:
                swept.append(f"- not reached: {shape} {dtype}")
                continue
            inputs = make(shape, dtype, device)
            error = check(inputs, device)
            if not error < (2e-2 if dtype == torch.bfloat16 else 1e-4):
                raise SystemExit(f"linrnn is wrong at {shape} {dtype}: off by {error:.1e}")
            calls = passes(inputs, device)
            times = common.median_times({n: lambda _, c=c: c() for n, c in calls.items()}, device, seconds)
            for name, (of_bytes, of_powers) in floors(shape, dtype, bandwidth, rate).items():
                share = times[name] / max(of_bytes, of_powers)
                row = f"| {shape} | {str(dtype)[6:]} | {name} | {times[name]:.3f} | {of_bytes:.3f} | {of_powers:.3f}"
                lines.append(f"{row} | {share:.2f} | {error:.0e} |")
                print(lines[-1], flush=True)
            if args.sweep and gpu:
                for name, call in calls.items():
                    plan = rule(shape, dtype, name == "backward", device)
                    swept.append(f"{sweep(name, call, plan, shape[1], device, seconds)}; {shape} {dtype}")
                    print(swept[-1], flush=True)
    lines += ["", *swept, ""] if swept else [""]
    path = args.out / f"selective_scan_{common.device_slug(device)}{'_dry_run' if args.dry_run else ''}.md"
    common.write_whole(path, "\n".join(lines))
    print(f"wrote {path} in {time.monotonic() - start:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
