"""One decoding step of the diagonal recurrence, for a batch whose states are rows of a pool."""

import torch
from torch import Tensor

from linrnn.ops._backend import BackendUnavailable, attempt, choose, unwatched
from linrnn.ops.diagonal_scan import check_dtype, promote


def diagonal_step_reference(a, x, state, index):
    """The step as written; arguments as diagonal_step, checked. Returns the states after it, (B, D)."""
    if index is None:
        return a * state + x.to(state.dtype)
    empty, known = (index == -1)[:, None], (0 <= index) & (index < len(state))
    before = state[torch.where(known, index, 0)]
    after = torch.where(known[:, None], a * before + x.to(state.dtype), torch.nan)
    return torch.where(empty, 0, after)


def diagonal_step(
    a: Tensor,
    x: Tensor,
    state: Tensor,
    index: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Takes one step h = a * h + x of many sequences, each with its own row of a pool of states.

    The step of `diagonal_scan` (Martin and Cundy 2018, arXiv:1709.04057), for a server that adds and drops sequences
    while others go on: their states stay where they are. On a GPU it is one kernel.

    Args:
        a: coefficients, (D,) or (B, D), real or complex.
        x: inputs of this step, (B, D).
        state: states, (S, D), in the dtype that diagonal_scan returns for these inputs.
        index: (B,) int64 or int32, the row of each sequence in `state`; -1 is an empty place in the batch, whose x is
            ignored and whose h is 0. No row may come twice. None where sequence b has row b (S = B).
        out: a pool like `state` that takes the new states in the rows `index` and is returned; other rows stay as they
            are. It may be `state` itself. Without it the new states come back as a new tensor (B, D). Not
            differentiable.
        backend: "auto", "reference", "torch" or "cuda", as for diagonal_scan. The kernel is for inference: where a
            gradient is recorded, and under torch.compile and torch.func, torch's own operations run.

    Returns:
        h (B, D), in x's dtype (the common dtype of a and x unless x is half precision and real), and the new states.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype or device that does not fit, or a gradient asked for beside `out`.
        IndexError: a row that does not exist, on a CPU. On a GPU, where looking would wait for the device, and in
            compiled code, its h is NaN and no state is written.
    """
    _check(a, x, state, index, out)
    a, x, dtype = promote(a, x)
    for name, pool in (("state", state), ("out", out)):
        if pool is not None and pool.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} for a of {a.dtype} and x of {x.dtype}, got {pool.dtype}")
    recorded = torch.is_grad_enabled() and any(v.requires_grad for v in (a, x, state))
    if recorded and out is not None:
        raise ValueError("out= takes no gradient: leave it out, or call under torch.no_grad()")
    if choose(backend, x, ("cuda",)) == "cuda":
        if not recorded and not torch.compiler.is_compiling() and unwatched((a, x, state)):
            from linrnn.kernels.cuda.diagonal_step import step

            outputs = attempt(backend, step, a, x, state, index, out)
            if outputs is not None:
                return outputs
        elif backend == "cuda":
            raise BackendUnavailable(
                "backend='cuda' is for inference: it records no gradient and stands outside torch.compile and "
                "torch.func; use backend='auto'"
            )
    after = diagonal_step_reference(a, x, state, index)
    h = after.to(x.dtype, copy=True)  # what is done to h in place must not reach the state
    if out is None:
        return h, after
    if index is None:
        out.copy_(after)
    else:
        known = (index >= 0) & (index < len(out))
        out[index[known].long()] = after[known]
    return h, out


def _check(a, x, state, index, out) -> None:
    for name, v in (("a", a), ("x", x), ("state", state), ("index", index), ("out", out)):
        if not isinstance(v, Tensor) and (v is not None or name in ("a", "x", "state")):
            raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
    if x.ndim != 2:
        raise ValueError(f"x must be (B, D), got shape {tuple(x.shape)}")
    B, D = x.shape
    if a.shape != (D,) and a.shape != (B, D):
        raise ValueError(f"a must be (D,) or (B, D) with (B, D) = {(B, D)} from x, got shape {tuple(a.shape)}")
    if state.ndim != 2 or state.shape[1] != D or (index is None and state.shape[0] != B):
        rows = "S" if index is not None else B
        raise ValueError(f"state must be ({rows}, {D}) beside x {(B, D)}, got shape {tuple(state.shape)}")
    if index is not None and (index.dtype not in (torch.int64, torch.int32) or index.shape != (B,)):
        raise ValueError(f"index must be int64 or int32 of shape ({B},), got {index.dtype} {tuple(index.shape)}")
    if out is not None and (out.shape != state.shape or out.stride(-1) != 1):
        raise ValueError(
            f"out must be a pool like state, {tuple(state.shape)} with dense rows, got {tuple(out.shape)} with strides "
            f"{out.stride()}"
        )
    seen = index is not None and not torch.compiler.is_compiling() and unwatched((index,))
    if seen and index.device.type == "cpu" and B:
        low, high = index.min(), index.max()
        if low < -1 or high >= len(state):
            raise IndexError(f"index must be in [-1, {len(state) - 1}], got {low if low < -1 else high}")
    for name, v in (("a", a), ("x", x), ("state", state)):
        check_dtype(name, v)
    for name, v in (("a", a), ("state", state), ("index", index), ("out", out)):
        if v is not None and v.device != x.device:
            raise ValueError(f"{name} is on {v.device} but x is on {x.device}; move them to one device")
