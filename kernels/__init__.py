"""The compiled code of linrnn, installed as `linrnn.kernels`.

`cpu` holds C++ behind a C ABI, built with the package when there is a compiler. It knows nothing of torch's or
Python's ABI: one build serves every version of both. `cuda` holds CUDA C++ that needs no header of CUDA's, compiled
for the GPU at hand when it is first used. Everything here takes and returns plain tensors, without autograd;
`linrnn.ops` puts the derivatives on top.
"""

import torch


class KernelUnavailable(RuntimeError):
    """Compiled kernels cannot run here; the message says why and what to do."""


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and accumulators for inputs of `dtype`: half precision is a format, never an accumulator."""
    return torch.promote_types(dtype, torch.float32)


def coefficient_dtype(a: torch.dtype, state: torch.dtype) -> torch.dtype:
    """The dtype of a coefficient of dtype `a` beside states of dtype `state`: as precise, but real if it is real."""
    if a.is_complex or not state.is_complex:
        return state
    return torch.float64 if state == torch.complex128 else torch.float32  # Dynamo cannot trace dtype.to_real
