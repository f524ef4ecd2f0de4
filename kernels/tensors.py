"""How tensors reach a kernel: values in memory, rows dense, addresses and strides."""

import torch
from torch import Tensor

View = tuple[int, int, int]  # address, and the strides of batch and time in elements; LinrnnView of numbers.h
ABSENT: View = (0, 0, 0)


def resolved(v: Tensor) -> Tensor:
    """v with its values in memory: torch only marks a conjugate or a negative, and autograd hands such views back."""
    return v.resolve_conj().resolve_neg() if v.is_conj() or v.is_neg() else v


def rows(v: Tensor) -> Tensor:
    """v itself where its last dimension is dense, else a copy."""
    v = resolved(v)
    return v if v.stride(-1) == 1 or v.shape[-1] == 1 else v.contiguous()


def aligned(v: Tensor) -> Tensor:
    """v with dense rows, at an address that is a multiple of its item size, which a view of other numbers may miss."""
    v = rows(v)
    return v.clone() if v.data_ptr() % v.itemsize else v


def paired(v: Tensor) -> bool:
    """Whether all rows can be moved two numbers at a time."""
    return (
        v.shape[-1] % 2 == 0
        and v.data_ptr() % (2 * v.itemsize) == 0
        and all(stride % 2 == 0 for stride in v.stride()[:-1])
    )


def contiguous(v: Tensor | None) -> Tensor | None:
    return None if v is None else resolved(v).contiguous()


def address(v: Tensor | None) -> int:
    return 0 if v is None else v.data_ptr()


def view(v: Tensor, reverse: bool) -> View:
    """Of v (D,), (T, D) or (B, T, D) in processing order; missing leading dimensions are broadcast."""
    stride = v.stride()
    stride_t = stride[-2] if len(stride) > 1 else 0
    stride_b = stride[-3] if len(stride) > 2 else 0
    if not reverse or not stride_t:
        return v.data_ptr(), stride_b, stride_t
    return v.data_ptr() + (v.shape[-2] - 1) * stride_t * v.element_size(), stride_b, -stride_t


def from_row(row: int, v: View, item_bytes: int) -> View:
    """The view from a row on."""
    return (v[0] + row * v[2] * item_bytes, v[1], v[2]) if row and v[0] else v


def flags_view(flags: Tensor | None, reverse: bool) -> View:
    """Of contiguous flags (B, T), one byte each."""
    if flags is None:
        return ABSENT
    T = flags.shape[1]
    return flags.data_ptr() + (T - 1 if reverse else 0), T, -1 if reverse else 1


def empty_gradient_of_a(a: Tensor, h: Tensor, parts: int, dtype: torch.dtype) -> Tensor:
    """Where a backward kernel writes: parts of the sum over time (parts, B, D) for a constant `a`, else (B, T, D)."""
    B, _, D = h.shape
    return h.new_empty((parts, B, D), dtype=dtype) if a.ndim == 1 else h.new_empty(h.shape, dtype=a.dtype)


def reduced(grad_a: Tensor, a: Tensor) -> Tensor:
    """The gradient in a's shape: summed over what `a` is broadcast along."""
    if a.ndim == 3:
        return grad_a
    return grad_a.sum((0, 1) if a.ndim == 1 else 0).to(a.dtype)
