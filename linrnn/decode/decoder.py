"""Continuous batching: sequences enter and leave a batch of states at any step (Yu et al. 2022, Orca, OSDI)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode._in_use import Watch, evaluating
from linrnn.decode._requests import as_eos, as_model, as_prompt, as_stop
from linrnn.decode._rows import Decoded, Event, Row, choose
from linrnn.decode.graph import GraphedSteps, fast_step
from linrnn.decode.prefill import CHUNK, prefill_alone, prefill_together
from linrnn.decode.prefix_cache import PrefixCache
from linrnn.decode.sampling import Sampling, at_least, generator, global_seed
from linrnn.layers.base import State, StepFn, describe
from linrnn.models.language import LanguageModel


class Decoder:
    """Decodes sequences that come and go, all in one batch.

    ```python
    decoder = Decoder(model)
    first = decoder.admit(prompt, max_new_tokens=100)
    for event in decoder.step():  # one token for each sequence
        ...
    tokens, n_new, state, reason = decoder.retire(first)
    ```

    A call of `step` reads the prompts of the sequences that enter, all but the last token, in parallel over time,
    joins their states to the batch, and runs one step for all. Whoever ends leaves the batch at once: no row of it is
    spent on what has ended. On a CPU, or with a prefix cache, each prompt is read alone, else those that enter
    together are one padded batch. What a sequence says depends on its prompt, options and seed; its neighbours can
    change the rounding of its logits only by how many they are (and, where caches grow with the text, by how long).

    The model runs in evaluation mode, without gradients, and is left in the mode it was in; several threads may have a
    decoder of it each. What its parameters alone decide is computed once, here: after a change of the parameters, or a
    move, `step` raises, and a new decoder has to be made.

    Args:
        model: a LanguageModel, compiled or not.
        capacity: the most sequences in the batch; further ones wait. None: any number.
        prefix_cache: of this model. Prompts go on from the longest prefix it knows, and it is given the states behind
            prompts (but their last tokens, and at its multiples of `every`) and behind texts that have ended.
        prefill_chunk: the most tokens of prompts read in one call, which bounds the memory that long ones take.
        graphs: on an NVIDIA GPU the step runs as a CUDA graph (`GraphedSteps`) once a batch size has lasted for some
            tokens, if the state has a fixed size.

    Raises:
        TypeError: model is no LanguageModel.
        ValueError: an argument outside its range, or a prefix cache of another model.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        capacity: int | None = None,
        prefix_cache: PrefixCache | None = None,
        prefill_chunk: int = CHUNK,
        graphs: bool = True,
    ):
        self.model = model = as_model("model", model)
        self.prefix_cache = prefix_cache
        self.capacity = None if capacity is None else at_least(1, "capacity", capacity)
        self.prefill_chunk = at_least(1, "prefill_chunk", prefill_chunk)
        if prefix_cache is not None:
            prefix_cache.bind(model)
        self._modules = tuple(model.modules())
        self._device = model.embed.weight.device
        # a cache wants states at tokens of its own; on a CPU, one prompt keeps it busy
        self._together = self._device.type != "cpu" and prefix_cache is None
        with torch.inference_mode(), evaluating(self._modules):
            self._step: StepFn = fast_step(model, graphs)
        self._watch = Watch(model)
        self._rows: list[Row] = []  # in the batch; row i of the state is that of _rows[i]
        self._state: State = None
        self._queue: list[Row] = []
        self._ended: dict[int, tuple[Row, State, str]] = {}
        self._admitted = 0

    @property
    def active(self) -> tuple[int, ...]:
        """The sequences in the batch."""
        return tuple(row.sequence for row in self._rows)

    @property
    def waiting(self) -> tuple[int, ...]:
        """The sequences that enter at the next step with room for them."""
        return tuple(row.sequence for row in self._queue)

    @property
    def state(self) -> State:
        """The state of the batch, a row for each of `active`, behind all their tokens but the last (for inference)."""
        # buffers of a graph are written to by the next step
        return states.clone(self._state) if isinstance(self._step, GraphedSteps) else self._state

    def admit(
        self,
        ids: Tensor | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        eos_id: int | Iterable[int] | None = None,
        stop: Iterable[Sequence[int]] | None = None,
        state: State = None,
        keep_state: bool = True,
    ) -> int:
        """Takes a sequence, which enters the batch at the next step; returns its number, 0, 1, 2, ...

        Args:
            ids: the prompt (T,), at least one token.
            max_new_tokens: ends it ("length"); None: it goes on until another end or `retire`.
            sampling: how tokens are chosen; greedily if None.
            seed: of its own generator; if None, from torch's global one.
            eos_id: a token or several that end it, and are its last ("eos").
            stop: sequences of tokens, each of which ends it where its new tokens end with it ("stop").
            state: of one row, behind what came before the prompt. A repetition penalty knows the prompt alone.
            keep_state: `retire` returns its state.

        Raises:
            TypeError: ids or stop of another kind, or a foreign state.
            ValueError: no token, an id outside the vocabulary, a number outside its range, a state of several rows.
        """
        vocab_size = self.model.vocab_size
        prompt = as_prompt("ids", ids, vocab_size)
        limit = None if max_new_tokens is None else at_least(1, "max_new_tokens", max_new_tokens)
        sampling = Sampling() if sampling is None else sampling
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling: expected a Sampling or None, got {describe(sampling)}")
        eos, sequences = frozenset(as_eos(eos_id, vocab_size)), as_stop(stop, vocab_size)
        if state is not None:
            if states.batch_size(state) != 1:
                raise ValueError(f"state: expected one sequence, got {states.batch_size(state)}")
            with torch.inference_mode(), evaluating(self._modules):
                self.model.features(prompt[None, :0].to(self._device), state)  # raises for a foreign one
        seen = None
        if sampling.penalises:
            seen = torch.zeros(vocab_size, dtype=torch.bool, device="cpu")
            seen[prompt] = True
            seen = seen.to(self._device)
        own = None
        if not sampling.greedy or seed is not None:
            own = generator(global_seed() if seed is None else seed)
        number, self._admitted = self._admitted, self._admitted + 1
        self._queue.append(
            Row(number, prompt, limit, sampling, own, eos, sequences, state, state is None, keep_state, seen)
        )
        return number

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Gives every sequence one more token, those that enter included; nothing if there is none.

        A call that fails leaves the sequences as they were; `retire` takes one out that cannot go on.

        Raises:
            ValueError: logits that are NaN, inf or all -inf; the message has the sequence and the token.
            RuntimeError: the model's parameters are not what they were when this decoder was made.
        """
        room = len(self._queue) if self.capacity is None else self.capacity - len(self._rows)
        entering = self._queue[:room]
        rows = self._rows + entering
        if not rows:
            return []
        if self._watch.changed():
            raise RuntimeError(
                "model: its parameters were written to or moved since this decoder was made, which computed once what "
                "depends on them; make a new one (`retire` gives what there is of each sequence)"
            )
        with evaluating(self._modules):
            state = self._state
            if entering:
                parts = [state] if self._rows else []
                parts += self._prefill(entering)
                state = parts[0] if len(parts) == 1 else states.concatenate(parts)
            last = torch.tensor([row.new[-1] if row.new else int(row.prompt[-1]) for row in rows], device=self._device)
            logits, state = self._step(last, state)
            try:
                tokens = choose(logits, rows)
            except BaseException:
                self._undo()
                raise
        return self._commit(rows, entering, tokens, state)

    def _prefill(self, entering: list[Row]) -> list[State]:
        """Reads the prompts of new rows but for their last tokens; returns states, of one row each or of all."""
        if self._together:
            prompts = [row.prompt[:-1].to(self._device) for row in entering]
            return [prefill_together(self.model, prompts, [row.state for row in entering], self.prefill_chunk)]
        return [
            prefill_alone(
                self.model,
                row.prompt[:-1],
                row.state,
                self.prefill_chunk,
                self.prefix_cache if row.from_start else None,
            )
            for row in entering
        ]

    def _commit(self, rows: list[Row], entering: list[Row], tokens: list[int], state: State) -> list[Event]:
        """Writes down the tokens and takes those out that have ended."""
        for row, token in zip(rows, tokens, strict=True):
            row.new.append(token)
        try:
            reasons = [row.ended() for row in rows]
            staying = [i for i, reason in enumerate(reasons) if reason is None]
            after = state if len(staying) == len(rows) else self._pick(state, staying)
            own = {i: self._kept(row, i, len(rows), state) for i, row in enumerate(rows) if reasons[i] is not None}
        except BaseException:  # out of memory
            for row in rows:
                row.new.pop()
            self._undo()
            raise
        self._queue, self._rows, self._state = self._queue[len(entering) :], [rows[i] for i in staying], after
        events = []
        for i, (row, token, reason) in enumerate(zip(rows, tokens, reasons, strict=True)):
            row.state = None  # it is in the batch now
            if row.seen is not None:
                row.seen[token] = True
            if reason is not None:
                self._end(row, own[i], reason)
            events.append(Event(row.sequence, token, reason is not None, reason))
        return events

    def _undo(self) -> None:
        """Gives the sequences the state back that they had before the step."""
        if isinstance(self._step, GraphedSteps):
            self._step.undo()

    def _kept(self, row: Row, i: int, n: int, state: State) -> State:
        """Returns the state of row i of n, if somebody wants it."""
        if not row.keep_state and (self.prefix_cache is None or not row.from_start):
            return None
        return state if n == 1 and not isinstance(self._step, GraphedSteps) else self._pick(state, [i])

    def _end(self, row: Row, state: State, reason: str) -> None:
        """Keeps what `retire` returns, and gives the cache its part."""
        self._ended[row.sequence] = row, state if row.keep_state else None, reason
        if self.prefix_cache is not None and row.from_start:
            self.prefix_cache.put(row.tokens()[:-1], state)

    def _pick(self, state: State, rows: list[int]) -> State:
        """Returns the state of some rows, without columns that growing caches had for others; None for none."""
        if not rows:
            return None
        part = states.select(state, rows)
        return states.trim(part, self.model) if self.model.state_size is None else part

    def retire(self, sequence: int) -> Decoded:
        """Returns a sequence and forgets it; one that is waiting or decoding is taken out.

        Raises:
            ValueError: no such sequence, or one that was retired before.
        """
        for i, row in enumerate(self._rows):
            if row.sequence == sequence:
                with torch.inference_mode():
                    own = self._kept(row, i, len(self._rows), self._state)
                    keep = [j for j in range(len(self._rows)) if j != i]
                    self._state = self._pick(self._state, keep)
                    self._rows = [self._rows[j] for j in keep]
                    self._end(row, own, "retired")
                break
        for row in self._queue:
            if row.sequence == sequence:
                self._ended[sequence] = row, None, "retired"
        self._queue = [row for row in self._queue if row.sequence != sequence]
        if sequence not in self._ended:
            raise ValueError(f"sequence: expected one that was admitted and not retired yet, got {sequence!r}")
        row, state, reason = self._ended.pop(sequence)
        # a clone made here is no tensor of the inference mode: gradients may flow from it
        return Decoded(row.tokens(), len(row.new), states.clone(state), reason)
