"""What is scanned in benchmarks/scan_gpu.py: dtypes, shapes, the bytes that must move, and one set of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int, int]

BIG = 256 << 20  # bytes of x from which the goals of bandwidth hold


@dataclass(frozen=True)
class Case:
    """Dtypes of a scan, and whether a is constant in time."""

    name: str
    a: torch.dtype
    x: torch.dtype
    constant: bool

    def forward_bytes(self, shape: Shape) -> int:
        """Read a and x, write h, each once; a constant a is nothing."""
        return elements(shape) * (2 * self.x.itemsize + (0 if self.constant else self.a.itemsize))

    def backward_bytes(self, shape: Shape) -> int:
        """Read a, h and the gradient of h, write the gradients of x and of a, each once."""
        return elements(shape) * (3 * self.x.itemsize + (0 if self.constant else 2 * self.a.itemsize))

    def both_bytes(self, shape: Shape) -> int:
        return self.forward_bytes(shape) + self.backward_bytes(shape)

    def inputs(self, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """a with |a| in (0.9, 1), x and the gradient of h: random, since zeros run faster than data."""
        a = 0.9 + 0.0999 * torch.rand(shape[2:] if self.constant else shape, device=device)
        if self.a.is_complex:
            a = torch.polar(a, 6.2832 * torch.rand_like(a))
        x, g = (torch.randn(shape, dtype=self.x, device=device) for _ in range(2))
        return a.to(self.a), x, g


def elements(shape: Shape) -> int:
    B, T, D = shape
    return B * T * D


_F32, _C64, _BF16 = torch.float32, torch.complex64, torch.bfloat16
CASES = {
    case.name: case
    for case in (
        Case("fp32", _F32, _F32, False),
        Case("fp32, constant a", _F32, _F32, True),
        Case("complex64, constant a", _C64, _C64, True),
        Case("complex64", _C64, _C64, False),
        Case("bf16 beside fp32 a", _F32, _BF16, False),
        Case("bf16, constant fp32 a", _F32, _BF16, True),
    )
}
QUICK_CASES = tuple(CASES)[:3]

SMALL: Shape = (4, 512, 256)  # where launching is what counts
NARROW: Shape = (1, 131072, 64)  # few channels: time must be cut
SHAPES: tuple[Shape, ...] = ((8, 4096, 2048), NARROW, SMALL, (8, 1024, 512), (32, 2048, 1024), (1, 2097152, 64))
QUICK_SHAPES: tuple[Shape, ...] = SHAPES[:3]
LENGTHS: tuple[Shape, ...] = tuple((131072 // T, T, 512) for T in (256, 1024, 4096, 16384, 65536, 131072))

DRY_SHAPES: tuple[Shape, ...] = ((2, 64, 8), (1, 256, 4))
DRY_LENGTHS: tuple[Shape, ...] = ((4, 32, 8), (1, 128, 8))
