"""What attention knows of positions, as values: `Attention(d_model, positions=RoPE(base=500000.0))`.

    RoPE     q_t · k_j of queries and keys turned by R_t and R_j (arXiv:2104.09864); its scalings let a trained model
             read longer texts: Interpolation (PI, arXiv:2306.15595), NTK (kexue.fm 9675, 9706) and YaRN
    ReRoPE   distances above a window w count as w, or (leaky) as w + (distance - w) / leak (kexue.fm 9708, 9728)
    ALiBi    q_t · k_j - slope_h |t - j|, without turning (arXiv:2108.12409)
    NoPE     nothing but causality

Configurations may write a string or a mapping: "alibi", or {"kind": "rope", "scaling": {"kind": "pi", "factor": 4}}.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from linrnn.layers.base import positive_int
from linrnn.layers.rotary import rotary_frequencies, rotate
from linrnn.layers.softmax_attention import products


def check_number(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> None:
    """Raises ValueError unless `value` is a finite number, at least `least` or above `above`."""
    allowed = f">= {least:g}" if above is None else f"> {above:g}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (value < least if above is None else value <= above):
        raise ValueError(f"{name}: expected a number {allowed}, got {value!r}")


@dataclass(frozen=True)
class Interpolation:
    """Position interpolation (Chen et al. 2023, arXiv:2306.15595): every θ is divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check_number("factor", self.factor, least=1)

    def scaled(self, θ: Tensor, base: float) -> Tensor:
        """Maps the angles θ (n / 2) of n turned channels to those of the longer context."""
        return θ / self.factor


@dataclass(frozen=True)
class NTK:
    """NTK-aware scaling: high frequencies stay, low ones are interpolated. With n turned channels and k = `factor`:

    "old"    θ_i k^(-2i/n)                  the base is k times as large (kexue.fm 9675)
    "aware"  θ_i k^(-2i/(n - 2))            so much larger that the lowest frequency is divided by k
    "fixed"  θ_i k^(-2m/n), m = i + 1                every digit of the β-ary position has its share (kexue.fm 9706)
    "mixed"  θ_i exp(-a m^b), a = ln k / (n/2)^b, b = `exponent`; b = 1 is "fixed", b = 0 interpolation
    """

    factor: float
    form: str = "mixed"
    exponent: float = 0.625

    def __post_init__(self) -> None:
        check_number("factor", self.factor, least=1)
        check_number("exponent", self.exponent, least=0)
        if self.form not in ("old", "aware", "fixed", "mixed"):
            raise ValueError(f"form: expected one of 'old', 'aware', 'fixed', 'mixed', got {self.form!r}")

    def scaled(self, θ: Tensor, base: float) -> Tensor:
        """Maps the angles θ (n / 2) of n turned channels to those of the longer context."""
        half = len(θ)
        i = torch.arange(half, dtype=θ.dtype, device=θ.device)
        if self.form == "old":
            share = i / half
        elif self.form == "aware":
            share = i / max(half - 1, 1)
        else:
            share = ((i + 1) / half) ** (1.0 if self.form == "fixed" else self.exponent)
        return θ * self.factor**-share


@dataclass(frozen=True)
class YaRN:
    """YaRN (Peng et al. 2023, arXiv:2309.00071, 3.2, 3.4): channels that turn often stay, slow ones are interpolated.

    Args:
        factor: s, how many times longer the context gets.
        original_length: tokens of the context in training, of which r_i = θ_i original_length / 2π turns fit.
        fast, slow: channels with r_i > fast stay, those with r_i < slow are divided by s.
        ramp: what grows linearly between them: "rotations" r_i, as the paper has it, or the index i between whole
            "dimensions", as its code and the checkpoints made with it.
        temperature: factor of the logits; if None, (1 + 0.1 ln s)².
    """

    factor: float
    original_length: int
    fast: float = 32.0
    slow: float = 1.0
    ramp: str = "rotations"
    temperature: float | None = None

    def __post_init__(self) -> None:
        check_number("factor", self.factor, least=1)
        positive_int("original_length", self.original_length)
        check_number("slow", self.slow, above=0)
        check_number("fast", self.fast, above=self.slow)
        if self.ramp not in ("rotations", "dimensions"):
            raise ValueError(f"ramp: expected 'rotations' or 'dimensions', got {self.ramp!r}")
        if self.temperature is not None:
            check_number("temperature", self.temperature, above=0)

    @property
    def logit_factor(self) -> float:
        return (1 + 0.1 * math.log(self.factor)) ** 2 if self.temperature is None else self.temperature

    def scaled(self, θ: Tensor, base: float) -> Tensor:
        """Maps the angles θ (n / 2) of n turned channels to those of the longer context."""
        if self.ramp == "rotations":
            kept = (θ * (self.original_length / (2 * math.pi)) - self.slow) / (self.fast - self.slow)
        else:
            half = len(θ)

            def index(turns: float) -> float:  # the channel that turns so often
                return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

            low, high = max(math.floor(index(self.fast)), 0), min(math.ceil(index(self.slow)), 2 * half - 1)
            i = torch.arange(half, dtype=θ.dtype, device=θ.device)
            kept = 1 - (i - low) / max(high - low, 1e-3)
        kept = kept.clamp(0, 1)
        return θ * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True)
class RoPE:
    """Rotary positions with θ_i = base^(-2i/n) on the first n = `fraction` of a head's channels.

    Args:
        base: of the angles; it has to grow with the length (kexue.fm 10122). Above 1 with YaRN's "dimensions".
        fraction: of the channels that turn; the others see no positions.
        scaling: None, Interpolation, NTK or YaRN.
    """

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Interpolation | NTK | YaRN | None = None

    def __post_init__(self) -> None:
        check_number("base", self.base, above=0)
        check_number("fraction", self.fraction, above=0)
        if self.fraction > 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {self.fraction}")
        scaling = self.scaling
        if isinstance(scaling, (str, Mapping)):
            scaling = from_config("scaling", scaling, SCALINGS)
            object.__setattr__(self, "scaling", scaling)
        if scaling is not None and not isinstance(scaling, (Interpolation, NTK, YaRN)):
            raise ValueError(f"scaling: expected Interpolation, NTK, YaRN or None, got {scaling!r}")
        if isinstance(scaling, YaRN) and scaling.ramp == "dimensions" and self.base <= 1:
            raise ValueError(f'base: expected a number > 1 for YaRN with ramp="dimensions", got {self.base!r}')

    @property
    def logit_factor(self) -> float:
        """What the logits are multiplied with beside their scale."""
        return self.scaling.logit_factor if isinstance(self.scaling, YaRN) else 1.0

    def turned(self, d_head: int) -> int:
        """Returns how many channels of a head turn, or raises ValueError where that is no even number."""
        n = round(self.fraction * d_head)
        if not math.isclose(n, self.fraction * d_head) or n % 2:  # 0.28 of 50 is 14.000000000000002
            part = "" if self.fraction == 1 else f"fraction = {self.fraction} of "
            raise ValueError(f"n_heads: rotary positions turn an even number of channels, got {part}{d_head} of a head")
        return n

    def frequencies(self, n: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Returns the angles θ (n / 2) of n turned channels."""
        θ = rotary_frequencies(self.base, n // 2, dtype, device)
        return θ if self.scaling is None else self.scaling.scaled(θ, self.base)

    def turn(self, x: Tensor, position: Tensor) -> Tensor:
        """Turns x (B, T, H, K) by positions (1 or B, T)."""
        n = self.turned(x.shape[-1])
        exact = torch.float32 if x.device.type == "mps" else torch.float64
        turned = rotate(x[..., :n], position, self.frequencies(n, exact, x.device))
        return turned if n == x.shape[-1] else torch.cat((turned, x[..., n:]), -1)


@dataclass(frozen=True)
class ReRoPE:
    """Rectified rotary positions: the distance d counts as min(d, window), or leaky as window + (d - window) / leak.

    For models trained with RoPE of the same base, at a quarter to a half of their training length. Keys are cached
    unturned, and every query turns them: two products instead of one.
    """

    window: int
    base: float = 10000.0
    leak: float | None = None

    def __post_init__(self) -> None:
        positive_int("window", self.window)
        check_number("base", self.base, above=0)
        if self.leak is not None:
            check_number("leak", self.leak, above=0)

    def products(self, q: Tensor, k: Tensor, query: Tensor, key: Tensor, far: int, near: int) -> Tensor:
        """Returns q · k (B, H, C, W), at least float32, of q (B, C, H, K) and k (B, W, H_kv, K), not yet turned.

        Args:
            q, k: queries and keys.
            query, key: their positions, (1 or B, C) and (1 or B, W).
            far: the first so many keys are beyond the window of all queries.
            near: those from here on are within it.
        """
        close = products(rotate(q, query, self.base), rotate(k[:, far:], key[:, far:], self.base))
        if near == 0:
            return close
        # the difference of these places is the distance that counts
        place, turned = torch.full_like(query, self.window), k[:, :near]
        if self.leak is not None:
            place = self.window * (1 - 1 / self.leak) + query.double() / self.leak
            turned = rotate(turned, key[:, :near].double() / self.leak, self.base)
        beyond = products(rotate(q, place, self.base), turned)
        within = key[:, None, None, far:near] > query[:, None, :, None] - self.window
        either = torch.where(within, close[..., : near - far], beyond[..., far:])
        return torch.cat((beyond[..., :far], either, close[..., near - far :]), -1)


@dataclass(frozen=True)
class ALiBi:
    """Linear biases: head h sees a token at distance d with its logit less slope_h d, slopes 2^(-8h/H), h = 1 ... H."""

    def slopes(self, n_heads: int) -> list[float]:
        """Returns the slopes of H heads; where H is no power of two, the next power's odd ones follow the last's."""
        whole = 2 ** int(math.log2(n_heads))
        first = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
        return first + [2 ** (-4 * h / whole) for h in range(1, 2 * whole, 2)][: n_heads - whole]


@dataclass(frozen=True)
class NoPE:
    """No positions: a causal layer may still count what it sees, a bidirectional one takes its tokens as a set."""


Positions = RoPE | ReRoPE | ALiBi | NoPE
KINDS: dict[str, Any] = {"rope": RoPE, "rerope": ReRoPE, "alibi": ALiBi, "nope": NoPE}
SCALINGS: dict[str, Any] = {"pi": Interpolation, "ntk": NTK, "yarn": YaRN}


def as_positions(value: Positions | str | Mapping[str, Any] | None) -> Positions:
    """Returns a value of this module from itself, its name, a mapping with the name as "kind", or None for NoPE().

    Raises:
        ValueError: nothing of these, or an unknown name or field.
    """
    if value is None:
        return NoPE()
    if isinstance(value, (str, Mapping)):
        return from_config("positions", value, KINDS)
    if not isinstance(value, (RoPE, ReRoPE, ALiBi, NoPE)):
        raise ValueError(
            f"positions: expected RoPE, ReRoPE, ALiBi, NoPE, a name of {list(KINDS)} or None, got {value!r}"
        )
    return value


def from_config(argument: str, value: str | Mapping[str, Any], kinds: Mapping[str, Any]) -> Any:
    """Builds a value from its name, or from {"kind": name, field: ...}."""
    given: dict[str, Any] = {"kind": value} if isinstance(value, str) else dict(value)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{argument}: expected a kind of {', '.join(kinds)}, got {kind!r}")
    cls = kinds[kind]
    names = [f.name for f in fields(cls)]
    needed = [f.name for f in fields(cls) if f.default is f.default_factory]  # both MISSING
    unknown, missing = sorted(set(given) - set(names)), [name for name in needed if name not in given]
    if unknown or missing:
        wrong = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise ValueError(f"{argument}: {wrong} for {kind!r}, which has {', '.join(names) or 'no fields'}")
    return cls(**given)
