"""Launches the CUDA kernels of the running softmax: tensors in, a packed argument struct, one to three kernels.

The backward is made of two of them, `head_scan` and `row_dots`; `linrnn.ops` puts it together.
"""

import functools
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.kernels import cuda, state_dtype
from linrnn.kernels.cuda.diagonal_scan import NAMES
from linrnn.kernels.cuda.driver import Kernel
from linrnn.kernels.cuda.plan import CARRY_WIDTH, MAX_THREADS, Plan, choose_plan, fitted
from linrnn.kernels.tensors import ABSENT, View, address, aligned, contiguous, flags_view, from_row, paired, view

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LANES = 8  # kLanes of softmax_scan.cu

# Args of softmax_scan.cu: words of 8 bytes.
_PACK = struct.Struct("43q").pack


@functools.cache
def _program(backward: bool, x: torch.dtype, W: int, flagged: bool) -> tuple[str, tuple[str, ...]]:
    values = {"BACKWARD": int(backward), "X": NAMES[x], "W": W, "FLAGS": int(flagged)}
    return "softmax_scan.cu", tuple(f"LINRNN_{name}={value}" for name, value in values.items())


PROGRAMS = tuple(
    _program(backward, x, W, flagged)
    for backward in (False, True)
    for x in STORAGE
    for W in ((2, 1) if x.itemsize == 2 else (1,))
    for flagged in (False, True)
)


def forward(
    logits: Tensor,
    v: Tensor,
    initial_state: tuple[Tensor, Tensor, Tensor] | None,
    flags: Tensor | None,
    reverse: bool,
    keep: bool,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, ...]:
    """o (B, T, H, V) in v's dtype, the final m, z and y, and m and z after each token (of no elements unless `keep`).

    logits (B, T, H) and states are in the dtype of states of v (B, T, H, V), which has elements.
    """
    (B, T, H, V), wide = v.shape, state_dtype(v.dtype)
    logits, values, flags = aligned(logits), aligned(v.flatten(2)), contiguous(flags)
    o = values.new_empty(values.shape)
    m, z = (v.new_empty((B, T if keep else 0, H), dtype=wide) for _ in range(2))
    entry, exit = None, v.new_empty((B, H, V, 3), dtype=wide)
    if initial_state is not None:
        of_m, of_z, y = initial_state
        entry = torch.stack((of_m[..., None].expand_as(y), of_z[..., None].expand_as(y), y), -1)
    layout = _layout(False, v.dtype, _channels(V, values), flags is not None, tuple(v.shape), _device(v), plan)
    views = {"x": view(values, reverse), "out": view(o, reverse), "logits": view(logits, reverse)}
    if keep:
        views |= {"m": view(m, reverse), "z": view(z, reverse)}
    _launch(layout, views, flags_view(flags, reverse), entry, exit)
    final_m, final_z, final_y = exit[..., 0, 0], exit[..., 0, 1], exit[..., 2]
    return o.view(v.shape), final_m.clone(), final_z.clone(), final_y.contiguous(), m, z


def head_scan(
    x: Tensor,
    decay: Tensor,
    scale: Tensor,
    weight: Tensor,
    final: Tensor,
    flags: Tensor | None,
    *,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """weight_t G_t (B, T, H, V) in x's dtype, and decay_0 G_0 (B, H, V), of a scan from the last token to the first.

        G_t = scale_t x_t + decay_{t+1} G_{t+1}        `final` for the last term at the last token

    decay, scale and weight (B, T, H) and `final` (B, H, V) are in the dtype of states of x. A reset in `flags` cuts off
    what is earlier from what is later, and a padded token leaves G as it is, with an output of 0.
    """
    B, _, H, V = x.shape
    values, flags, final = aligned(x.flatten(2)), contiguous(flags), final.contiguous()
    decay, scale, weight = (aligned(v) for v in (decay, scale, weight))
    out, exit = values.new_empty(values.shape), final.new_empty((B, H, V))
    layout = _layout(True, x.dtype, _channels(V, values), flags is not None, tuple(x.shape), _device(x), plan)
    tensors = {"x": values, "out": out, "past": decay, "scale": scale, "weight": weight}
    _launch(layout, {name: view(v, True) for name, v in tensors.items()}, flags_view(flags, True), final, exit)
    return out.view(x.shape), exit


def row_dots(u: Tensor, v: Tensor) -> Tensor:
    """The dot products (B, T, H) over the last dimension of two (B, T, H, V) of one dtype, in its dtype of states."""
    B, T, H, V = u.shape
    rows_of_u, rows_of_v = aligned(u.flatten(2)), aligned(v.flatten(2))
    dots = u.new_empty((B, T, H), dtype=state_dtype(u.dtype))
    W = _channels(V, rows_of_u, rows_of_v)
    device = _device(u)
    kernel = cuda.program(*_program(True, u.dtype, W, False), device).kernel("row_dots")
    views = {"x": view(rows_of_u, False), "other": view(rows_of_v, False)}
    packed = _packed((B * H * V // W, T, H * V, W, V), views, ABSENT, 0, dots.data_ptr(), (0,) * 6)
    kernel.launch(-(-B * T * H * LANES // MAX_THREADS), MAX_THREADS, 0, cuda.current_stream(device), packed)
    return dots


@dataclass(frozen=True)
class _Layout:
    """All about a scan but its addresses: what is to be launched, how often and on how many threads."""

    device: int
    sizes: tuple[int, int, int, int, int]  # columns, T, D, W, V
    bytes_of_x: int
    bytes_of_state: int
    plan: Plan
    panels: tuple[tuple[int, int, int], ...]  # first row, rows, chunks
    launches: tuple[tuple[Kernel, int, int, int], ...]  # kernel, columns of a block, its threads, shared bytes


@functools.lru_cache(maxsize=4096)
def _layout(
    backward: bool, x: torch.dtype, W: int, flagged: bool, shape: tuple[int, ...], device: int, plan: Plan | None
) -> _Layout:
    B, T, H, V = shape
    columns, of_state = B * H * V // W, state_dtype(x).itemsize * (1 if backward else 3)
    row_bytes = W * x.itemsize + state_dtype(x).itemsize * (3 if backward else 1)
    exchanged = 2 * W * (8 + of_state)  # two buffers of a double and a state
    properties = cuda.properties(device)
    plan = fitted(plan or choose_plan(columns, T, row_bytes, properties), row_bytes, exchanged, properties)
    program = cuda.program(*_program(backward, x, W, flagged), device)
    ring = plan.ring_bytes(row_bytes)
    launches: tuple[tuple[Kernel, int, int, int], ...]
    if plan.chunk:
        panel = plan.panel or T
        panels = tuple((k, min(panel, T - k), -(-min(panel, T - k) // plan.chunk)) for k in range(0, T, panel))
        launches = (
            (program.kernel("softmax_reduce"), 0, plan.threads, ring),
            (program.kernel("softmax_carry"), CARRY_WIDTH, MAX_THREADS, MAX_THREADS * exchanged // W),
            (program.kernel("softmax_emit"), 0, plan.threads, ring),
        )
    else:
        panels = ((0, T, 1),)
        shared = ring + (plan.threads * exchanged if plan.segments > 1 else 0)
        launches = ((program.kernel("softmax_sequential"), plan.width, plan.threads, shared),)
    return _Layout(device, (columns, T, H * V, W, V), x.itemsize, of_state, plan, panels, launches)


def _launch(layout: _Layout, views: dict[str, View], flags: View, entry: Tensor | None, exit: Tensor) -> None:
    """Packs the arguments and launches; the caller keeps the tensors alive, and torch's allocator the workspace."""
    stream, plan = cuda.current_stream(layout.device), layout.plan
    columns, _, D, W, V = layout.sizes
    decays = carry = None
    if plan.chunk:
        states = max(chunks for *_, chunks in layout.panels) * columns * W
        decays = exit.new_empty(states, dtype=torch.float64)
        carry = exit.new_empty(states * layout.bytes_of_state, dtype=torch.uint8)
    of_x, wide = layout.bytes_of_x, exit.element_size()
    enters = address(entry)
    for start, T, chunks in layout.panels:
        pieces = {name: from_row(start, v, of_x if name in ("x", "out") else wide) for name, v in views.items()}
        sizes = (plan.rows, CARRY_WIDTH if plan.chunk else plan.width, plan.chunk, chunks)
        packed = _packed(
            (columns, T, D, W, V),
            pieces,
            from_row(start, flags, 1),
            enters,
            exit.data_ptr(),
            (*sizes, address(decays), address(carry)),
        )
        for kernel, width, threads, shared in layout.launches:
            if not plan.chunk:
                blocks = -(-columns // width)
            elif width:
                blocks = -(-columns * W // width)
            else:
                blocks = -(-columns * chunks // threads)
            kernel.launch(blocks, threads, shared, stream, packed)
        enters = exit.data_ptr()


_VIEWS = ("x", "out", "logits", "m", "z", "past", "scale", "weight")  # in the order of Args


def _packed(
    sizes: tuple[int, ...], views: dict[str, View], flags: View, entry: int, exit: int, layout: tuple[int, ...]
) -> bytes:
    sequences = [number for name in _VIEWS for number in views.get(name, ABSENT)]
    return _PACK(*sizes, *sequences, entry, exit, *flags, *layout, *views.get("other", ABSENT))


def _device(v: Tensor) -> int:
    return v.device.index or 0


def _channels(V: int, *rows: Tensor) -> int:
    """Of a column: 2 where x is of half precision and all heads can be moved in pairs, else 1."""
    return 2 if V % 2 == 0 and all(v.itemsize == 2 and paired(v) for v in rows) else 1
