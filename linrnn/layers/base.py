"""The contract of every layer: a sequence in pieces, whole, or token by token, with one answer."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from linrnn.layers.frozen import compiled_step, stands_for_call

# A NamedTuple of tensors, batch first; a backbone's state is a tuple of its layers' states.
State: TypeAlias = Any
# maps a token x_t (B, D) and a state to y_t (B, D) and the next state
StepFn: TypeAlias = Callable[[Tensor, State], tuple[Tensor, State]]
# {field: (shape behind the batch, dtype)}; a None dimension grows with T, a None dtype is any floating point one.
StateSpec: TypeAlias = Mapping[str, tuple[tuple[int | None, ...], torch.dtype | None]]


class LooksAhead(ValueError, RuntimeError):
    """A layer built to look ahead was asked for what only a causal one has: a wrong argument, noticed late."""


class RecurrentLayer(nn.Module):
    """Maps x (B, T, d_model) and a state to y (B, T, d_model) and the state after the last token.

    ```python
    y, state = layer(x, state=None, reset=None, mask=None)
    y_t, state = layer.step(x_t, state)  # x_t, y_t: (B, d_model)
    ```

    `state=None` is the zero state. `reset` (B, T) bool is True where the state is zeroed *before* token t (the first
    token of a packed document). `mask` (B, T) bool is True on real tokens; a padded token, left or right, leaves the
    state unchanged, and the output there means nothing. States are values: no call changes one. A layer that looks
    ahead (`causal` is False) takes no state, returns None as its state, and cannot step.

    A subclass sets `state_type`, and implements `state_spec` and `forward`, which begins with `check_inputs`.
    """

    state_type: ClassVar[type]

    def __init__(self, d_model: int, *, causal: bool = True):
        super().__init__()
        self.d_model = positive_int("d_model", d_model)
        self.causal = causal

    def state_spec(self) -> StateSpec:
        """Returns the shape (behind the batch) and dtype of each field of the state."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: State = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        raise NotImplementedError

    def step(self, x_t: Tensor, state: State) -> tuple[Tensor, State]:
        """Maps one token x_t (B, d_model) and a state to y_t (B, d_model) and the next state: forward at length 1.

        Raises:
            LooksAhead: (a ValueError and a RuntimeError) the layer is bidirectional.
        """
        self.require_causal("step")
        if not isinstance(x_t, Tensor) or x_t.ndim != 2:
            raise ValueError(f"x_t: expected a tensor of shape (batch, {self.d_model}), got {describe(x_t)}")
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def frozen_step(self) -> StepFn:
        """Returns a function that does what `step` does, for inference at speed.

        What depends on parameters alone is computed now and arguments are not checked: make it again after the
        parameters, the device or the mode have changed. It takes no gradient and no state of another batch size.

        Raises:
            LooksAhead: (a ValueError and a RuntimeError) the layer is bidirectional.
        """
        self.require_causal("frozen_step")
        compiled = compiled_step(self, self.d_model, self.init_state)
        if compiled is not None:
            return compiled
        return self.uncompiled_step() if stands_for_call(self, "uncompiled_step") else self.step

    def uncompiled_step(self) -> StepFn:
        """Returns the frozen step in operations of torch; a layer that can compute something in advance has its own."""
        return self.step

    def init_state(self, batch_size: int) -> State:
        """Returns the zero state, on the device and in the precision of the layer.

        Raises:
            LooksAhead: (a ValueError and a RuntimeError) the layer is bidirectional.
        """
        self.require_causal("init_state")
        reference = next(self.parameters())
        if batch_size < 0:
            raise ValueError(f"batch_size: expected an integer >= 0, got {batch_size}")
        return self.state_type(
            **{
                field: reference.new_zeros((batch_size, *(n or 0 for n in shape)), dtype=dtype)
                for field, (shape, dtype) in self.state_spec().items()
            }
        )

    @property
    def state_size(self) -> int | None:
        """Numbers (a complex one counts twice) in the state of one sequence; None if it grows with T."""
        if not self.causal:
            return None  # a look-ahead layer has to hold the whole sequence
        total = 0
        for shape, dtype in self.state_spec().values():
            if None in shape:
                return None
            size = 1
            for n in shape:
                size *= n or 0
            total += size * (2 if dtype is not None and dtype.is_complex else 1)
        return total

    def optim_hints(self) -> dict[str, dict[str, float]]:
        """Returns {parameter: {"lr_scale": ..., "weight_decay": ...}} for those the optimiser's defaults do not fit."""
        return {}

    def require_causal(self, method: str) -> None:
        if not self.causal:
            raise LooksAhead(
                f"{type(self).__name__}.{method}: a bidirectional layer sees the future and has no state to carry; "
                "build it with bidirectional=False to run it token by token"
            )

    def check_inputs(self, x: Tensor, state: State, reset: Tensor | None, mask: Tensor | None) -> None:
        """Raises TypeError for what is no tensor, ValueError for a wrong shape or dtype, naming the argument."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a floating point tensor, got {describe(x)}")
        if not x.is_floating_point():
            raise ValueError(f"x: expected a floating point tensor, got {describe(x)}")
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape (batch, time, {self.d_model}), got {tuple(x.shape)}")
        parameter = next(self.parameters())
        dtype, device = parameter.dtype, parameter.device
        leaves = [leaf for leaf in state if isinstance(leaf, Tensor)] if isinstance(state, tuple) else []
        for name, v in (("x", x), ("reset", reset), ("mask", mask), *(("state", leaf) for leaf in leaves)):
            if isinstance(v, Tensor) and v.device != device:
                raise ValueError(f"{name}: expected a tensor on {device} like the parameters, got one on {v.device}")
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x: expected {dtype} like the parameters, got {x.dtype}; convert one or use torch.autocast"
            )
        for name, flags in (("reset", reset), ("mask", mask)):
            if flags is None:
                continue
            if not isinstance(flags, Tensor):
                raise TypeError(f"{name}: expected a bool tensor, got {describe(flags)}")
            if flags.dtype != torch.bool:
                raise ValueError(f"{name}: expected a bool tensor, got {describe(flags)}")
            if flags.shape != x.shape[:2]:
                raise ValueError(f"{name}: expected shape {tuple(x.shape[:2])}, got {tuple(flags.shape)}")
        if state is not None:
            self.check_state(state, x.shape[0])

    def check_state(self, state: State, batch_size: int) -> None:
        """Raises TypeError or ValueError unless `state` is one of this layer, for this batch."""
        if not self.causal:
            raise ValueError("state: a bidirectional layer takes none, it sees the whole sequence; expected None")
        if not isinstance(state, self.state_type):
            raise TypeError(f"state: expected {self.state_type.__name__} or None, got {type(state).__name__}")
        spec = self.state_spec()
        for field in getattr(state, "_fields", ()):
            if field not in spec and getattr(state, field) is not None:
                raise ValueError(
                    f"state.{field}: expected None, this layer has no such part; got another layer's state"
                )
        growing: dict[str, int] = {}  # columns of the fields that grow, which they do together
        for field, (shape, dtype) in spec.items():
            leaf = getattr(state, field)
            if not isinstance(leaf, Tensor):
                raise TypeError(f"state.{field}: expected a tensor, got {describe(leaf)}")
            expected = (batch_size, *shape)
            fits = leaf.ndim == len(expected) and all(
                n is None or n == m for n, m in zip(expected, leaf.shape, strict=True)
            )
            if not fits:
                shown = ", ".join("any" if n is None else str(n) for n in expected)
                raise ValueError(f"state.{field}: expected shape ({shown}), got {tuple(leaf.shape)}")
            if None in shape:
                growing[field] = leaf.shape[1 + shape.index(None)]
            if leaf.dtype != dtype if dtype is not None else not leaf.is_floating_point():
                raise ValueError(f"state.{field}: expected {dtype or 'a floating point tensor'}, got {leaf.dtype}")
        if any(n != next(iter(growing.values())) for n in growing.values()):
            raise ValueError(f"state: expected {', '.join(growing)} of one length, got {list(growing.values())}")


def blank_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns x (B, T, D) with zeros at padded tokens, so that no NaN there reaches a gradient or a real token."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0)


def describe(value: object) -> str:
    """Returns a short description of a wrong argument, for error messages."""
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__} {value!r}"


def positive_int(name: str, value: int) -> int:
    """Returns `value`, or raises ValueError naming the argument."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    return value


def finite(*values: object) -> bool:
    """Returns whether all values are finite real numbers: what a range check may compare."""
    return all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) for v in values)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the real dtype of decays and carried states: fp16 and bf16 cannot hold a decay near one."""
    return torch.promote_types(dtype, torch.float32)
