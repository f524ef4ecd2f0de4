"""Checks and conversions that the ops with heads share: shapes, dtypes, ranges, resets and padding."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels import state_dtype
from linrnn.ops._backend import unwatched

FORGET = -1e5  # the real part of a complex log decay that forgets all: torch turns sums of complex infinities into NaN
MODES = ("chunk", "recurrent", "parallel", "reference")


def check_mode(mode: str, chunk_size: int) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")


def check_shape(name: str, v: object, letters: Sequence[str], sizes: dict[str, int], real: bool = False) -> None:
    """Checks that `v` is a floating point tensor of shape `letters`; a letter not yet in `sizes` is entered there."""
    if not isinstance(v, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
    if not (v.is_floating_point() or (v.is_complex() and not real)):
        raise ValueError(f"{name} must be floating point{'' if real else ' or complex'}, got {v.dtype}")
    shape = tuple(v.shape)
    if len(shape) == len(letters):
        for letter, size in zip(letters, shape, strict=True):
            sizes.setdefault(letter, size)
    wanted = tuple(sizes.get(letter, letter) for letter in letters)
    if shape != wanted:
        raise ValueError(f"{name} must be ({', '.join(letters)}) = {wanted}, got shape {shape}")


def check_log_decay(
    v: Tensor | None,
    shapes: tuple[str, ...],
    sizes: dict[str, int],
    device: torch.device,
    real: bool = False,
    name: str = "log_decay",
) -> None:
    """Log decays have one of `shapes` (the number of dimensions picks which) and are at most 0."""
    fitting = [letters for letters in shapes if isinstance(v, Tensor) and v.ndim == len(letters)]
    if isinstance(v, Tensor) and not fitting:
        allowed = " or ".join(f"({', '.join(letters)})" for letters in shapes)
        raise ValueError(f"{name} must be {allowed}, got shape {tuple(v.shape)}")
    check_shape(name, v, (fitting or shapes)[0], sizes, real)
    check_device(name, v, device)
    check_range(name, v, -torch.inf, 0.0, "at most 0 (a decay of at most 1)")


def check_flags(reset: Tensor | None, mask: Tensor | None, B: int, T: int, device: torch.device) -> None:
    """reset and mask are (B, T) bool, on the device of the rest."""
    for name, v in (("reset", reset), ("mask", mask)):
        if v is None:
            continue
        if not isinstance(v, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(v).__name__}")
        if v.dtype != torch.bool or v.shape != (B, T):
            raise ValueError(f"{name} must be bool of shape (B, T) = {(B, T)}, got {v.dtype} {tuple(v.shape)}")
        check_device(name, v, device)


def check_device(name: str, v: Tensor | None, device: torch.device) -> None:
    if v is not None and v.device != device:
        raise ValueError(f"{name} is on {v.device} but the other inputs are on {device}; move them to one device")


def check_range(name: str, v: Tensor | None, low: float, high: float, meaning: str) -> None:
    """Raises where a value lies outside [low, high]; NaN passes. `meaning` ends the message.

    Only for CPU tensors that nothing watches: elsewhere a look at the values costs a wait, or cannot be traced.
    """
    if v is None or v.numel() == 0 or v.device.type != "cpu":
        return
    if torch.compiler.is_compiling() or not unwatched((v,)):
        return
    values = v.detach().real if v.is_complex() else v.detach()
    smallest, largest = (values.amin().item() if low > -torch.inf else low), values.amax().item()
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        raise ValueError(f"{name} must be {meaning}, got a value of {worst:.4g}")


def dtypes(sequences: tuple[Tensor, ...], log_decay: Tensor | None = None) -> tuple[torch.dtype, torch.dtype]:
    """(dtype of the output, dtype of states and sums): half precision is a storage format, never an accumulator.

    A log_decay more precise than half-precision sequences leaves the output as it is; float64 or complex widens all.
    """
    out = sequences[0].dtype
    for v in sequences[1:]:
        out = torch.promote_types(out, v.dtype)
    wide = state_dtype(out)
    if log_decay is not None:
        wide = torch.promote_types(wide, log_decay.dtype)
    return (out if wide == state_dtype(out) else wide), wide


def widen(name: str, state: Tensor, wide: torch.dtype) -> Tensor:
    """The initial state in the dtype of states; a complex one beside real inputs is refused."""
    if state.is_complex() and not wide.is_complex:
        raise ValueError(f"{name} is {state.dtype}, but the inputs are real, so the state is real too")
    return state if state.dtype == wide else state.to(wide)


def matrix_state(state: Any, sizes: dict[str, int], wide: torch.dtype, device: torch.device) -> Tensor | None:
    """An initial state (B, H, K, V), checked and in the dtype of states."""
    if state is None:
        return None
    check_shape("initial_state", state, "BHKV", sizes)
    check_device("initial_state", state, device)
    return widen("initial_state", state, wide)


def full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Keeps the caller's autocast out: sums are float32, also where the products around are not."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def real_dtype(wide: torch.dtype) -> torch.dtype:
    """float64 for complex128, float32 for complex64, and real ones as they are."""
    return {torch.complex64: torch.float32, torch.complex128: torch.float64}.get(wide, wide)


def fold_flags(
    log_decay: Tensor | None, reset: Tensor | None, mask: Tensor | None, like: Tensor, *sequences: Tensor
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """log_decay, and sequences, that say the same without flags.

    A padded token neither decays nor writes nor reads: 0 in log_decay and in all sequences. A reset is a log decay of
    -inf (or FORGET) at its token. A log_decay of (H,) then varies in time; `like` (B, T, H, ...) gives the shape.
    """
    if reset is None and mask is None:
        return log_decay, sequences
    B, T, H = like.shape[:3]
    if mask is not None:
        sequences = tuple(torch.where(expand_flags(mask, v), v, 0) for v in sequences)
    if log_decay is None:
        if reset is None:
            return None, sequences
        log_decay = torch.zeros((B, T, H), dtype=real_dtype(like.dtype), device=like.device)
    elif log_decay.ndim == 1:
        log_decay = log_decay.expand(B, T, H)
    if mask is not None:
        log_decay = torch.where(expand_flags(mask, log_decay), log_decay, 0)
    if reset is not None:
        all_forgotten = FORGET if log_decay.is_complex() else -torch.inf
        log_decay = torch.where(expand_flags(reset, log_decay), all_forgotten, log_decay)
    return log_decay, sequences


def expand_flags(flags: Tensor, like: Tensor) -> Tensor:
    """(B, T) with trailing dimensions of size 1, as many as `like` has."""
    return flags[(...,) + (None,) * (like.ndim - flags.ndim)]
