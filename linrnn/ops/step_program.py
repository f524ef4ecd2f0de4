"""A step of decoding as one call: the operations of a layer, a block or a model in a list that a kernel walks through.

At batch 1 a step takes as long as reading the weights, some tens of microseconds a matrix on a CPU, and a dozen calls
of torch a layer take as long again. A layer that has `emit_step` writes its step into a `StepProgram` instead; blocks
and models do so with all of theirs.
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from linrnn.kernels.cpu.step import ACTIVATIONS, Kind, Ref, pack, run
from linrnn.kernels.cpu.threads import usable_cpus
from linrnn.kernels.tensors import resolved
from linrnn.ops._backend import choose

INPUT, ARENA, OUTPUT, STATES = range(4)  # slots; each leaf of the state has two behind STATES: before and after
# Weights of an operation, on average, below which the threads would wait for each other longer than they read.
MIN_WEIGHTS = 16_384


class StepProgram:
    """Operations on B rows of float32, written one by one, then run together as often as wanted.

    Each operation waits until all threads have finished those before, unless `local`: then it must read nothing but
    channels that the same thread has written, which holds where both have as many units of channels. A `linear` in
    front of one that waits is for any thread that has time: what is read since the last wait must not be its `out`.
    """

    def __init__(self, d_in: int, d_out: int):
        self.x, self.y = Ref(INPUT, 0, 0, d_in, d_in), Ref(OUTPUT, 0, 0, d_out, d_out)
        self.leaves: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._ops: list[bytes] = []
        self._constants: list[Tensor] = []
        self._arena = self._top = 0

    def buffer(self, width: int) -> Ref:
        """Returns room for `width` numbers a row, until the next `recycle`."""
        ref = Ref(ARENA, self._top, 0, width, width)
        self._top += -(-width // 16) * 16
        self._arena = max(self._arena, self._top)
        return ref

    def mark(self) -> int:
        """Returns what `recycle` takes to give back the buffers made from here on."""
        return self._top

    def recycle(self, mark: int) -> None:
        """Gives buffers back; what writes to them next must not be local to what reads them now."""
        self._top = mark

    def state(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Ref, Ref]:
        """Declares the next leaf of the state, of this shape behind the batch; returns it before and after the step."""
        width = 2 if dtype.is_complex else 1
        for n in shape:
            width *= n
        slot = STATES + 2 * len(self.leaves)
        self.leaves.append((shape, dtype))
        return Ref(slot, 0, 0, width, width), Ref(slot + 1, 0, 0, width, width)

    def linear(
        self,
        x: Ref,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out: Ref | None = None,
        add: Ref | None = None,
        gain: Tensor | None = None,
        gained: Ref | None = None,
        unit: int = 1,
        local: bool = False,
    ) -> Ref:
        """W x (+ bias) (+ gain * gained) (+ add): weight (N, D), bias and gain (N). A thread takes whole units of N."""
        outputs, size = weight.shape
        out = self.buffer(outputs) if out is None else out
        refs, constants = (x, out, add, gained), (weight, bias, gain)
        return self._emit(Kind.LINEAR, refs, constants, out, local, outputs=outputs, size=size, unit=unit)

    def norm(
        self,
        x: Ref,
        weight: Tensor | None,
        bias: Tensor | None = None,
        *,
        eps: float,
        centred: bool = False,
        out: Ref | None = None,
        local: bool = False,
    ) -> Ref:
        """The RMS norm of x, or the layer norm where `centred`. It may be in place. A thread takes whole rows."""
        out = self.buffer(x.width) if out is None else out
        shape = {"outputs": 1, "size": x.width, "option": int(centred), "eps": eps}
        return self._emit(Kind.NORM, (x, out), (weight, bias), out, local, **shape)

    def conv(
        self, x: Ref, weight: Tensor, bias: Tensor | None, *, activation: str | None = None, local: bool = False
    ) -> Ref:
        """The causal convolution of `causal_conv1d` with filters (D, W); declares its state (W - 1, D)."""
        D, W = weight.shape
        before, after = self.state(W - 1, D)
        out = self.buffer(D)
        shape = {"outputs": D, "size": W, "option": ACTIVATIONS[activation]}
        return self._emit(Kind.CONV, (x, out, before, after), (weight.mT, bias), out, local, **shape)

    def selective(self, x: Ref, dt: Ref, A: Tensor, B: Ref, C: Ref, D: Tensor, z: Ref, *, local: bool = False) -> Ref:
        """The step of `selective_scan` with dt_softplus and one group, A (D, N) real; declares its state (D, N)."""
        before, after = self.state(*A.shape)
        out = self.buffer(x.width)
        rates = (A.double() / math.log(2)).float()
        refs = (x, dt, B, C, z, out, before, after, self.buffer(x.width))
        shape = {"outputs": A.shape[0], "size": A.shape[1]}
        return self._emit(Kind.SELECTIVE, refs, (rates, D), out, local, **shape)

    def diagonal(self, u: Ref, a: Tensor, gain: Tensor, *, local: bool = False) -> Ref:
        """The step h = a h + gain u, all real or (but the gain) complex; declares its state (N) and returns it."""
        before, after = self.state(len(a), dtype=a.dtype)
        numbers = torch.view_as_real(a) if a.is_complex() else a
        shape = {"outputs": len(a), "option": int(a.is_complex())}
        return self._emit(Kind.DIAGONAL, (u, before, after), (numbers, gain), after, local, **shape)

    def rglru(self, x: Ref, recurrent: Ref, input: Ref, rate: Tensor, *, local: bool = False) -> Ref:
        """The step of `RGLRU` behind the logits of its gates; declares its state, h and begun, and returns h."""
        before, after = self.state(x.width)
        begun, begun_after = self.state()
        refs = (x, recurrent, input, before, after, begun, begun_after)
        return self._emit(Kind.RGLRU, refs, (rate,), after, local, outputs=x.width)

    def heads(
        self,
        x: Ref,
        dt: Ref,
        A: Tensor,
        B: Ref,
        C: Ref,
        D: Tensor,
        dt_bias: Tensor,
        *,
        n_groups: int,
        limits: tuple[float, float],
    ) -> Ref:
        """The step of Mamba-2's heads, A, D and dt_bias (H), x (H P), B and C (G N); declares its state (H, N, P)."""
        H, P, N = len(A), x.width // len(A), B.width // n_groups
        before, after = self.state(H, N, P)
        out = self.buffer(x.width)
        refs = (x, dt, B, C, out, before, after)
        shape = {"outputs": x.width, "size": N, "option": P + (H // n_groups << 32)}
        return self._emit(Kind.HEADS, refs, (A, D, dt_bias, A.new_tensor(limits)), out, False, **shape)

    def wkv(self, k: Ref, v: Ref, w: Tensor, u: Tensor, *, local: bool = False) -> Ref:
        """The step of `wkv` with a real decay, w and u (N); declares its state, p, a and b (N)."""
        states = [self.state(k.width) for _ in range(3)]
        out = self.buffer(k.width)
        refs = (k, v, out, *(before for before, _ in states), *(after for _, after in states))
        return self._emit(Kind.WKV, refs, (w, u), out, local, outputs=k.width)

    def shift(self, x: Ref, mixes: Sequence[Tensor]) -> list[Ref]:
        """Mixes x with that of the token before by each of `mixes` (D), as in RWKV; declares its state (D)."""
        before, after = self.state(x.width)
        mixed = []
        for i, mix in enumerate(mixes):
            refs = (x, self.buffer(x.width), before, None if i else after)
            mixed.append(self._emit(Kind.SHIFT, refs, (mix,), refs[1], i > 0, outputs=x.width))
        return mixed

    def gate(
        self,
        x: Ref,
        value: Ref | None = None,
        *,
        activation: str | None = None,
        add: Ref | None = None,
        out: Ref | None = None,
        local: bool = False,
    ) -> Ref:
        """activation(x) (* value) (+ add); "gelu" is the approximation by tanh."""
        out = self.buffer(x.width) if out is None else out
        shape = {"outputs": x.width, "option": ACTIVATIONS[activation]}
        return self._emit(Kind.GATE, (x, out, value, add), (), out, local, **shape)

    def _emit(self, kind: Kind, refs, constants, out: Ref, local: bool, **shape: Any) -> Ref:
        kept = [None if c is None else resolved(c.detach()).contiguous() for c in constants]
        self._constants += [c for c in kept if c is not None]
        self._ops.append(pack(kind, refs, kept, barrier=not local, **shape))
        return out

    def function(self) -> Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
        """Returns the function (x (B, d_in), leaves of the state) -> (y (B, d_out), leaves after it).

        It raises ValueError for leaves of another number, shape or dtype, and RuntimeError once parameters have been
        moved (`share_memory`, a pickle for another process): what it reads lies at addresses.
        """
        ops, n_ops, leaves = b"".join(self._ops), len(self._ops), self.leaves
        constants = list({c.untyped_storage().data_ptr(): c for c in self._constants}.values())  # one of each storage
        places = [c.data_ptr() for c in constants]
        # not by the batch: a row's numbers must not depend on it, and threads are what channels are dealt out to
        parallel = sum(c.numel() for c in self._constants) >= MIN_WEIGHTS * n_ops
        most = usable_cpus() if parallel else 1  # threads that spin for one without a core cost milliseconds
        packer, arena_width, d_in, d_out = (
            struct.Struct(f"{STATES + 2 * len(leaves)}q").pack,
            self._arena,
            self.x.width,
            self.y.width,
        )

        def call(x: Tensor, before: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            B = len(x)
            if x.shape != (B, d_in) or x.dtype is not torch.float32 or not x.is_cpu:
                raise ValueError(
                    f"x: expected float32 of shape (batch, {d_in}) on the CPU, got {x.dtype} {tuple(x.shape)}"
                )
            if len(before) != len(leaves):
                raise ValueError(f"state: expected {len(leaves)} tensors, got {len(before)}")
            if list(map(Tensor.data_ptr, constants)) != places:
                raise RuntimeError("parameters have been moved in memory: make the frozen step again")
            x = resolved(x).contiguous()
            # of the dtype and on the device of x, whatever torch's defaults are
            y, arena = x.new_empty(B, d_out), x.new_empty(B * arena_width)
            held, after, addresses = [x], [], [x.data_ptr(), arena.data_ptr(), y.data_ptr()]
            for leaf, (shape, dtype) in zip(before, leaves, strict=True):
                if leaf.dtype is not dtype or leaf.shape != (B, *shape) or not leaf.is_cpu:
                    raise ValueError(
                        f"state: expected {dtype} {(B, *shape)} on the CPU, got {leaf.dtype} {tuple(leaf.shape)} on "
                        f"{leaf.device}"
                    )
                if not leaf.is_contiguous() or leaf.is_conj() or leaf.is_neg():
                    leaf = resolved(leaf).contiguous()
                    held.append(leaf)
                next_leaf = torch.empty_like(leaf)
                after.append(next_leaf)
                addresses += (leaf.data_ptr(), next_leaf.data_ptr())
            run(ops, n_ops, packer(*addresses), B, min(most, torch.get_num_threads()))
            return y, after

        return call


def can_run(parameters: Iterable[Tensor]) -> bool:
    """Whether a program can hold these parameters: plain float32 on a CPU, with the compiled kernels there."""
    parameters = list(parameters)
    plain = all(type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 for p in parameters)
    return bool(parameters) and plain and all(choose("auto", p, ("cpu",)) == "cpu" for p in parameters)


def flatten(state: Any, leaves: list[Tensor]) -> list[Tensor]:
    """Appends the leaves of a state, nested tuples of tensors, and returns the list."""
    for part in state:
        if isinstance(part, Tensor):
            leaves.append(part)
        else:
            flatten(part, leaves)
    return leaves


def builder(state: Any) -> Callable[[Iterator[Tensor]], Any]:
    """Returns what makes a state of the form of this one from its leaves."""
    make = getattr(type(state), "_make", type(state))
    if all(isinstance(part, Tensor) for part in state):
        n = len(state)
        return lambda leaves: make(islice(leaves, n))
    parts = [(lambda leaves: next(leaves)) if isinstance(part, Tensor) else builder(part) for part in state]
    return lambda leaves: make([part(leaves) for part in parts])
