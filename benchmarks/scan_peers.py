"""The scans of other libraries on a GPU, each called in the layout it likes best, and the check of their answers.

What a peer needs is made outside the measured time: inputs are transposed or turned into logarithms beforehand, and a
constant gate is written out for those that know no other. What is measured is the scan alone.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.ops import diagonal_scan


def _real(a: Tensor, x: Tensor) -> bool:
    return not (a.is_complex() or x.is_complex())


def _real_alike(a: Tensor, x: Tensor) -> bool:
    return _real(a, x) and a.dtype == x.dtype


def _as_they_are(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return a, x


def _as_found(a: Tensor, x: Tensor, grad_gate: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor]:
    return grad_gate, grad_value


@dataclass(frozen=True)
class Peer:
    """How one scan is called: `scan(gate, value)` gives h, all of them (B, D, T) if `time_last`, else (B, T, D)."""

    name: str
    scan: Callable[[Tensor, Tensor], Tensor]
    time_last: bool = False
    constant: bool = False  # takes a (D,) as it is
    accepts: Callable[[Tensor, Tensor], bool] = _real  # of our a and x
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = _as_they_are  # gate and value of our a and x
    gradients: Callable[..., tuple[Tensor, Tensor]] = _as_found  # (a, x, their gradients) -> our gradients of a and x

    def layout(self, v: Tensor) -> Tensor:
        """(B, T, D) to the peer's own, and back."""
        return v.mT.contiguous() if self.time_last and v.ndim == 3 else v

    def written_out(self, a: Tensor, x: Tensor) -> Tensor:
        return a if self.constant or a.ndim == 3 else a.expand(x.shape)

    def inputs(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The peer's own gate and value, contiguous leaves that want a gradient."""
        gate, value = self.prepare(self.written_out(a, x), x)
        own = (self.layout(v.detach()).clone(memory_format=torch.contiguous_format) for v in (gate, value))
        gate, value = (v.requires_grad_() for v in own)
        return gate, value

    def wrong(self, a: Tensor, x: Tensor, g: Tensor, exact: tuple[Tensor, Tensor, Tensor]) -> tuple[float, str | None]:
        """The largest error of h and its gradients, relative to the largest element, and what is wrong, if anything.

        `exact` holds h and the gradients of x and of a, the latter (B, T, D), in double precision.
        """
        gate, value = self.inputs(a, x)
        h = self.scan(gate, value)
        grads = torch.autograd.grad(h, (gate, value), self.layout(g).to(h.dtype))
        grad_a, grad_x = self.gradients(self.written_out(a, x), x, *(self.layout(v) for v in grads))
        # what is stored in half precision is off by its rounding, and the gradient of a is read off such an h
        allowed = 1e-4 if x.dtype not in (torch.bfloat16, torch.float16) else 3e-2
        largest, names = 0.0, ("h", "the gradient of x", "the gradient of a")
        for name, got, wanted in zip(names, (self.layout(h.detach()), grad_x, grad_a), exact, strict=True):
            if got.ndim == 1:  # of a constant a
                wanted = wanted.sum((0, 1))
            error = ((got - wanted).abs().max() / wanted.abs().max()).item()
            if not error < allowed:
                return error, f"{name} is off by {error:.1e}"
            largest = max(largest, error)
        return largest, None


def find(quick: bool) -> tuple[list[Peer], list[str]]:
    """The peers that can be imported here, and why the others cannot; without those that compile for long if quick."""
    peers = [Peer("linrnn, torch form", _torch_form, constant=True, accepts=lambda a, x: True)]
    missing: list[str] = []
    makers: dict[str, Callable[[], list[Peer]]] = {
        "accelerated-scan, Triton": _accelerated_scan_triton,
        "accelerated-scan, warp": _accelerated_scan_warp,
        "fla": _fla,
        "mamba-ssm": _mamba,
    }
    if not quick:
        makers["torch associative_scan, compiled"] = _associative_scan
    for name, make in makers.items():
        try:
            peers += make()
        except Exception as error:  # a peer may fail to import, to compile or to find its compiler: the table says so
            missing.append(f"{name}: {first_line(error)}")
    return peers, missing


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + (str(error).strip().splitlines() or ["no message"])[0][:200]


def _torch_form(a: Tensor, x: Tensor) -> Tensor:
    return diagonal_scan(a, x, backend="torch")[0]


def _accelerated_scan_warp() -> list[Peer]:
    if importlib.util.find_spec("accelerated_scan") is None:
        raise ModuleNotFoundError("No module named 'accelerated_scan'")
    if not torch.cuda.is_available():  # its import compiles with nvcc, whatever the machine
        raise RuntimeError("needs a GPU and nvcc")
    from accelerated_scan.warp import scan

    def accepts(a: Tensor, x: Tensor) -> bool:
        T = x.shape[1]
        return _real_alike(a, x) and T & (T - 1) == 0 and 32 <= T <= 65536

    def from_ours(a: Tensor, x: Tensor) -> Tensor:
        return scan(a.mT.contiguous(), x.mT.contiguous()).mT.contiguous()

    return [
        Peer("accelerated-scan, warp", scan, time_last=True, accepts=accepts),
        Peer("the same, called from (B, T, D)", from_ours, accepts=accepts),
    ]


def _accelerated_scan_triton() -> list[Peer]:
    from accelerated_scan.complex import scan as complex_scan
    from accelerated_scan.scalar import scan

    def both_complex(a: Tensor, x: Tensor) -> bool:
        return a.is_complex() and x.is_complex()

    return [
        Peer("accelerated-scan, Triton", scan, time_last=True, accepts=_real_alike),
        Peer("accelerated-scan, Triton complex", complex_scan, time_last=True, accepts=both_complex),
    ]


def _fla() -> list[Peer]:
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    def prepare(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return a.log(), x

    def gradients(a: Tensor, x: Tensor, grad_log: Tensor, grad_x: Tensor) -> tuple[Tensor, Tensor]:
        return grad_log / a, grad_x

    return [
        Peer("fla HGRN, chunk", lambda g, x: chunk_hgrn(x, g)[0], prepare=prepare, gradients=gradients),
        Peer("fla HGRN, recurrent", lambda g, x: fused_recurrent_hgrn(x, g)[0], prepare=prepare, gradients=gradients),
    ]


def _mamba() -> list[Peer]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    # one state, A = -1, B = C = 1: h_t = exp(-delta_t) h_{t-1} + delta_t u_t
    def scan(delta: Tensor, u: Tensor) -> Tensor:
        ones = torch.ones(delta.shape[1], 1, device=delta.device)
        return selective_scan_fn(u, delta, -ones, ones, ones)

    def prepare(a: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return -a.log(), x / -a.log()

    def gradients(a: Tensor, x: Tensor, grad_delta: Tensor, grad_u: Tensor) -> tuple[Tensor, Tensor]:
        grad_x = grad_u / -a.log()
        return (grad_x * x / -a.log() - grad_delta) / a, grad_x

    return [
        Peer("mamba-ssm, selective scan", scan, True, accepts=_real_alike, prepare=prepare, gradients=gradients),
    ]


def _associative_scan() -> list[Peer]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(u, v):
        return v[0] * u[0], v[0] * u[1] + v[1]

    def scan(a: Tensor, x: Tensor) -> Tensor:
        return associative_scan(combine, (a, x), dim=1, combine_mode="pointwise" if x.is_cuda else "generic")[1]

    compiled = torch.compile(scan, fullgraph=True) if torch.cuda.is_available() else scan
    return [Peer("torch associative_scan, compiled", compiled, accepts=lambda a, x: a.dtype == x.dtype)]
