"""Is the rule of kernels/cuda/plan.py right? Times the plans around the one it chooses, and climbs from the best.

The neighbours of a plan halve or double one of its numbers; the first round also holds plans of the other shapes of
parallelism. A plan that fails to launch, or whose results differ from the rule's, is named and never timed.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator

import common
import torch
from scan_cases import Case, Shape
from torch import Tensor


def sweep(
    shapes: list[Shape], cases: list[Case], device: torch.device, bandwidth: float, seconds: float, deadline: float
) -> Iterator[str]:
    """Lines of a table: the rule's plan and the best one measured, forward and backward."""
    yield "| shape | case | pass | rule | ms | share | best | ms | share | rule / best |"
    yield "| --- | --- | --- | --- | ---: | ---: | --- | ---: | ---: | ---: |"
    if device.type != "cuda":
        yield f"\nNo GPU: nothing to sweep at {shapes}, {[case.name for case in cases]}."
        return
    for shape in shapes:
        for case in cases:
            for name, size, call in passes(shape, case, device):
                if time.monotonic() > deadline:
                    return
                yield row(f"{shape} | {case.name} | {name}", size, call, device, bandwidth, seconds, deadline)


def passes(shape: Shape, case: Case, device: torch.device) -> Iterator[tuple[str, int, Callable[..., tuple]]]:
    """Name, bytes that must move, and a call (number, plan) of the two launchers."""
    from linrnn.kernels.cuda.diagonal_scan import backward, forward

    count = common.rounds(case.both_bytes(shape), device)
    sets = [case.inputs(shape, device) for _ in range(count)]
    states = [forward(a, x, None, None, False)[0] for a, x, _ in sets]

    def run_forward(i: int, plan=None) -> tuple[Tensor | None, ...]:
        a, x, _ = sets[i % count]
        return forward(a, x, None, None, False, plan=plan)

    def run_backward(i: int, plan=None) -> tuple[Tensor | None, ...]:
        a, _, g = sets[i % count]
        return backward(a, states[i % count], None, None, g, None, False, True, plan=plan)

    yield "forward", case.forward_bytes(shape), run_forward
    yield "backward", case.backward_bytes(shape), run_backward


def rule(call: Callable[..., tuple]):
    """The plan that the rule chooses for a call."""
    from linrnn.kernels.cuda import diagonal_scan

    seen, original = [], diagonal_scan._launch

    def recorded(layout, **arguments):
        seen.append(layout.plan)
        original(layout, **arguments)

    diagonal_scan._launch = recorded
    try:
        call(0)
    finally:
        diagonal_scan._launch = original
    return seen[0]


def neighbours(plan, T: int, first: bool) -> Iterator:
    """Plans of half and double each number, and in the first round other shapes: blocks of few threads to a column or
    many, and time cut into chunks."""
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        for other in {max(1, value // 2), 2 * value} - {value} if value else ():
            yield dataclasses.replace(plan, **{field.name: other})
    if plan.panel:
        yield dataclasses.replace(plan, panel=0)
    if first:
        for width, segments, rows in ((64, 1, 32), (64, 1, 16), (128, 1, 8), (32, 8, 8), (16, 16, 8), (8, 32, 8)):
            yield dataclasses.replace(plan, width=width, segments=segments, rows=rows, chunk=0, panel=0)
        for chunk in (32, 128, 512):
            if chunk < T:
                yield dataclasses.replace(plan, width=128, segments=1, rows=8, chunk=chunk, panel=0)


def sensible(plan, T: int) -> bool:
    """Whether the kernels allow the plan: blocks of whole warps up to the limit, chunks of whole stages."""
    from linrnn.kernels.cuda.plan import MAX_THREADS

    if plan.chunk and (plan.segments > 1 or plan.chunk % plan.rows or plan.chunk > T):
        return False
    if plan.panel and (not plan.chunk or plan.panel > T):
        return False
    return 32 <= plan.threads <= MAX_THREADS and plan.threads % 32 == 0 and plan.rows <= 64


def row(
    label: str,
    size: int,
    call: Callable[..., tuple],
    device: torch.device,
    bandwidth: float,
    seconds: float,
    deadline: float,
) -> str:
    first = best = rule(call)
    wanted = call(0)
    T = wanted[0].shape[1]
    times = {first: common.median_times({"": call}, device, seconds)[""]}
    while time.monotonic() < deadline:
        for plan in neighbours(best, T, best is first):
            if plan in times or not sensible(plan, T):
                continue
            times[plan] = float("inf")
            try:
                got = call(0, plan)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                differ = [not close(g, w) for g, w in zip(got, wanted, strict=True)]
            except (RuntimeError, ValueError) as error:
                print(f"{label}: {plan} does not run: {error}", flush=True)
                continue
            if any(differ):
                print(f"{label}: {plan} gives other results than {first}", flush=True)
                continue
            times[plan] = common.median_times({"": lambda i, p=plan: call(i, p)}, device, seconds)[""]
        leader = min(times, key=times.__getitem__)
        if leader == best:
            break
        best = leader
    cells = []
    for plan in (first, best):
        values = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(plan).items() if value)
        cells += [values, f"{times[plan]:.4f}", f"{size / times[plan] * 1e3 / bandwidth:.0%}"]
    return f"| {label} | {' | '.join(cells)} | {times[first] / times[best]:.2f} |"


def close(got: Tensor | None, wanted: Tensor | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    tolerance = 3e-2 if got.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())
