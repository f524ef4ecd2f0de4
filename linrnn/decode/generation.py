"""Generating text: prompts read in parallel, then token by token with a state that does not grow."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode._rows import as_eos, as_prompt, as_stop
from linrnn.decode.decoder import Decoder
from linrnn.decode.sampling import Sampling, check_seed, global_seed, row_seed
from linrnn.layers.base import State, describe
from linrnn.models.language import LanguageModel
from linrnn.models.tokens import check_ids

PATIENCE, EVERY = 3.0, 0.2  # seconds before a line of progress appears by itself, and between two of them


def generate(
    model: LanguageModel,
    ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | Iterable[int] | None = None,
    pad_id: int | None = None,
    stop: Iterable[Sequence[int]] | None = None,
    seed: int | Sequence[int] | None = None,
    mask: Tensor | None = None,
    state: State = None,
    stream: bool = False,
    progress: bool | None = None,
) -> Tensor | Iterator[Tensor]:
    """Continues prompts ids (B, T) by up to max_new_tokens tokens: (B, T + n) int64, the prompts as given and n new.

    n is smaller than max_new_tokens where every row has ended before. Memory: the result and the state, which stays as
    it is for a model whose `state_size` is a number. The rows are a batch of a `Decoder`, which says how they are read
    and what a row owes to its neighbours: the rounding of its logits at most.

    Args:
        model: a LanguageModel. It runs in evaluation mode and is left in the mode it was in.
        ids: (B, T) int64, or a list of prompts of any lengths, which the result has with padding on the left.
        max_new_tokens: an integer >= 0.
        temperature, top_k, top_p, min_p, repetition_penalty: as for `Sampling`; greedy by default.
        eos_id: a token or several that end a row, and are its last.
        pad_id: what follows the end of a row, any integer; if None, the (first) eos_id.
        stop: sequences of tokens; a row ends where its new tokens end with one of them.
        seed: row i draws from a generator of its own, with `row_seed(seed, i)`; a sequence: one seed for each row, as
            it stands, so that a row alone with [row_seed(seed, i)] draws what it drew in the batch. None: a seed from
            torch's global generator.
        mask: (B, T) bool, False for padding, left or right; with ids as a tensor.
        state: of B rows, behind what came before the prompts.
        stream: return an iterator over the n columns (B,) instead. Nothing is read before the first is asked for, and
            closing it, or letting go of it, frees everything.
        progress: write a line of progress to stderr; None: on a terminal, when it takes longer than three seconds and
            is no stream.

    Raises:
        TypeError: an argument of another kind, such as a model that is no LanguageModel.
        ValueError: no token in a row, an id outside the vocabulary, a number outside its range, a state of another
            batch size, or no pad_id where rows end apart; in a step, logits that are no numbers, with row and token.
    """
    if not isinstance(model, LanguageModel):
        raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if eos_id is not None and not isinstance(eos_id, int):
        eos_id = tuple(eos_id)
    eos, stops = as_eos(eos_id, model.vocab_size), as_stop(stop, model.vocab_size)
    pad = as_pad(pad_id, eos_id)
    prompts = as_prompts(ids, mask, model.vocab_size)
    given = ids if isinstance(ids, Tensor) else left_padded(prompts, pad, model.embed.weight.device)
    if pad is None and stops and len(prompts) > 1:
        raise ValueError("pad_id: expected an integer, since stop ends rows apart and there is no eos_id, got None")
    if state is not None and states.batch_size(state) != len(prompts):
        raise ValueError(f"state: expected {len(prompts)} sequences like ids, got {states.batch_size(state)}")
    decoder = Decoder(model)
    for i, (prompt, own) in enumerate(zip(prompts, as_seeds(seed, len(prompts), sampling), strict=True)):
        decoder.admit(
            prompt,
            max_new_tokens=max(1, max_new_tokens),
            sampling=sampling,
            seed=own,
            eos_id=eos,
            stop=stops,
            state=None if state is None else states.select(state, [i]),
            keep_state=False,
        )
    new = columns(decoder, len(prompts), max_new_tokens, pad, progress if progress is not None or not stream else False)
    if stream:
        return (torch.tensor(column, dtype=torch.int64, device=given.device) for column in new)
    T = given.shape[1]
    out = torch.empty(len(prompts), T + max_new_tokens, dtype=torch.int64)
    out[:, :T] = given
    for column in new:
        out[:, T] = torch.tensor(column, dtype=torch.int64)
        T += 1
    return (out if T == out.shape[1] else out[:, :T].clone()).to(given.device)


def columns(
    decoder: Decoder, n_rows: int, max_new_tokens: int, pad: int | None, progress: bool | None
) -> Iterator[list[int]]:
    """Yields the new tokens of all rows, one step after the other; `pad` for a row that has ended."""
    bar = Progress(max_new_tokens, progress)
    try:
        while max_new_tokens and (decoder.active or decoder.waiting):
            column = [0 if pad is None else pad] * n_rows
            for event in decoder.step():
                column[event.sequence] = event.token
                if event.finished:
                    decoder.retire(event.sequence)
            bar.step()
            yield column
    finally:
        bar.close()


class Progress:
    """One line on stderr that says how many tokens are there, and how fast they come."""

    def __init__(self, total: int, wanted: bool | None):
        self.total, self.done, self.shown = total, 0, False
        self.wanted = sys.stderr.isatty() if wanted is None else wanted
        self.begun = time.monotonic()
        self.next = self.begun + (PATIENCE if wanted is None else 0)

    def step(self) -> None:
        """Counts a token, and writes the line if it is time."""
        self.done += 1
        now = time.monotonic()
        if self.wanted and (now >= self.next or (self.shown and self.done == self.total)):
            self.next, self.shown = now + EVERY, True
            speed = self.done / max(now - self.begun, 1e-9)
            left = (self.total - self.done) / speed
            line = f"generate: {self.done} of {self.total} tokens, {speed:.1f} a second, {left:.0f} s left"
            print(f"\r{line:<72}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the line."""
        if self.shown:
            print(file=sys.stderr, flush=True)


def as_prompts(ids: Tensor | Sequence[Tensor | Sequence[int]], mask: Tensor | None, vocab_size: int) -> list[Tensor]:
    """Returns the real tokens of each row, on the CPU."""
    if not isinstance(ids, Tensor):
        if not isinstance(ids, (list, tuple)) or not all(isinstance(row, (list, tuple, Tensor)) for row in ids):
            raise TypeError(f"ids: expected a tensor (batch, time) or a list of prompts, got {describe(ids)}")
        if mask is not None:
            raise ValueError("mask: expected None with a list of prompts, which has no padding")
        if not ids:
            raise ValueError("ids: expected at least one prompt, got an empty list")
        return [as_prompt(f"ids, row {i}", row, vocab_size) for i, row in enumerate(ids)]
    check_ids("ids", ids)
    rows = list(ids.detach().cpu())
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(f"mask: expected a bool tensor of shape {tuple(ids.shape)}, got {describe(mask)}")
        rows = [row[real] for row, real in zip(rows, mask.cpu(), strict=True)]
    return [as_prompt(f"ids, row {i}", row, vocab_size) for i, row in enumerate(rows)]


def left_padded(prompts: Sequence[Tensor], pad: int | None, device: torch.device) -> Tensor:
    """Returns prompts as (B, T), so that new tokens come right behind each."""
    T = max(len(prompt) for prompt in prompts)
    if pad is None and any(len(prompt) < T for prompt in prompts):
        raise ValueError("pad_id: expected an integer, since the prompts differ in length, got None")
    out = torch.full((len(prompts), T), 0 if pad is None else pad, dtype=torch.int64, device=device)
    for row, prompt in zip(out, prompts, strict=True):
        row[T - len(prompt) :] = prompt.to(device)
    return out


def as_pad(pad_id: int | None, eos_id: int | tuple[int, ...] | None) -> int | None:
    """Returns what follows the end of a row, if there is anything."""
    if pad_id is None:
        return eos_id[0] if isinstance(eos_id, tuple) and eos_id else eos_id if isinstance(eos_id, int) else None
    if not isinstance(pad_id, int) or isinstance(pad_id, bool) or not -(2**63) <= pad_id < 2**63:
        raise ValueError(f"pad_id: expected an integer or None, got {pad_id!r}")
    return pad_id


def as_seeds(seed: int | Sequence[int] | None, n_rows: int, sampling: Sampling) -> list[int] | list[None]:
    """Returns the seed of each row's generator; None where nothing is drawn."""
    if seed is None:
        if sampling.greedy:
            return [None] * n_rows
        seed = global_seed()
    if isinstance(seed, (list, tuple)):
        if len(seed) != n_rows:
            raise ValueError(f"seed: expected one for each of {n_rows} rows, got {len(seed)}")
        return [check_seed("seed", own) for own in seed]
    return [row_seed(seed, i) for i in range(n_rows)]  # type: ignore[arg-type]
