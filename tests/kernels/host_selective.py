"""Selective scans through the CUDA launcher on the host shim, checked against autograd of the reference in float64.

The rule for an error: at most four times the largest error of the reference in the arithmetic type of the kernel, and
what rounding to a half-precision output adds.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.kernels.cuda.selective_plan import Plan
from linrnn.kernels.cuda.selective_scan import backward, forward
from linrnn.ops.selective_scan import _by_reference

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
OPTIONS = ("plain", "reset", "mask", "reset+mask")
NAMES = ("y", "final_state", "grad_x", "grad_dt", "grad_A", "grad_B", "grad_C", "grad_s")


@dataclass(frozen=True)
class Case:
    """One forward and one backward call; the plans' None is the launcher's own rule."""

    shape: tuple[int, int, int] = (2, 19, 5)
    N: int = 16
    G: int = 1
    x: torch.dtype = F64
    dt: torch.dtype | None = None
    """None: that of A"""
    spacing: int = 8
    options: str = "plain"
    with_state: bool = True
    strided: bool = False
    threads: int = 0
    """0: the rule's plan"""
    chunk: int = 0
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return F64 if self.x == F64 else F32

    def plan(self, stage: int) -> Plan | None:
        stage = stage if self.N <= 64 else min(stage, 4)  # for the room there is
        return Plan(self.threads, stage, self.chunk) if self.threads else None


@dataclass
class Inputs:
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    state: Tensor | None
    grad_y: Tensor
    grad_s: Tensor
    reset: Tensor | None
    mask: Tensor | None

    @property
    def flags(self) -> Tensor | None:
        if self.reset is None and self.mask is None:
            return None
        zeros = torch.zeros(self.x.shape[:2], dtype=torch.uint8)
        reset = zeros if self.reset is None else self.reset.to(torch.uint8)
        return reset | (zeros if self.mask is None else (~self.mask).to(torch.uint8)) << 1


def make(case: Case) -> Inputs:
    """Random inputs whose states live for about ten tokens."""
    generator = torch.Generator().manual_seed(case.seed)
    (B, T, D), N = case.shape, case.N

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        v = torch.randn(shape, dtype=F64, generator=generator).to(dtype)
        if (
            case.strided and len(shape) == 3
        ):  # every other token of rows that are longer, off any alignment by one element
            wide = v.new_full((shape[0], 2 * shape[1], shape[2] + 3), torch.nan)
            wide[:, ::2, 1:-2] = v
            return wide[:, ::2, 1:-2]
        return v

    reset = torch.rand(B, T, generator=generator) < 0.15 if "reset" in case.options else None
    mask = torch.rand(B, T, generator=generator) < 0.8 if "mask" in case.options else None
    dt = normal(B, T, D)
    dt.copy_(dt.abs() / 10)
    return Inputs(
        x=normal(B, T, D, dtype=case.x),
        dt=dt if case.dt is None else dt.to(case.dt),
        A=-normal(D, N).abs() - 0.1,
        B=normal(B, T, case.G, N),
        C=normal(B, T, case.G, N),
        state=normal(B, D, N).clone(memory_format=torch.contiguous_format) if case.with_state else None,
        grad_y=normal(B, T, D),
        grad_s=normal(B, D, N),
        reset=reset,
        mask=mask,
    )


def run(case: Case, i: Inputs) -> list[Tensor]:
    """y, the final state and the six gradients, by the kernels."""
    plan = case.plan(min(case.spacing, 16))
    args = (i.x, i.dt, i.A, i.B, i.C)
    y, last, checkpoints = forward(*args, i.state, i.flags, case.spacing, True, plan=plan)
    return [y, last, *backward(*args, i.flags, checkpoints, i.grad_y, i.grad_s, case.spacing, plan=plan)]


def run_backward(case: Case, i: Inputs) -> list[Tensor]:
    """The same, but only the backward by the kernels: it alone has to be compiled."""
    state = torch.zeros_like(i.grad_s) if i.state is None else i.state
    kept, ys = [], []
    for t in range(0, case.shape[1], case.spacing):
        some = slice(t, t + case.spacing)
        flags = (None if v is None else v[:, some] for v in (i.reset, i.mask))
        kept.append(state)
        y, state = _by_reference(
            *(v[:, some] for v in (i.x, i.dt)), i.A, *(v[:, some] for v in (i.B, i.C)), state, *flags
        )
        ys.append(y if i.mask is None else torch.where(i.mask[:, some, None], y, 0))
    args = (i.x, i.dt, i.A, i.B, i.C, i.flags, torch.stack(kept, 1), i.grad_y, i.grad_s, case.spacing)
    return [torch.cat(ys, 1), state, *backward(*args, plan=case.plan(case.spacing))]


def reference(i: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The same by autograd of the reference, in `dtype`."""
    state = torch.zeros_like(i.grad_s) if i.state is None else i.state
    leaves = [v.detach().to(dtype, copy=True).requires_grad_() for v in (i.x, i.dt, i.A, i.B, i.C, state)]
    outputs = _by_reference(*leaves, i.reset, i.mask)
    if i.mask is not None:
        outputs = (torch.where(i.mask[..., None], outputs[0], 0), outputs[1])
    grads = torch.autograd.grad(outputs, leaves, (i.grad_y.to(dtype), i.grad_s.to(dtype)))
    return [v.detach() for v in (*outputs, *grads)]


def check(case: Case, got: list[Tensor] | None = None) -> None:
    """Raises AssertionError where a result of `run` is further from float64 than the rule allows."""
    inputs = make(case)
    got = run(case, inputs) if got is None else got
    for name, result, exact, rough in zip(
        NAMES, got, reference(inputs, F64), reference(inputs, case.dtype), strict=True
    ):
        assert result.shape == exact.shape, (case, name, result.shape)
        error = (result.double() - exact).abs()
        scale = exact.abs().max()
        own = torch.finfo(result.dtype).eps / 2 * exact.abs() if result.itemsize == 2 else 0
        bound = 4 * (rough.double() - exact).abs().max() + 32 * torch.finfo(case.dtype).eps * scale + own
        assert (error <= bound).all(), f"{name} is off by {error.max():.3g} (allowed {bound.max():.3g}) in {case}"
