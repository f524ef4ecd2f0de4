"""How a problem is laid out for the Triton kernels: chunk, tiles, the dtype of products, the sums of log decays."""

import contextlib
import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from linrnn.kernels.triton.chunks import channel_sums
from linrnn.kernels.triton.tiles import CHANNEL, HEAD, NONE

# of every launch: Triton 3.9 warns without it, and later ones change what it means to say nothing
OPTIONS = {"enable_fp_fusion": True}
MAX_REGISTERS = 255  # of a thread; told so, ptxas no longer spills to have more blocks at once
KINDS = {0: NONE, 3: HEAD, 4: CHANNEL}  # of decay, by the number of dimensions

# operands of products, and how float32 ones are multiplied. A float16 product may overflow where its float32 sums do
# not; tf32 holds all bits of float16.
PRODUCTS = {
    torch.bfloat16: (tl.bfloat16, "tf32"),
    torch.float16: (tl.float32, "tf32"),
    torch.float32: (tl.float32, "tf32x3"),
}
STORED = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32, torch.float32: torch.float32}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The chunk, 2^levels tokens, the most keys and values in a tile, and what Triton is told of each launch."""

    levels: int
    K: int
    V: int
    num_warps: int
    num_stages: int


@functools.cache
def warpgroup_products(device: torch.device) -> bool:
    """Whether products take operands from shared memory (Hopper, and Blackwell of data centers), not from registers."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def layout(
    T: int, K: int, V: int, dtype: torch.dtype, kind: int, delta: bool, chunk_size: int, warpgroups: bool
) -> Layout:
    """The largest tiles whose kernels stay within the registers; a test compiles them all.

    tl.dot takes no less than 16, and the sums of log decays are exact up to 64 tokens. Kernels with many products get
    by with fewer where those hold their operands in registers, or, as tf32x3, three products and both their halves.
    """
    channel = kind == CHANNEL.value
    exact = PRODUCTS[dtype][1] == "tf32x3"
    if warpgroups:
        longest = 16 if exact and (channel or delta) else 64
    else:
        longest = 16 if exact or channel else 32 if delta else 64
    C = longest if min(T, chunk_size) > 16 else 16
    widest = 64 if warpgroups and dtype == torch.bfloat16 and not channel else 32
    narrowest = 16 if dtype == torch.float16 and channel and delta else widest
    BK, BV = (max(16, min(w, triton.next_power_of_2(width))) for w, width in ((widest, K), (narrowest, V)))
    return Layout(C.bit_length() - 1, BK, BV, 8 if C > 16 else 4, 2 if dtype == torch.bfloat16 else 1)


def decay_kind(log_decay: Tensor | None) -> int:
    return KINDS[0 if log_decay is None else log_decay.ndim].value


class Problem:
    """Shapes, blocks and decays of one call; q, k (B, T, H, K) and v (B, T, H, V) of one dtype, at least one token.

    log_decay: None, (B, T, H) or (B, T, H, K). Its sums, where there is one per channel, are made here.
    """

    def __init__(self, q: Tensor, v: Tensor, log_decay: Tensor | None, chunk_size: int, delta: bool = False) -> None:
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[-1]
        self.kind = decay_kind(log_decay)
        warpgroups = warpgroup_products(q.device)
        self.layout = layout(self.T, self.K, self.V, q.dtype, self.kind, delta, chunk_size, warpgroups)
        self.C = 1 << self.layout.levels
        self.n = -(-self.T // self.C)
        self.q, self.v = q, v
        self.dot, self.precision = PRODUCTS[q.dtype]
        self.stored = STORED[q.dtype]
        self.log_decay = None if log_decay is None else log_decay.contiguous()
        self.decay, self.part = self.log_decay, 0
        if self.kind == CHANNEL.value:
            W = self.H * self.K
            self.decay = q.new_empty((2, self.B, self.n * self.C, W), dtype=torch.float32)
            self.part = self.decay.stride(0)
            grid = (self.B * self.n, triton.cdiv(W, 32))
            channel_sums[grid](self.log_decay, self.decay, self.part, self.T, W, self.n, C=self.C, BW=32, **OPTIONS)

    def sizes(self) -> tuple[int, int, int, int, int]:
        return self.T, self.H, self.K, self.V, self.n

    def states(self) -> Tensor:
        """Room for one state per chunk."""
        return self.q.new_empty((self.B, self.H, self.n, self.K, self.V), dtype=torch.float32)

    def state(self) -> Tensor:
        return self.q.new_empty((self.B, self.H, self.K, self.V), dtype=torch.float32)

    def pairs(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Room for one number per pair of tokens of a chunk."""
        return self.q.new_empty((self.B, self.H, self.n, self.C, self.C), dtype=dtype)

    def written(self) -> Tensor:
        """Room for a sequence of values, in the dtype that products take."""
        return torch.empty_like(self.v, dtype=self.stored)

    def blocks_of_keys(self) -> int:
        return triton.cdiv(self.K, self.layout.K)

    def blocks_of_values(self) -> int:
        return triton.cdiv(self.V, self.layout.V)

    def options(self, values: bool = True) -> dict:
        """What kernels with products of tiles take; those without values have no BV."""
        return {
            "DECAY": self.kind,
            "LEVELS": self.layout.levels,
            "BK": self.layout.K,
            **({"BV": self.layout.V} if values else {}),
            "DOT": self.dot,
            "PRECISION": self.precision,
            "num_warps": self.layout.num_warps,
            "num_stages": self.layout.num_stages,
            "maxnreg": MAX_REGISTERS,
            **OPTIONS,
        }


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
