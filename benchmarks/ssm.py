"""The layers with vectors of states: Mamba, S4D, S5, RG-LRU, Griffin, HGRN and MEGA beside their peers.

    pip install -e '.[bench,hf]' && python benchmarks/ssm.py     # half an hour; writes benchmarks/results/
    python benchmarks/ssm.py --groups mamba --quick --no-write   # one table, small

A peer has the weights of the row above that is ours, and its output is compared with ours before it is timed. All times
of a table are from one process, interleaved, and the fastest run counts; memory is warm. Forward + backward takes the
gradients of the input and of every parameter. Peak memory is what one forward + backward takes on top of input and
parameters, outputs and gradients included: on a CPU the high-water mark of resident memory (VmHWM, set back before) of
a fresh process for each row, on a GPU that of torch's allocator. (The forward + backward of transformers is quadratic
in T: it is timed once, and its memory is four times that of a quarter of T.) A decoding step maps one token of one
sequence; on a CPU it runs on one thread. Training is that of a byte-level language model: an embedding, residual blocks
of RMSNorm and mixer, a tied head, the cross entropy of the next byte and AdamW.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from ssm_cases import GROUPS, Case, N, Size
from torch import Tensor, nn

from linrnn.layers import Mamba
from linrnn.models import param_groups

SIZE, QUICK = (4, 2048, 256), (2, 128, 64)  # B, T, D
LAYERS, BYTES = 4, 256
CALLS = 50  # steps in one timing
TOLERANCE = 2e-3  # of the largest output: as far as tf32 can tell
FASTER, SMALLER = 5.0, 1 / 3  # the goals for Mamba on a CPU
NAN = float("nan")


@dataclass
class Row:
    """Milliseconds, MiB and microseconds of a case; NaN where there is none."""

    name: str
    peer: bool
    forward: float = NAN
    both: float = NAN
    memory: float = NAN
    step: float = NAN


def without_gradients(case: Case) -> Callable[[], object]:
    def run() -> Tensor:
        with torch.no_grad():
            return case.run()

    return run


def with_gradients(case: Case) -> Callable[[], object]:
    def run() -> tuple[Tensor | None, ...]:
        y = case.run()
        return torch.autograd.grad(y, case.sources, torch.ones_like(y), allow_unused=True)

    return run


def agrees(case: Case, expected: Tensor) -> bool:
    """Whether a peer runs and computes what we do: no speed beside a wrong answer."""
    try:
        y = without_gradients(case)()
        if not case.quadratic:
            with_gradients(case)()
    except Exception as error:
        print(f"{case.name} left out: {type(error).__name__}: {error}", flush=True)
        return False
    error = ((y - expected).abs().max() / expected.abs().max()).item()
    if not error < TOLERANCE:
        print(f"{case.name} left out: it and ours disagree, relative error {error:.1e}", flush=True)
    return error < TOLERANCE


def measure(group: str, size: Size, seconds: float) -> list[Row]:
    cases, expected = [], torch.empty(0)
    for case in GROUPS[group][1](size):
        if not case.peer:
            expected = without_gradients(case)()
        if not case.peer or agrees(case, expected):
            cases.append(case)
    rows = {case.name: Row(case.name, case.peer) for case in cases}

    def times(make: Callable[[Case], Callable[[], object]], which: list[Case]) -> dict[str, float]:
        return common.best_times({c.name: common.synchronized(make(c), size.device) for c in which}, seconds)

    for name, ms in times(without_gradients, cases).items():
        rows[name].forward = ms
    for name, ms in times(with_gradients, [case for case in cases if not case.quadratic]).items():
        rows[name].both = ms
    for case in cases:
        if case.quadratic:
            began = time.perf_counter()
            common.synchronized(with_gradients(case), size.device)()
            rows[case.name].both = 1e3 * (time.perf_counter() - began)
        rows[case.name].memory = peak_memory(group, case, size)
    steps = {c.name: repeated(c.step) for c in cases if c.step is not None}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = common.best_times({n: common.synchronized(f, size.device) for n, f in steps.items()}, seconds)
    torch.set_num_threads(threads)
    for name, ms in found.items():
        rows[name].step = 1e3 * ms / CALLS
    return list(rows.values())


def repeated(step: Callable[[], object]) -> Callable[[], object]:
    return lambda: [step() for _ in range(CALLS)]


def peak_memory(group: str, case: Case, size: Size) -> float:
    """MiB of one forward + backward; NaN if the fresh process fails, which says why."""
    if size.device.type == "cuda":
        return common.peak_memory(with_gradients(case), size.device)
    parts = 4 if case.quadratic else 1
    shape = [str(n) for n in (size.batch, size.time // parts, size.width)]
    threads = ["--threads", str(torch.get_num_threads())]
    command = [sys.executable, __file__, "--groups", group, "--peak", case.name, "--size", *shape, *threads]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        print(f"{case.name}: its peak memory is unknown: {child.stderr.strip().splitlines()[-1:]}", flush=True)
        return NAN
    return parts * float(child.stdout.split()[-1])


def peak_of_this_process(group: str, name: str, size: Size) -> float:
    """What a fresh process measures: once small, so that everything is loaded and started, then at full size."""
    make = GROUPS[group][1]
    for small in (Size(1, 16, size.width, size.device), size):
        (case,) = (case for case in make(small, only=name) if case.name == name)
        if small is not size:
            with_gradients(case)()
    return common.peak_memory(with_gradients(case), size.device)


class Stack(nn.Module):
    """A language model of bytes with its head tied to the embedding; a mixer maps (B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, mixers: list[nn.Module]):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model) for _ in range(len(mixers) + 1))

    def forward(self, ids: Tensor) -> Tensor:
        """The mean cross entropy of the bytes after the first of ids (B, T + 1)."""
        x = self.embedding(ids[:, :-1])
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            y = mixer(norm(x))
            x = x + (y[0] if isinstance(y, tuple) else y)
        logits = F.linear(self.norms[-1](x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def training(size: Size, seconds: float) -> dict[str, float]:
    """Tokens per second of whole training steps, by whose Mamba is in the stack."""

    def mambapy() -> nn.Module:
        from mambapy.mamba import MambaBlock, MambaConfig

        return MambaBlock(MambaConfig(d_model=size.width, n_layers=1, d_state=N))

    mixers: dict[str, Callable[[], nn.Module]] = {
        "linrnn": lambda: Mamba(size.width, d_state=N),
        "mambapy": mambapy,
    }
    ids = torch.randint(BYTES, (size.batch, size.time + 1), device=size.device)
    steps = {}
    for name, mixer in mixers.items():
        try:
            model = Stack(size.width, [mixer() for _ in range(LAYERS)]).to(size.device)
        except ImportError as error:
            print(f"{name} left out: {error}", flush=True)
            continue
        optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 0.1))

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            model(ids).backward()
            optimizer.step()

        steps[name] = common.synchronized(step, size.device)
    tokens = size.batch * size.time
    return {name: 1e3 * tokens / ms for name, ms in common.best_times(steps, seconds).items()}


def table(rows: list[Row]) -> list[str]:
    """In brackets the ratio to the row above that is ours."""
    lines = [
        "| | forward, ms | forward + backward, ms | peak memory, MiB | decoding step, us |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    ours = rows[0]
    for row in rows:
        ours = ours if row.peer else row
        cells = []
        for field, digits in (("forward", 2), ("both", 2), ("memory", 0), ("step", 0)):
            value, base = getattr(row, field), getattr(ours, field)
            ratio = f" ({value / base:.2f})" if row.peer and base == base and base > 0 else ""
            cells.append(f"{value:.{digits}f}{ratio}" if value == value else "-")
        lines.append(f"| {'- ' if row.peer else ''}{row.name} | {' | '.join(cells)} |")
    return lines


def goals(group: str, rows: list[Row], device: torch.device) -> list[str]:
    """Which goals are met, of those that the group has on this kind of device."""
    named = {row.name: row for row in rows}
    lines = []
    if group == "mamba" and device.type == "cpu":
        for peer in (named[name] for name in ("mambapy", "transformers") if name in named):
            ratio, memory = peer.both / named["mamba"].both, named["mamba"].memory / peer.memory
            lines.append(verdict(ratio >= FASTER, f"{ratio:.1f} times as fast as {peer.name} (goal {FASTER:.0f})"))
            lines.append(verdict(memory <= SMALLER, f"{memory:.2f} of the memory of {peer.name} (goal 0.33)"))
    ours = named.get("selective_scan, gradients from and to its states")
    if ours is not None and "mamba-ssm" in named:
        ratio = ours.both / named["mamba-ssm"].both
        lines.append(verdict(ratio <= 1, f"with gradients of states {ratio:.2f} times mamba-ssm's time (goal 1)"))
    return lines


def verdict(met: bool, what: str) -> str:
    return f"- {'met' if met else 'MISSED'}: forward + backward, {what}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="*", choices=[*GROUPS, "training"], default=[*GROUPS, "training"])
    parser.add_argument("--size", nargs=3, type=int, metavar=("B", "T", "D"))
    parser.add_argument("--quick", action="store_true", help=f"B, T, D = {QUICK} and little time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="for each function")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="the folder of the table")
    parser.add_argument("--peak", help=argparse.SUPPRESS)  # what a fresh process is asked
    args = parser.parse_args()
    seconds = args.seconds or (0.05 if args.quick else 3.0)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    size = Size(*(args.size or (QUICK if args.quick else SIZE)), torch.device(args.device))
    if args.peak is not None:
        print(peak_of_this_process(args.groups[0], args.peak, size))
        return
    if size.device.type == "cpu":
        common.keep_memory_warm()
    packages = ("linrnn", "mambapy", "transformers", "s5-pytorch", "accelerated-scan", "mamba-ssm")
    shape = f"(B, T, D) = ({size.batch}, {size.time}, {size.width})"
    lines = [common.head("Layers with vectors of states", *packages, device=size.device)]
    lines += [f"{shape}, float32. A line that begins with - is a peer with the weights of ours above it; in", ""]
    lines[-1:] = ["brackets its ratio to that. How it is measured is at the top of `benchmarks/ssm.py`.", ""]
    print("\n".join(lines), flush=True)
    for group in args.groups:
        if group == "training":
            found = training(size, seconds)
            part = [f"## Training {LAYERS} layers of Mamba", ""]
            part += [f"- {name}: {rate:.0f} tokens per second" for name, rate in found.items()]
        else:
            rows = measure(group, size, seconds)
            part = [f"## {GROUPS[group][0]}", "", *table(rows), "", *goals(group, rows, size.device)]
        lines += [*part, ""]
        print("\n".join([*part, ""]), flush=True)
    if not args.no_write:
        where = f"cpu_{args.threads}threads" if size.device.type == "cpu" else common.device_slug(size.device)
        path = args.out / f"ssm_{where}.md"
        common.write_whole(path, "\n".join(lines))
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
