"""Diagonal scans through the CUDA launcher on the host shim, checked against loops in float64.

The rule for an error: at most twice the largest error of the same loop in the arithmetic type of the kernel, and what
rounding to a half-precision output adds. The backward of half precision starts from what the forward has stored.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.kernels.cuda.diagonal_scan import backward, forward
from linrnn.kernels.cuda.plan import Plan
from linrnn.ops import diagonal_scan

# Both shapes of parallelism, with pieces so small that short sequences have several; None: the launcher's own rule.
PLANS = {
    "columns": Plan(width=32, segments=1, rows=4),
    "segments": Plan(width=8, segments=8, rows=2),
    "chunks": Plan(width=32, segments=1, rows=2, chunk=6),
    "panels": Plan(width=16, segments=1, rows=3, chunk=9, panel=31),
    "rule": None,
}
LAYOUTS = ("dense", "sliced", "expanded", "every other token", "transposed", "time-major")
OPTIONS = ("plain", "reset", "mask", "reset+mask")


@dataclass(frozen=True)
class Case:
    """One forward and one backward call."""

    pair: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)
    shape: tuple[int, int, int] = (2, 17, 9)
    a_ndim: int = 3
    plan: str = "columns"
    options: str = "plain"
    with_state: bool = True
    reverse: bool = False
    layout: str = "dense"
    seed: int = 0
    forgets: float | None = None
    """1 - a, for all of a"""


# an error of 1e-8 in the product over a few rows would show a thousand times over
BARELY = Case((torch.float32,) * 2, (1, 20_000, 1), 1, "segments", forgets=1e-5)


@dataclass
class Inputs:
    """What both passes take; `flags` as linrnn.ops makes them, from reset and mask."""

    a: Tensor
    x: Tensor
    state: Tensor | None
    reset: Tensor | None
    mask: Tensor | None
    grad_h: Tensor
    grad_final_state: Tensor

    @property
    def flags(self) -> Tensor | None:
        if self.reset is None and self.mask is None:
            return None
        zeros = torch.zeros(self.x.shape[:2], dtype=torch.uint8)
        reset, padding = (zeros if v is None else v.to(torch.uint8) for v in (self.reset, self.mask))
        return reset | (zeros if self.mask is None else 1 - padding) << 1

    def widened(self, dtype: torch.dtype) -> "Inputs":
        """In a real dtype, or its complex one where a tensor is complex."""
        tensors = (self.a, self.x, self.grad_h, self.grad_final_state)
        a, x, grad_h, grad_final_state = (widened(v, dtype) for v in tensors)
        state = None if self.state is None else widened(self.state, dtype)
        return Inputs(a, x, state, self.reset, self.mask, grad_h, grad_final_state)


def widened(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype.to_complex() if v.is_complex() else dtype)


def make(case: Case) -> Inputs:
    """Random inputs; |a| between 0.8 and 1.1, so that an old state matters."""
    generator = torch.Generator().manual_seed(case.seed)
    (B, T, D), (a_dtype, x_dtype) = case.shape, case.pair

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=wide, generator=generator).to(dtype)

    a_shape = ((D,), (T, D), (B, T, D))[case.a_ndim - 1]
    a = torch.rand(a_shape, dtype=torch.float64, generator=generator) * 0.3 + 0.8
    if case.forgets is not None:
        a = torch.full(a_shape, 1 - case.forgets, dtype=torch.float64)
    if a_dtype.is_complex:
        a = torch.polar(a, 6.3 * torch.rand(a_shape, dtype=torch.float64, generator=generator))
    reset = torch.rand(B, T, generator=generator) < 0.15 if "reset" in case.options else None
    mask = torch.rand(B, T, generator=generator) < 0.8 if "mask" in case.options else None
    return Inputs(
        lay_out(a.to(a_dtype), case.layout),
        lay_out(normal(B, T, D, dtype=x_dtype), case.layout),
        normal(B, D, dtype=state_dtype(x_dtype)) if case.with_state else None,
        reset,
        mask,
        lay_out(normal(B, T, D, dtype=x_dtype), case.layout),
        normal(B, D, dtype=state_dtype(x_dtype)),
    )


def lay_out(v: Tensor, layout: str) -> Tensor:
    """The values of v in another layout; "expanded" repeats those of the first sequence."""
    if layout == "sliced" or v.ndim == 1:  # rows of another length, off any alignment by one element
        wide = v.new_full((*v.shape[:-1], v.shape[-1] + 3), torch.nan)
        wide[..., 1:-2] = v
        return wide[..., 1:-2] if layout == "sliced" else v
    if layout == "every other token":
        wide = v.new_full((*v.shape[:-2], 2 * v.shape[-2], v.shape[-1]), torch.nan)
        wide[..., ::2, :] = v
        return wide[..., ::2, :]
    if layout == "transposed":
        return v.mT.contiguous().mT
    if layout == "time-major" and v.ndim == 3:
        return v.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and v.ndim == 3:
        return v[:1].expand(v.shape)
    return v


def forward_loop(i: Inputs, reverse: bool) -> tuple[Tensor, Tensor]:
    """h and the final state, by the reference."""
    return diagonal_scan(i.a, i.x, i.state, reset=i.reset, mask=i.mask, reverse=reverse, backend="reference")


def backward_loop(i: Inputs, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of a (B, T, D), and of the initial state: the adjoint as written, given the h of the forward."""
    B, T, _ = h.shape
    flags = torch.zeros(B, T, dtype=torch.uint8) if i.flags is None else i.flags
    reset, hold = (flags & 1).bool()[..., None], (flags & 2).bool()[..., None]
    s, grad_x, grad_a = i.grad_final_state, torch.zeros_like(h), torch.zeros_like(h)
    for t in range(T) if reverse else reversed(range(T)):
        a_t = i.a if i.a.ndim == 1 else i.a[..., t, :]
        previous = t + 1 if reverse else t - 1
        before = h[:, previous] if 0 <= previous < T else torch.zeros_like(s) if i.state is None else i.state
        g = i.grad_h[:, t] + s
        grad_x[:, t] = torch.where(hold[:, t], 0, g)
        grad_a[:, t] = torch.where(hold[:, t] | reset[:, t], 0, g * before.conj())
        s = torch.where(reset[:, t], 0, torch.where(hold[:, t], g, a_t.conj() * g))
    return grad_x, grad_a if i.a.is_complex() else grad_a.real if grad_a.is_complex() else grad_a, s


def run(case: Case, inputs: Inputs) -> list[Tensor]:
    """h, the final state and the gradients of x, a and the initial state, by the kernels."""
    plan = PLANS[case.plan]
    h, final_state = forward(inputs.a, inputs.x, inputs.state, inputs.flags, case.reverse, plan=plan)
    h = h if case.layout == "expanded" else lay_out(h, case.layout)
    grads = (inputs.grad_h, inputs.grad_final_state)
    grad_x, grad_a, grad_s = backward(inputs.a, h, inputs.state, inputs.flags, *grads, case.reverse, True, plan=plan)
    assert grad_a is not None
    return [h, final_state, grad_x, grad_a, grad_s]


def check(case: Case, got: list[Tensor] | None = None) -> None:
    """Raises AssertionError where a result of `run` is further from float64 than the rule allows."""
    inputs = make(case)
    got = run(case, inputs) if got is None else got
    wanted, plain = (_loops(case, dtype, got[0]) for dtype in (torch.float64, state_dtype(case.pair[1]).to_real()))
    names = ("h", "final_state", "grad_x", "grad_a", "grad_s")
    for name, result, exact, rough in zip(names, got, wanted, plain, strict=True):
        own = torch.finfo(result.dtype).eps / 2 if result.itemsize == 2 else 0
        rounding = own * exact.abs()
        if name == "grad_a" and case.a_ndim < 3:
            dims = (0, 1) if case.a_ndim == 1 else (0,)
            rounding = own * (exact.abs().sum(dims) + exact.sum(dims).abs())  # of each summand, and of the sum
            exact, rough = exact.sum(dims), rough.sum(dims)
        assert result.shape == exact.shape, (case, name, result.shape)
        if not exact.numel():
            continue
        error = (result.to(exact.dtype) - exact).abs()
        # a few roundings of the largest number, for short sequences, and for float64, where the loop is no rougher
        few = (4 if rough.itemsize < exact.itemsize else 64) * torch.finfo(rough.dtype).eps * exact.abs().max()
        bound = 2 * (rough.to(exact.dtype) - exact).abs().max() + few + rounding + torch.finfo(result.dtype).tiny
        assert (error <= bound).all(), f"{name} is off by {error.max():.3g} (allowed {bound.max():.3g}) in {case}"


@functools.lru_cache(maxsize=2)
def _forward(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return forward_loop(make(case).widened(dtype), case.reverse)


def _loops(case: Case, dtype: torch.dtype, h: Tensor) -> list[Tensor]:
    """The results in a wide dtype; the backward of a half-precision h starts from its rounded values."""
    inputs = make(case).widened(dtype)
    exact, final_state = _forward(replace(case, plan=""), dtype)
    if h.itemsize == 2:  # what the backward finds: the initial state too in the format of h
        inputs.state = None if inputs.state is None else inputs.state.to(h.dtype).to(dtype)
        h = h.to(dtype)
    else:
        h = exact
    return [exact, final_state, *backward_loop(inputs, h, case.reverse)]


def check_long_sum(plan: str) -> None:
    """The gradient of a constant a, over many tokens of one sign: as exact as one rounding to float32 allows."""
    T = 20_000
    a, h = torch.zeros(1), torch.rand(1, T, 1)
    grad_h, grad_final_state = torch.rand(1, T, 1), torch.zeros(1, 1)
    _, grad_a, _ = backward(a, h, None, None, grad_h, grad_final_state, False, True, plan=PLANS[plan])
    wanted = (grad_h[:, 1:].double() * h[:, :-1].double()).sum()
    assert grad_a is not None
    error = abs(grad_a.item() / wanted.item() - 1)
    assert error <= torch.finfo(torch.float32).eps, f"grad_a is off by {error:.3g}"
