"""From logits to a token: penalty, temperature, filters, and a draw that depends on the row's own seed alone."""

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linrnn.layers.base import describe, finite


class BadLogits(ValueError):
    """Logits that are no distribution; `rows` has the rows."""

    def __init__(self, rows: list[int]):
        self.rows = rows
        super().__init__(f"logits: expected finite numbers (or -inf for some), row {rows[0]} has NaN, inf or only -inf")


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits of the next one. In this order, as is usual:

    repetition_penalty: logits of tokens seen before are divided by it where positive, multiplied where negative
        (Keskar et al. 2019, arXiv:1909.05858); 1: none.
    temperature: logits are divided by it; 0: the largest logit wins (greedy), and the filters below change nothing.
    top_k: the k largest stay, and those equal to the last of them (Fan et al. 2018, arXiv:1805.04833).
    top_p: the fewest that have this probability together stay (Holtzman et al. 2020, arXiv:1904.09751).
    min_p: those stay that have at least this share of the largest probability (Nguyen et al. 2024, arXiv:2407.01082).

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        k = as_integer(self.top_k)
        if not finite(self.temperature) or self.temperature < 0:
            raise ValueError(f"temperature: expected a finite number >= 0 (0 is greedy), got {self.temperature!r}")
        if self.top_k is not None and (k is None or k < 1):
            raise ValueError(f"top_k: expected an integer >= 1 or None, got {self.top_k!r}")
        object.__setattr__(self, "top_k", k)
        if self.top_p is not None and not (finite(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p: expected a number in (0, 1] or None, got {self.top_p!r}")
        if self.min_p is not None and not (finite(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p: expected a number in [0, 1] or None, got {self.min_p!r}")
        if not finite(self.repetition_penalty) or self.repetition_penalty <= 0:
            raise ValueError(
                f"repetition_penalty: expected a finite number > 0 (1 is none), got {self.repetition_penalty!r}"
            )

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether the tokens seen before matter."""
        return self.repetition_penalty != 1

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Maps logits (B, V) to the probabilities (B, V), float32, that a token is drawn from; greedy: a one.

        Args:
            logits: (B, V) floating point.
            seen: (B, V) bool, True for tokens that came before; needed with a repetition penalty.

        Raises:
            ValueError: logits of a row that are NaN, inf or all -inf (`BadLogits`), or a wrong shape or dtype.
        """
        scores, top = self.scores(logits, seen)
        if self.greedy:
            return torch.zeros_like(scores, dtype=torch.float32).scatter_(1, scores.argmax(1, keepdim=True), 1)
        # the largest becomes 0 first, so that no temperature overflows; in float32 the smallest would be 0
        return self.filtered(((scores - top).double() / self.temperature).float())

    def filtered(self, scores: Tensor) -> Tensor:
        """Maps logits (B, V) behind penalty and temperature to probabilities."""
        k, V, ids = self.top_k, scores.shape[1], None
        if k is not None and k < V:
            last = scores.topk(k)[0][:, -1:]
            n = int((scores >= last).sum(1).max())
            if (
                n > k and len(scores) > 1
            ):  # row by row: how many are equal to the last in one row moves no bit in others
                return torch.cat([self.filtered(row) for row in scores.split(1)])
            ids = scores.topk(n)[1].sort(1)[0]  # from here on, time goes by n and not by V
            scores = scores.gather(1, ids)
        if self.top_p is not None and self.top_p < 1:
            # what lies below comes to too little; of equal logits the lowest ids stay, as argmax has it
            descending, order = scores.sort(stable=True, dim=1, descending=True)
            drop = descending.softmax(1).flip(1).cumsum(1).flip(1) <= 1 - self.top_p
            drop[:, 0] = False
            scores = scores.masked_fill(drop.scatter(1, order, drop), -torch.inf)
        if self.min_p is not None:
            p = scores.softmax(1)
            scores = scores.masked_fill(p < self.min_p * p.amax(1, keepdim=True), -torch.inf)
        p = scores.softmax(1)
        return p if ids is None else p.new_zeros(len(p), V).scatter_(1, ids, p)

    def scores(self, logits: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the logits behind the penalty (B, V), float32 at least, and the largest of each row (B, 1)."""
        if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.is_floating_point() or not logits.shape[1]:
            raise ValueError(f"logits: expected a floating point tensor (batch, vocabulary), got {describe(logits)}")
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.penalises:
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.shape != logits.shape:
                raise ValueError(f"seen: expected a bool tensor of shape {tuple(logits.shape)}, got {describe(seen)}")
            r = self.repetition_penalty
            scores = torch.where(seen, torch.where(scores < 0, scores * r, scores / r), scores)
        top = scores.amax(1, keepdim=True)  # NaN if one of them is
        bad = ~top[:, 0].isfinite()
        if bad.any():
            raise BadLogits(bad.nonzero()[:, 0].tolist())
        return scores, top


def draw(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws a token of each row of probabilities (B, V): (B,) int64, on their device.

    The smallest token whose cumulated probability exceeds one uniform number, which comes from the generator of the
    row (on the CPU): a row's tokens depend on its probabilities and its generator, and not on the other rows. Rows
    need not add up to one exactly.

    Raises:
        ValueError: not one generator for each row.
    """
    if len(generators) != len(probabilities):
        raise ValueError(f"generators: expected one for each of {len(probabilities)} rows, got {len(generators)}")
    # torch's default device may be another one
    uniform: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    u = torch.tensor([torch.rand((), generator=g, **uniform).item() for g in generators], **uniform)
    cumulated = probabilities.double().cumsum(1)
    total = cumulated[:, -1:].contiguous()
    token = torch.searchsorted(cumulated, u.to(total.device)[:, None] * total, right=True)
    # u times the total may round up to the total: no token without probability, and none behind the last
    return token.minimum(torch.searchsorted(cumulated, total))[:, 0]


def row_seed(seed: int, row: int) -> int:
    """Returns the seed of a row's generator: `generate` with this seed alone draws what that row draws among others.

    Rows of one seed never share a generator: seeds of torch's CPU generator are numbers of 32 bits, and the map is a
    permutation of those (the finaliser of MurmurHash3) of a digest of `seed`, plus the row.
    """
    digest = hashlib.sha256(str(check_seed("seed", seed)).encode()).digest()
    h = (int.from_bytes(digest[:4], "little") + row) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def generator(seed: int) -> torch.Generator:
    """Returns a row's generator, on the CPU."""
    return torch.Generator("cpu").manual_seed(check_seed("seed", seed))


def check_seed(name: str, seed: int) -> int:
    """Returns an integer that torch takes as a seed, or raises ValueError."""
    number = as_integer(seed)
    if number is None or not -(2**63) <= number < 2**64:
        raise ValueError(f"{name}: expected an integer from -2^63 to 2^64 - 1, got {seed!r}")
    return number


def global_seed() -> int:
    """Returns a seed from torch's own generator: `torch.manual_seed` fixes what is drawn without a seed."""
    return int(torch.randint(2**62, (), device="cpu"))


def as_integer(value: Any) -> int | None:
    """Returns an integer of any library as an int, and None for what is none, such as a bool."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and (value.ndim or value.dtype == torch.bool)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def at_least(low: int, name: str, value: int) -> int:
    """Returns an integer that is no smaller than `low`, or raises ValueError naming the argument."""
    number = as_integer(value)
    if number is None or number < low:
        raise ValueError(f"{name}: expected an integer >= {low}, got {value!r}")
    return number
