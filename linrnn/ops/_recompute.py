"""What the backward pass computes again instead of keeping."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from linrnn.ops._backend import transformed


def recomputed(run: Callable[..., Any], *args: Any, preserve_rng_state: bool = True) -> Any:
    """run(*args), of which the backward pass keeps no more than the arguments.

    Random numbers are drawn again from the same state, if preserved. Under torch.func transforms, which know no hooks
    of saved tensors, all is kept.
    """
    if not torch.compiler.is_compiling() and transformed():
        return run(*args)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
