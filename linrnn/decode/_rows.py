"""Sequences that are decoded: what they are, when they end, and which token comes next."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from linrnn.decode.sampling import BadLogits, Sampling, draw
from linrnn.layers.base import State, describe
from linrnn.models.tokens import check_vocabulary


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
    was not kept, or no token but the last has been read. reason: "eos", "stop", "length", or "retired" before its end.
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
        return torch.cat((self.prompt, torch.tensor(self.new, dtype=torch.int64)))

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


def as_prompt(name: str, ids: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    """Returns a prompt as (T,) int64 on the CPU, T >= 1, all in the vocabulary."""
    if not isinstance(ids, Tensor):
        if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise TypeError(f"{name}: expected a tensor (time,) or a list of integers, got {describe(ids)}")
        ids = torch.tensor(ids, dtype=torch.int64)
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer token ids of shape (time,), got {describe(ids)}")
    if not len(ids):
        raise ValueError(f"{name}: expected at least one token, got none; begin with a BOS token")
    ids = ids.detach().to("cpu", torch.int64)
    check_vocabulary(name, ids, vocab_size)
    return ids


def as_eos(eos_id: int | Iterable[int] | None, vocab_size: int) -> frozenset[int]:
    """Returns the tokens that end a sequence."""
    given = () if eos_id is None else (eos_id,) if isinstance(eos_id, int) else tuple(eos_id)
    for token in given:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"eos_id: expected ids from 0 to {vocab_size - 1}, got {token!r}")
    return frozenset(given)


def as_stop(stop: Iterable[Sequence[int]] | None, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Returns the sequences of tokens that end a sequence."""
    given = () if stop is None else tuple(stop)
    for tokens in given:
        if not isinstance(tokens, (list, tuple, Tensor)):
            raise TypeError(f"stop: expected sequences of token ids, got {describe(tokens)} among them")
    return tuple(tuple(as_prompt("stop", tokens, vocab_size).tolist()) for tokens in given)
