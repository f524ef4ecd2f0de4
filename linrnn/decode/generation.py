"""Generating text: prompts read in parallel, then token by token with a state that does not grow."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode._requests import as_model, as_request
from linrnn.decode.decoder import Decoder
from linrnn.decode.sampling import Sampling
from linrnn.layers.base import State
from linrnn.models.language import LanguageModel

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
    graphs: bool = True,
) -> Tensor | Iterator[Tensor]:
    """Continues prompts ids (B, T) by up to max_new_tokens tokens: (B, T + n) int64, the prompts as given and n new.

    n is smaller than max_new_tokens where every row has ended before. Memory: the result and the state, which stays as
    it is for a model whose `state_size` is a number. The rows are a batch of a `Decoder`, which says how they are read
    and what a row owes to its neighbours: the rounding of its logits at most.

    Args:
        model: a LanguageModel, compiled or not. It runs in evaluation mode and is left in the mode it was in.
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
        graphs: as for `Decoder`.

    Raises:
        TypeError: an argument of another kind, such as a model that is no LanguageModel.
        ValueError: no token in a row, an id outside the vocabulary, a number outside its range, a state of another
            batch size, or no pad_id where rows end apart; in a step, logits that are no numbers, with row and token.
    """
    model = as_model("model", model)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = as_request(model, ids, max_new_tokens, sampling, eos_id, pad_id, stop, seed, mask)
    B = len(request.prompts)
    if state is not None and states.batch_size(state) != B:
        raise ValueError(f"state: expected {B} sequences like ids, got {states.batch_size(state)}")
    decoder = Decoder(model, graphs=graphs)
    for i, (prompt, own) in enumerate(zip(request.prompts, request.seeds, strict=True)):
        decoder.admit(
            prompt,
            max_new_tokens=max(1, request.n),
            sampling=sampling,
            seed=own,
            eos_id=request.eos,
            stop=request.stop,
            state=None if state is None else states.select(state, [i]),
            keep_state=False,
        )
    new = columns(decoder, B, request.n, request.pad, progress if progress is not None or not stream else False)
    if stream:
        device = request.given.device
        return (torch.tensor(column, dtype=torch.int64, device=device) for column in new)
    return request.with_columns(new)


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
