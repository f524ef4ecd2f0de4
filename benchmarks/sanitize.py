"""A short program for compute-sanitizer: every kernel once in every shape of parallelism, on tensors at odd addresses.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck  python benchmarks/sanitize.py
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Without torch's cache every tensor is an allocation of its own, so that reading past its end is found.
"""

import torch

from linrnn.kernels.cuda import selective_plan, selective_scan
from linrnn.kernels.cuda.diagonal_scan import backward, forward
from linrnn.kernels.cuda.diagonal_step import step
from linrnn.kernels.cuda.plan import Plan

PLANS = (
    Plan(width=32, segments=1, rows=4),
    Plan(width=8, segments=8, rows=2),
    Plan(width=32, segments=1, rows=2, chunk=6),
    Plan(width=32, segments=1, rows=3, chunk=9, panel=31),
    None,
)
PAIRS = (
    (torch.float32, torch.float32),
    (torch.complex64, torch.complex64),
    (torch.float32, torch.bfloat16),
)


SELECTIVE_PLANS = (None, selective_plan.Plan(64, 8), selective_plan.Plan(32, 8, 24))


def selective(generator: torch.Generator) -> int:
    """selective_scan, 5 states a channel; returns the number of calls."""
    calls = 0
    for number, plan in enumerate(SELECTIVE_PLANS):
        B, T, D, N = 2, 70, 18 + number % 2, 5
        x, dt, g = (torch.rand(B, T, D, device="cuda", generator=generator) for _ in range(3))
        A, state = -torch.rand(D, N, device="cuda", generator=generator), torch.randn(B, D, N, device="cuda")
        Bs, Cs = (torch.randn(B, T, 1, N, device="cuda", generator=generator) for _ in range(2))
        flags = torch.randint(0, 4, (B, T), dtype=torch.uint8, device="cuda", generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            for given in (None, flags):
                args = (x.to(dtype), dt, A, Bs, Cs)
                y, last, kept = selective_scan.forward(*args, state, given, 8, True, plan=plan)
                grads = selective_scan.backward(*args, given, kept, g, last, 8, plan=plan)
                assert all(v.isfinite().all() for v in (y, last, kept, *grads))
                calls += 2
    return calls


def main() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    calls = 0
    for a_dtype, x_dtype in PAIRS:
        for number, plan in enumerate(PLANS):
            B, T, D = 2, 70, 18 + number % 2  # an even and an odd number of channels
            a = (0.9 * torch.rand((D,) if number % 2 else (B, T, D), device="cuda", generator=generator)).to(a_dtype)
            x, g = (torch.randn(B, T, D, dtype=x_dtype, device="cuda", generator=generator) for _ in range(2))
            flags = torch.randint(0, 4, (B, T), dtype=torch.uint8, device="cuda", generator=generator)
            state = torch.randn(B, D, dtype=torch.promote_types(x_dtype, torch.float32), device="cuda")
            for given in (None, flags):
                h, final_state = forward(a, x, state, given, False, plan=plan)
                grads = backward(a, h, state, given, g, final_state, False, True, plan=plan)
                assert all(v is not None and v.isfinite().all() for v in (h, final_state, *grads))
                calls += 2
        pool = state.repeat(4, 1)
        index = torch.tensor([5, -1], device="cuda")
        step(a[0, 0] if a.ndim == 3 else a, x[:, 0], pool, index, pool)
        calls += 1
    calls += selective(generator)
    torch.cuda.synchronize()
    print(f"{calls} calls, all results finite")


if __name__ == "__main__":
    main()
