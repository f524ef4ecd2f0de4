"""Launches the CUDA kernels of the diagonal scan: tensors in, a packed argument struct, one to three kernels."""

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.kernels import cuda, state_dtype
from linrnn.kernels.cuda.driver import Kernel
from linrnn.kernels.cuda.plan import CARRY_WIDTH, MAX_THREADS, Plan, choose_plan, fitted
from linrnn.kernels.tensors import (
    ABSENT,
    View,
    address,
    aligned,
    contiguous,
    empty_gradient_of_a,
    flags_view,
    from_row,
    paired,
    reduced,
    view,
)

NAMES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.complex64: "cplx<float>",
    torch.complex128: "cplx<double>",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
PAIRS = (
    *((dtype, dtype) for dtype in NAMES),
    (torch.float32, torch.complex64),
    (torch.float64, torch.complex128),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)  # of a and x

# Args of diagonal_scan.cu: words of 8 bytes.
_PACK = struct.Struct("33q").pack


@functools.cache
def _program(
    backward: bool, a: torch.dtype, x: torch.dtype, V: int, constant: bool, flagged: bool
) -> tuple[str, tuple[str, ...]]:
    if (a, x) not in PAIRS:
        raise ValueError(f"no kernel for a of {a} and x of {x}; pairs are {PAIRS}")
    values = {"BACKWARD": int(backward), "A": NAMES[a], "X": NAMES[x], "V": V}
    values |= {"CONSTANT": int(constant), "FLAGS": int(flagged)}
    return "diagonal_scan.cu", tuple(f"LINRNN_{name}={value}" for name, value in values.items())


PROGRAMS = tuple(
    _program(backward, a, x, V, constant, flagged)
    for backward in (False, True)
    for a, x in PAIRS
    for V in ((2, 1) if x.itemsize == 2 else (1,))
    for constant in (False, True)
    for flagged in (False, True)
)


def forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    reverse: bool,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """h (B, T, D) in x's dtype and the final state (B, D) in the state dtype."""
    a, x, initial_state, flags = aligned(a), aligned(x), contiguous(initial_state), contiguous(flags)
    h = x.new_empty(x.shape)
    final_state = x.new_empty((x.shape[0], x.shape[2]), dtype=state_dtype(x.dtype))
    if h.numel() == 0:
        return h, final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
    V = _channels(x, a, h)
    layout = _layout(False, a.dtype, x.dtype, V, a.ndim == 1, flags is not None, x.shape, _device(x), plan)
    _launch(
        layout,
        a=view(a, reverse),
        x=view(x, reverse),
        out=view(h, reverse),
        flags=flags_view(flags, reverse),
        entry=initial_state,
        exit=final_state,
    )
    return h, final_state


def backward(
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    flags: Tensor | None,
    grad_h: Tensor | None,
    grad_final_state: Tensor | None,
    reverse: bool,
    needs_grad_a: bool,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x (B, T, D), of a (its shape; None unless wanted) and of the initial state (B, D)."""
    a, h, initial_state, flags = aligned(a), aligned(h), contiguous(initial_state), contiguous(flags)
    # where only the final state has a gradient, one row of zeros serves for all
    grad_h = h.new_zeros(h.shape[-1]).expand(h.shape) if grad_h is None else aligned(grad_h)
    grad_final_state = contiguous(grad_final_state)
    grad_x = h.new_empty(h.shape)
    grad_s = h.new_empty((h.shape[0], h.shape[2]), dtype=state_dtype(h.dtype))
    if h.numel() == 0:
        grad_a = a.new_zeros(a.shape) if needs_grad_a else None
        return grad_x, grad_a, grad_s.zero_() if grad_final_state is None else grad_s.copy_(grad_final_state)
    V = _channels(h, a, grad_h, grad_x)
    layout = _layout(True, a.dtype, h.dtype, V, a.ndim == 1, flags is not None, h.shape, _device(h), plan)
    grad_a = empty_gradient_of_a(a, h, layout.parts, layout.product_dtype) if needs_grad_a else None
    # The pass runs from the last token on, and beside each token it reads the row before it.
    down = not reverse
    address_of_h, stride_b, stride_t = view(h, down)
    _launch(
        layout,
        a=view(a, down),
        x=view(grad_h, down),
        out=view(grad_x, down),
        flags=flags_view(flags, down),
        entry=grad_final_state,
        exit=grad_s,
        before=ABSENT if grad_a is None else (address_of_h + stride_t * h.itemsize, stride_b, stride_t),
        first=initial_state,
        grad_a=ABSENT if grad_a is None or a.ndim == 1 else view(grad_a, down),
        sum=grad_a if a.ndim == 1 else None,
    )
    return grad_x, None if grad_a is None else reduced(grad_a, a), grad_s


@dataclass(frozen=True)
class _Layout:
    """All about a scan but its addresses: what is to be launched, how often and on how many threads."""

    device: int
    columns: int
    T: int
    D: int
    V: int
    item_bytes: tuple[int, int]  # of a and of x
    state_dtype: torch.dtype
    product_dtype: torch.dtype
    plan: Plan
    panels: tuple[tuple[int, int, int], ...]  # first row, rows, chunks
    launches: tuple[tuple[Kernel, int, int, int], ...]  # kernel, columns of a block, its threads, shared bytes

    @property
    def parts(self) -> int:
        """Threads that sum up the gradient of a constant a, each over its part of a sequence."""
        return sum(chunks for *_, chunks in self.panels) if self.plan.chunk else self.plan.segments


@functools.lru_cache(maxsize=4096)
def _layout(
    backward: bool,
    a: torch.dtype,
    x: torch.dtype,
    V: int,
    constant: bool,
    flagged: bool,
    shape: tuple[int, int, int],
    device: int,
    plan: Plan | None,
) -> _Layout:
    B, T, D = shape
    columns = B * D // V
    row_bytes = x.itemsize * (2 if backward else 1) + (0 if constant else a.itemsize)
    states, products = state_dtype(x), torch.complex128 if a.is_complex else torch.float64
    exchanged = 2 * V * (products.itemsize + states.itemsize)  # two buffers
    properties = cuda.properties(device)
    plan = plan or choose_plan(columns, T, V * row_bytes, properties)
    plan = fitted(plan, V * row_bytes, exchanged, properties)
    program = cuda.program(*_program(backward, a, x, V, constant, flagged), device)
    ring = plan.ring_bytes(V * row_bytes)
    launches: tuple[tuple[Kernel, int, int, int], ...]
    if plan.chunk:
        panel = plan.panel or T
        panels = tuple((k, min(panel, T - k), -(-min(panel, T - k) // plan.chunk)) for k in range(0, T, panel))
        launches = (
            (program.kernel("scan_reduce"), 0, plan.threads, ring),
            (program.kernel("scan_carry"), CARRY_WIDTH, MAX_THREADS, MAX_THREADS * exchanged // V),
            (program.kernel("scan_emit"), 0, plan.threads, ring),
        )
    else:
        panels = ((0, T, 1),)
        shared = ring + (plan.threads * exchanged if plan.segments > 1 else 0)
        launches = ((program.kernel("scan_sequential"), plan.width, plan.threads, shared),)
    return _Layout(device, columns, T, D, V, (a.itemsize, x.itemsize), states, products, plan, panels, launches)


def _launch(
    layout: _Layout,
    *,
    a: View,
    x: View,
    out: View,
    flags: View,
    entry: Tensor | None,
    exit: Tensor,
    before: View = ABSENT,
    first: Tensor | None = None,
    grad_a: View = ABSENT,
    sum: Tensor | None = None,
) -> None:
    """Packs the arguments and launches; the caller keeps the tensors alive, and torch's allocator the workspace."""
    stream = cuda.current_stream(layout.device)
    of_a, of_x = layout.item_bytes
    decay = carry = None
    if layout.plan.chunk:
        shape = (max(chunks for *_, chunks in layout.panels), layout.columns * layout.V)
        decay, carry = (
            exit.new_empty(shape, dtype=layout.product_dtype),
            exit.new_empty(shape, dtype=layout.state_dtype),
        )
    enters, sums = address(entry), address(sum)
    for start, T, chunks in layout.panels:
        packed = _PACK(
            *(layout.columns, T, layout.D, layout.V),
            *from_row(start, a, of_a),
            *from_row(start, x, of_x),
            *from_row(start, out, of_x),
            *from_row(start, before, of_x),
            *from_row(start, grad_a, of_a),
            *(address(first), start + T == layout.T, enters, exit.data_ptr()),
            *from_row(start, flags, 1),
            *(sums, layout.plan.rows, CARRY_WIDTH if layout.plan.chunk else layout.plan.width),
            *(layout.plan.chunk, chunks, address(decay), address(carry)),
        )
        for kernel, width, threads, shared in layout.launches:
            if not layout.plan.chunk:
                blocks = -(-layout.columns // width)
            elif width:
                blocks = -(-layout.columns * layout.V // width)
            else:
                blocks = -(-layout.columns * chunks // threads)
            kernel.launch(blocks, threads, shared, stream, packed)
        enters = exit.data_ptr()
        if sum is not None:
            sums += chunks * layout.columns * layout.V * sum.itemsize


def _device(v: Tensor) -> int:
    return v.device.index or 0


def _channels(x: Tensor, *others: Tensor) -> int:
    """Of a column: 2 where x is of half precision and all rows can be moved in pairs, else 1."""
    return 2 if x.itemsize == 2 and all(paired(v) for v in (x, *others)) else 1
