"""Triton kernels of the matrix-state family: linear attention and the delta rule in chunks, and their decoding step.

`linear_attention` and `delta_rule` launch them: plain tensors in and out, without autograd; `linrnn.ops` puts the
derivatives on top. Importing this package imports no Triton; those modules do.
"""

import functools
import re
from importlib.metadata import PackageNotFoundError, version

OLDEST = (3, 6)  # of Triton; and the compute capability of the oldest GPU
OLDEST_GPU = (8, 0)
INSTALL = "pip install 'triton>=3.6'"


@functools.cache
def unavailable(device_index: int) -> str | None:
    """Why Triton kernels cannot run on a CUDA device, with the cure; None if they can. Never raises."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return f"Triton is not installed; {INSTALL}"
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if numbers < OLDEST:
        return f"Triton is {found} and the kernels need 3.6 or newer; {INSTALL}"
    try:
        import torch
        import triton  # noqa: F401

        if torch.version.hip:
            return "the Triton kernels are laid out for NVIDIA GPUs and this torch is built for AMD ones"
        capability = torch.cuda.get_device_capability(device_index)
        name = torch.cuda.get_device_name(device_index)
    except Exception as error:
        return f"Triton or its GPU is not usable: {type(error).__name__}: {error}; {INSTALL}"
    if capability < OLDEST_GPU:
        return f"{name} has compute capability {capability[0]}.{capability[1]} and the Triton kernels need 8.0 or newer"
    return None
