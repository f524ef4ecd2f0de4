"""What benchmarks/ssm.py measures: our layers with vectors of states, and beside each the peers with the same weights.

A peer that cannot be imported, built or given our weights is left out, by name and reason.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linrnn import layers
from linrnn.layers import RGLRU, S5, Griffin, Mamba, RecurrentLayer
from linrnn.ops import selective_scan

N = 16  # states of a channel of Mamba
CHUNK = 128  # MEGA's


@dataclass(frozen=True)
class Size:
    """B sequences of T tokens, D = `width` channels, on a device."""

    batch: int
    time: int
    width: int
    device: torch.device

    def x(self) -> Tensor:
        return torch.randn(self.batch, self.time, self.width, device=self.device, requires_grad=True)


@dataclass(frozen=True)
class Case:
    """One row: `run` gives y (B, T, D) from `sources`, by all of which forward + backward derives.

    A peer computes what the first row above that is none does. One that cuts its inputs into tokens, so that autograd
    takes T gradients of full size, is `quadratic`: its forward + backward runs once, minutes at T = 2048.
    """

    name: str
    sources: tuple[Tensor, ...]
    run: Callable[[], Tensor]
    step: Callable[[], object] | None = None  # one token of one sequence
    peer: bool = False
    quadratic: bool = False


Maker = Callable[[], Case]


def collect(*rows: tuple[str, Maker], only: str | None = None) -> Iterator[Case]:
    """The rows that can be made; `only` one of them, if it is named."""
    for name, make in rows:
        if only in (None, name):
            try:
                yield make()
            except Exception as error:  # a peer for another version of torch fails in ways of its own
                print(f"{name} left out: {type(error).__name__}: {error}", file=sys.stderr)


def of_layer(label: str, layer: RecurrentLayer, x: Tensor) -> Case:
    x_t, state = x.detach()[:1, 0], layer.init_state(1)
    return Case(label, (x, *layer.parameters()), lambda: layer(x)[0], lambda: layer.step(x_t, state))


def conv1d_names(layer: nn.Module, name: str = "conv1d") -> dict[str, Tensor]:
    """The state_dict with the filters as nn.Conv1d has them."""
    given = layer.state_dict()
    return given | {f"{name}.weight": given[f"{name}.weight"][:, None]}


def mamba(size: Size, only: str | None = None) -> Iterator[Case]:
    x, D = size.x(), size.width
    layer = Mamba(D, d_state=N).to(size.device)
    weights, E, R = conv1d_names(layer), layer.d_inner, layer.dt_rank
    x_t = x.detach()[:1, 0]

    def peer(
        name: str, module: nn.Module, run: Callable[[], Tensor], step: Callable | None, slow: bool = False
    ) -> Case:
        module.to(size.device).load_state_dict(weights)
        return Case(name, (x, *module.parameters()), run, step, peer=True, quadratic=slow)

    def mambapy() -> Case:
        from mambapy.mamba import MambaBlock, MambaConfig

        module = MambaBlock(MambaConfig(d_model=D, n_layers=1, d_state=N))
        cache = (x.new_zeros(1, E, N), x.new_zeros(1, E, 3))
        return peer("mambapy", module, lambda: module(x), lambda: module.step(x_t, cache))

    def transformers() -> Case:
        from transformers import DynamicCache

        module, config = transformers_mixer(D)
        cache = DynamicCache(config=config)

        def step() -> Tensor:
            return module(x_t[:, None], cache_params=cache)

        return peer("transformers", module, lambda: module(x), step, slow=True)

    def mamba_ssm() -> Case:
        from mamba_ssm.modules.mamba_simple import Mamba as Peer

        module = Peer(D, d_state=N)
        caches = (x.new_zeros(1, E, 4), x.new_zeros(1, E, N))
        return peer("mamba-ssm", module, lambda: module(x), lambda: module.step(x_t[:, None], *caches))

    def fla() -> Case:
        from fla.layers.mamba import Mamba as Peer

        module = Peer(D, state_size=N, intermediate_size=E, time_step_rank=R, use_bias=False)
        return peer("fla", module, lambda: module(x)[0], None, slow=True)  # unless it finds mamba-ssm

    gpu = (("mamba-ssm", mamba_ssm), ("fla", fla)) if size.device.type == "cuda" else ()
    ours = ("mamba", lambda: of_layer("mamba", layer, x))
    return collect(ours, ("mambapy", mambapy), ("transformers", transformers), *gpu, only=only)


def transformers_mixer(d_model: int) -> tuple[nn.Module, object]:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=d_model, state_size=N, num_hidden_layers=1)
    return MambaMixer(config, layer_idx=0), config


def scan(size: Size, only: str | None = None) -> Iterator[Case]:
    """The op alone, for 2 D channels as in a layer of width D."""
    B, T, E = size.batch, size.time, 2 * size.width
    x, z_dt = (torch.randn(B, T, E, device=size.device) for _ in range(2))
    dt, A = F.softplus(z_dt - 4), -torch.arange(1.0, N + 1, device=size.device).repeat(E, 1)
    b, c = (torch.randn(B, T, N, device=size.device) for _ in range(2))
    inputs = tuple(v.requires_grad_() for v in (x, dt, A, b, c, torch.ones(E, device=size.device)))
    first = torch.randn(B, E, N, device=size.device).requires_grad_()

    def ours(name: str, backend: str, peer: bool = False) -> Case:
        last = torch.zeros_like(first)
        one = tuple(v.detach()[:1, :1] if v.ndim == 3 else v.detach() for v in inputs)
        step = None if peer else lambda: selective_scan(*one, None, last[:1])
        return Case(name, inputs, lambda: selective_scan(*inputs, backend=backend)[0], step, peer)

    def with_states() -> Case:
        def run() -> Tensor:
            y, last = selective_scan(*inputs, None, first)
            return torch.cat((y, last.mT.reshape(B, N, E)), 1)

        return Case("selective_scan, gradients from and to its states", (*inputs, first), run)

    def mambapy() -> Case:
        from mambapy.mamba import MambaBlock

        return Case("mambapy", inputs, lambda: MambaBlock.selective_scan(None, *inputs), peer=True)

    def mamba_ssm() -> Case:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        # time last is its layout, so that nothing is turned while it is timed
        turned = [v.detach().mT.contiguous().requires_grad_() if v.ndim == 3 else v for v in inputs]
        return Case("mamba-ssm", tuple(turned), lambda: selective_scan_fn(*turned).mT, peer=True)

    gpu = (("mamba-ssm", mamba_ssm),) if size.device.type == "cuda" else ()
    return collect(
        ("selective_scan, gradients from and to its states", with_states),
        ("selective_scan", lambda: ours("selective_scan", "auto")),
        ("selective_scan in torch alone", lambda: ours("selective_scan in torch alone", "torch", True)),
        ("loop over tokens", lambda: Case("loop over tokens", inputs, lambda: loop(*inputs), peer=True)),
        ("mambapy", mambapy),
        *gpu,
        only=only,
    )


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The selective scan as a loop in torch that does not cut its inputs one token at a time."""
    h, ys = torch.zeros((), device=x.device), []
    for x_t, Δ, b, c in zip(*(v.unbind(1) for v in (x, dt, B, C)), strict=True):
        h = (Δ[..., None] * A).exp() * h + (Δ * x_t)[..., None] * b[:, None]
        ys.append((h @ c[..., None])[..., 0])
    return torch.stack(ys, 1) + D * x


def invariant(size: Size, only: str | None = None) -> Iterator[Case]:
    x, D = size.x(), size.width
    whole = S5(D, d_state=D, blocks=1, conj_sym=False, clip_eigs=False, activation=None).to(size.device)

    def s4d(mode: str) -> Case:
        label = f's4d, mode="{mode}"'
        return of_layer(label, layers.build("s4d", D, mode=mode).to(size.device), x)

    def s5_pytorch() -> Case:
        from s5 import S5 as Peer

        module = Peer(D, D).to(size.device)
        with torch.no_grad():
            module.seq.Lambda.copy_(torch.complex(whole.Lambda_re, whole.Lambda_im))
            module.seq.B.copy_(whole.B.mT)
            module.seq.C.copy_(torch.complex(whole.C[..., 0], -whole.C[..., 1]))
            module.seq.D.copy_(whole.D)
            module.seq.log_step.copy_(whole.log_dt)
        x_t, state = x.detach()[0, 0], torch.zeros_like(module.seq.Lambda)
        return Case(
            "s5-pytorch",
            (x, *module.parameters()),
            lambda: module(x),
            lambda: module.seq.forward_rnn(x_t, state),
            peer=True,
        )

    bare = "s5, without its gate"
    every = "s5, without its gate and conjugate symmetry"
    return collect(
        *((f's4d, mode="{mode}"', lambda mode=mode: s4d(mode)) for mode in ("auto", "chunk", "conv", "scan")),
        ("s5", lambda: of_layer("s5", layers.build("s5", D).to(size.device), x)),
        (bare, lambda: of_layer(bare, layers.build("s5", D, activation=None).to(size.device), x)),
        (every, lambda: of_layer(every, whole, x)),
        ("s5-pytorch", s5_pytorch),
        only=only,
    )


def gated(size: Size, only: str | None = None) -> Iterator[Case]:
    x, D, B, T = size.x(), size.width, size.batch, size.time
    rglru = RGLRU(D, n_heads=4).to(size.device)
    griffin = Griffin(D, lru_width=D, n_heads=4).to(size.device)
    position = torch.arange(T, device=size.device).expand(B, T)
    x_t, later = x.detach()[:1, :1], position[:1, 1:2]

    def config() -> object:
        from transformers import RecurrentGemmaConfig

        return RecurrentGemmaConfig(hidden_size=D, num_attention_heads=4)

    def transformers_rglru() -> Case:
        from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

        module = RecurrentGemmaRglru(config()).to(size.device)
        module.load_state_dict(rglru.state_dict())

        def run() -> Tensor:
            module.recurrent_states = None
            return module(x, position)

        def step() -> Tensor:
            module.recurrent_states = x.new_zeros(1, D)
            return module(x_t, later)

        return Case("transformers RecurrentGemmaRglru", (x, *module.parameters()), run, step, True, quadratic=True)

    def accelerated_scan() -> Case:
        from accelerated_scan.ref import scan

        def run() -> Tensor:  # everything but the scan in the fewest operations of torch
            r, i = (
                rglru.gate(x, getattr(rglru, f"{gate}_gate_weight"), getattr(rglru, f"{gate}_gate_bias"))
                for gate in ("recurrent", "input")
            )
            a = torch.exp(-8 * r * F.softplus(rglru.recurrent_param))
            u = torch.where(position[..., None] == 0, 1, torch.sqrt(1 - a * a)) * (i * x)
            return scan(a.mT.contiguous(), u.mT.contiguous()).mT

        return Case("accelerated-scan's ref in torch", (x, *rglru.parameters()), run, peer=True)

    def transformers_griffin() -> Case:
        from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

        module = RecurrentGemmaRecurrentBlock(config(), layer_idx=0).to(size.device)
        module.load_state_dict(conv1d_names(griffin, "conv_1d"))

        def run() -> Tensor:
            module.rg_lru.recurrent_states = None
            return module(x, position, None, use_cache=False)[0]

        def step() -> Tensor:
            return module(x_t, later, None, use_cache=True)[0]

        name = "transformers RecurrentGemmaRecurrentBlock"
        return Case(name, (x, *module.parameters()), run, step, True, quadratic=True)

    return collect(
        ("rglru", lambda: of_layer("rglru", rglru, x)),
        ("transformers RecurrentGemmaRglru", transformers_rglru),
        ("accelerated-scan's ref in torch", accelerated_scan),
        ("griffin", lambda: of_layer("griffin", griffin, x)),
        ("transformers RecurrentGemmaRecurrentBlock", transformers_griffin),
        ("hgrn", lambda: of_layer("hgrn", layers.build("hgrn", D).to(size.device), x)),
        ("mega", lambda: of_layer("mega", layers.build("mega", D, chunk_size=CHUNK).to(size.device), x)),
        only=only,
    )


GROUPS: dict[str, tuple[str, Callable[..., Iterator[Case]]]] = {
    "mamba": (f"Mamba, N = {N}", mamba),
    "scan": (f"ops.selective_scan alone, 2 D channels, N = {N}", scan),
    "invariant": ("S4D and S5, N = min(64, D) and N = D", invariant),
    "gated": (f"RG-LRU and Griffin with 4 heads, HGRN, MEGA with chunks of {CHUNK}", gated),
}
