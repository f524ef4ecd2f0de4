"""Which implementation runs: the choice behind `backend="auto"`, and the errors and warnings around it."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as _forward_ad
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack

from linrnn.kernels import KernelUnavailable

T = TypeVar("T")
BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "triton")
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # compiled backend -> the type of device it runs on


class BackendUnavailable(ValueError, RuntimeError):
    """The backend asked for cannot run here: wrong as an argument, because of this machine or these tensors."""


class FallbackWarning(UserWarning):
    """A compiled kernel is missing, so a slower form runs. Shown once, with the cure."""


def choose(backend: str, x: Tensor, available: tuple[str, ...]) -> str:
    """The backend that runs for x: `backend` itself, checked, or the fastest available one for "auto".

    `available` names the compiled backends that the op has. Raises ValueError for an unknown name and
    BackendUnavailable for one that cannot run on x.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("reference", "torch"):
        return backend
    device = x.device
    if backend == "auto":
        backend = next((kind for kind in available if DEVICES[kind] == device.type), "torch")
        if backend != "torch":
            reason = _missing(backend, device.index or 0)
            if reason is not None:
                _warn_once(f"running in pure torch, several times slower: {reason}")
                return "torch"
        return backend
    if backend not in available:
        raise BackendUnavailable(f"backend={backend!r} has no kernel for this op; use 'auto', or one of {available}")
    if device.type != DEVICES[backend]:
        needed = DEVICES[backend].upper()
        raise BackendUnavailable(
            f"backend={backend!r} runs on {needed} tensors, got tensors on {device}; use backend='auto'"
        )
    reason = _missing(backend, device.index or 0)
    if reason is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {reason}")
    return backend


def attempt(backend: str, launch: Callable[..., T], *args: Any) -> T | None:
    """launch(*args), on a backend that `choose` has chosen for `backend`; None if its program cannot be had after all.

    That is so where the programs tried before came from the cache and there is no compiler for this one. Warns once for
    "auto"; raises BackendUnavailable if the backend was asked for by name.
    """
    try:
        return launch(*args)
    except KernelUnavailable as error:
        if backend != "auto":
            raise BackendUnavailable(f"backend={backend!r} cannot run here: {error}") from error
        _warn_once(f"running in pure torch, several times slower: {error}")
        return None


def _missing(backend: str, device_index: int) -> str | None:
    """Why a compiled backend cannot run on this machine, with the cure; None if it can."""
    if backend == "cpu":
        return _cpu_library_missing()
    if backend == "triton":
        from linrnn.kernels import triton

        return triton.unavailable(device_index)
    from linrnn.kernels import cuda

    return cuda.unavailable(device_index)


@functools.cache
def _cpu_library_missing() -> str | None:
    from linrnn.kernels.cpu import library

    try:
        library()
    except KernelUnavailable as error:
        return str(error)
    return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FallbackWarning, stacklevel=4)


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def unwatched(tensors: tuple[Tensor, ...]) -> bool:
    """Whether no torch.func transform, forward-mode AD, trace, dispatch mode or tensor subclass sees these tensors.

    A kernel may then be called on them directly, past the dispatcher and its overhead.
    """
    if transformed() or _len_torch_dispatch_stack() > 0:
        return False
    if _get_tracing_state() is not None:
        return False
    return all(type(v) in _PLAIN_TYPES for v in tensors)
