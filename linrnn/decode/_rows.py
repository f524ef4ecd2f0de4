"""Sequences that are decoded: what they are, when they end, and which token comes next."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.decode.sampling import BadLogits, Sampling, draw
from linrnn.layers.base import State


class Event(NamedTuple):
    """A new token of a sequence. If it is the last, `reason` says why: "eos", "stop" or "length"; None otherwise."""

    sequence: int
    token: int
    finished: bool
    reason: str | None


class Decoded(NamedTuple):
    """What `Decoder.retire` returns: a sequence that has left.

    tokens (T + n,) int64: the prompt and the n new ones, an end-of-sequence token among them. n_new: that n.
    state: of one row, behind all tokens but the last: `admit(tokens[-1:], state=state)` goes on from here. None if it
    was not kept, or where n_new is 0: a sequence that was still waiting, whose prompt has not been read. reason: "eos",
    "stop", "length", or "retired" before its end.
    """

    tokens: Tensor
    n_new: int
    state: State
    reason: str


@dataclass(eq=False)
class Row:
    """A sequence that decodes or waits."""

    sequence: int
    prompt: Tensor
    limit: int | None
    sampling: Sampling
    generator: torch.Generator | None
    eos: frozenset[int]
    stop: tuple[tuple[int, ...], ...]
    state: State  # to begin with
    from_start: bool  # the prompt is all there is before the new tokens
    keep_state: bool
    seen: Tensor | None
    new: list[int] = field(default_factory=list)

    def tokens(self) -> Tensor:
        return torch.cat((self.prompt, torch.tensor(self.new, dtype=torch.int64, device="cpu")))

    def ended(self) -> str | None:
        """Says why the newest token is the last one."""
        if self.new[-1] in self.eos:
            return "eos"
        if any(tuple(self.new[-len(stop) :]) == stop for stop in self.stop):
            return "stop"
        return "length" if len(self.new) == self.limit else None


def choose(logits: Tensor, rows: Sequence[Row]) -> list[int]:
    """Returns the next token of each row from logits (B, V)."""
    groups: dict[Sampling, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.sampling, []).append(i)
    tables = []
    for sampling, group in groups.items():
        own = logits if len(group) == len(rows) else logits[group]
        seen = torch.stack([_seen(rows[i]) for i in group]) if sampling.penalises else None
        try:
            tables.append(sampling.scores(own, seen)[0] if sampling.greedy else sampling.probabilities(own, seen))
        except BadLogits as bad:
            row = rows[group[bad.rows[0]]]
            raise ValueError(
                "logits: expected finite numbers (or -inf for some), got NaN, inf or only -inf for sequence "
                f"{row.sequence} (in generate: row {row.sequence}) at its new token {len(row.new)}"
            ) from bad
    tokens = [0] * len(rows)
    # only now, when nothing can fail, generators move on
    for (sampling, group), table in zip(groups.items(), tables, strict=True):
        drawn = table.argmax(1) if sampling.greedy else draw(table, [_generator(rows[i]) for i in group])
        for i, token in zip(group, drawn.tolist(), strict=True):
            tokens[i] = token
    return tokens


def _seen(row: Row) -> Tensor:
    assert row.seen is not None
    return row.seen


def _generator(row: Row) -> torch.Generator:
    assert row.generator is not None
    return row.generator
