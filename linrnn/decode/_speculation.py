"""One round of speculative decoding: guesses of a small model, judged by a large one in one call.

Sequences are rows. Each has read all of its tokens but the last few, its *tail*, of which there is at least one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode.graph import GraphedSteps, fast_step
from linrnn.decode.sampling import BadLogits, Sampling, draw
from linrnn.layers.base import State
from linrnn.models.language import LanguageModel

# A state cannot be cut back, and to read accepted tokens again takes a call that reads all weights, which costs more
# than some tokens more in the calls that read them anyway. So a tail waits until it is longer than this.
LONGEST_TAIL = 16


@dataclass
class Acceptance:
    """Counts of speculative decoding; calls that are given the same object add to it.

    rounds: of all sequences, each of which has guesses judged and gets one token more than are accepted. drafted:
    guesses. judged: those among them before which all were accepted. accepted: of these. calls: of the large model,
    prompts aside, for all sequences together. replays: calls among them that only read accepted tokens again.
    """

    rounds: int = 0
    drafted: int = 0
    judged: int = 0
    accepted: int = 0
    calls: int = 0
    replays: int = 0

    @property
    def rate(self) -> float:
        """Share of the judged guesses that were accepted: 1 minus the total variation distance of the two models."""
        return self.accepted / self.judged if self.judged else float("nan")

    @property
    def tokens_per_round(self) -> float:
        """Tokens of a sequence for each round, those behind its end included."""
        return 1 + self.accepted / self.rounds if self.rounds else float("nan")


class Speculation:
    """Sequences that are being decoded: the states of both models, and what is drawn from.

    Args:
        model, draft: the large and the small one, in eval mode.
        target, guess: their states behind all tokens but the last.
        last: the last token of each sequence, (B,) int64.
        seen: (B, V) bool, the tokens of each sequence; None where no penalty asks for them.
        sampling: how a token is chosen from logits, in both models.
        generators: one for each sequence.
        n_draft: guesses in a round.
        acceptance: where rounds are counted.
        graphs: the draft's steps run as CUDA graphs, where they can.

    `broken` has the rows of the last round whose next token behind those returned could not be drawn, since the large
    model's logits are no numbers there: unless they have ended, they cannot go on.
    """

    def __init__(
        self,
        model: LanguageModel,
        draft: LanguageModel,
        target: State,
        guess: State,
        last: Tensor,
        seen: Tensor | None,
        *,
        sampling: Sampling,
        generators: Sequence[torch.Generator],
        n_draft: int,
        acceptance: Acceptance,
        graphs: bool = True,
    ):
        self.model, self.draft, self.draft_step = model, draft, fast_step(draft, graphs)
        self.target, self.guess, self.seen = target, guess, seen
        self.tails = [[token] for token in last.tolist()]
        self.sampling, self.generators = sampling, list(generators)
        self.n_draft, self.acceptance = n_draft, acceptance
        self.broken: set[int] = set()

    @torch.inference_mode()
    def round(self) -> list[list[int]]:
        """Returns the next tokens of each sequence: 1 to n_draft + 1, or one less in `broken` rows."""
        guesses, distributions, snapshots = self._draw_guesses()
        logits, after = self._judge(guesses)
        accepted, last = self._accept(logits, guesses, distributions)
        drawn = torch.stack(guesses, 1).tolist()
        new = [[*row[:n], token] for row, n, token in zip(drawn, accepted, last.tolist(), strict=True)]
        self._advance(after, accepted, new)
        self._roll_back(snapshots, guesses[-1], accepted)

        B, k = len(new), self.n_draft
        counts = self.acceptance
        counts.rounds += B
        counts.drafted += B * k
        counts.judged += sum(min(n + 1, k) for n in accepted)
        counts.accepted += sum(accepted)
        return [tokens[:-1] if row in self.broken else tokens for row, tokens in enumerate(new)]

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only."""
        self.target = trimmed(states.select(self.target, rows), self.model)
        self.guess = trimmed(states.select(self.guess, rows), self.draft)
        self.tails = [self.tails[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        if self.seen is not None:
            self.seen = self.seen[list(rows)]

    def _draw_guesses(self) -> tuple[list[Tensor], list[Tensor], list[State]]:
        """Returns guesses, each (B,), the distributions (B, V) they are from, and the draft's states around them."""
        token = self._column([tail[-1] for tail in self.tails])
        guesses, distributions, snapshots, seen = [], [], [self.guess], self.seen
        for _ in range(self.n_draft):
            logits, state = self._step_draft(token, snapshots[-1])
            snapshots.append(state)
            distributions.append(self.sampling.probabilities(logits, seen))
            token = draw(distributions[-1], self.generators)
            guesses.append(token)
            seen = with_token(seen, token)
        return guesses, distributions, snapshots

    def _step_draft(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Returns the draft's logits (B, V) behind a token, and a state that the next step does not write to."""
        logits, state = self.draft_step(token, state)
        return logits, states.clone(state) if isinstance(self.draft_step, GraphedSteps) else state

    def _judge(self, guesses: list[Tensor]) -> tuple[Tensor, State]:
        """Returns the large model's logits (B, n_draft + 1, V) from the last token on, and its state behind it all."""
        tails, mask = self._padded(self.tails)
        ids = torch.cat((tails, torch.stack(guesses, 1)), 1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(ids), len(guesses))), 1)
        self.acceptance.calls += 1
        h, after = self.model.features(ids, self.target, mask=mask)
        if not h.isfinite().all():  # sums over time with weights of 0 bring NaN back to tokens that come before it
            parts, after = [], self.target
            for t in range(ids.shape[1]):
                part, after = self.model.features(
                    ids[:, t : t + 1], after, mask=mask if mask is None else mask[:, t : t + 1]
                )
                parts.append(part)
            h = torch.cat(parts, 1)
        return self.model.read_out(h[:, -len(guesses) - 1 :]), after

    def _accept(self, logits: Tensor, guesses: list[Tensor], distributions: list[Tensor]) -> tuple[list[int], Tensor]:
        """Returns how many guesses of each row are accepted, and the token behind those, (B,).

        A guess x from q is accepted with probability min(1, p(x) / q(x)). In place of a refused one, a token is drawn
        from max(0, p - q), normalised; behind the last one, from p (Leviathan et al. 2023, arXiv:2211.17192, 2.3).
        """
        # as many numbers in every round: what a row draws does not depend on what it accepts, or on the other rows
        own = (torch.rand(self.n_draft, generator=g, dtype=torch.float64, device="cpu") for g in self.generators)
        u = torch.stack(list(own)).to(logits.device)
        running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        accepted = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        rest, seen = torch.zeros_like(distributions[0]), self.seen
        self.broken = set()
        for j, (guess, q) in enumerate(zip(guesses, distributions, strict=True)):
            p, running = self._probabilities(logits[:, j], seen, running)
            p_x, q_x = (v.gather(1, guess[:, None])[:, 0].double() for v in (p, q))
            taken = running & (u[:, j] * q_x < p_x)
            left = (p - q).clamp(min=0)
            left = torch.where(left.sum(1, keepdim=True) > 0, left, p)  # p = q but for rounding
            rest = torch.where((running & ~taken)[:, None], left, rest)
            running, accepted = taken, accepted + taken
            seen = with_token(seen, guess)
        p, running = self._probabilities(logits[:, -1], seen, running)
        return accepted.tolist(), draw(torch.where(running[:, None], p, rest), self.generators)

    def _probabilities(self, logits: Tensor, seen: Tensor | None, running: Tensor) -> tuple[Tensor, Tensor]:
        """Returns probabilities (B, V) of rows whose guesses were all accepted so far, and which rows these still are.

        Nobody asks what the model says behind a refused guess, so there it may be no numbers.
        """
        while True:
            try:
                return self.sampling.probabilities(torch.where(running[:, None], logits, 0), seen), running
            except BadLogits as bad:
                self.broken.update(bad.rows)
                running = running.clone()
                running[bad.rows] = False

    def _advance(self, after: State, accepted: list[int], new: list[list[int]]) -> None:
        """Moves the large model's state behind the tokens it may: where all was accepted, or a tail has grown long."""
        if self.seen is not None:
            for row, tokens in enumerate(new):
                self.seen[row, tokens] = True
        through = [row for row, n in enumerate(accepted) if n == self.n_draft]
        if len(through) == len(new):
            self.target = after
        elif through:
            self.target = states.put(self.target, through, states.select(after, through))
        for row, tokens in enumerate(new):
            self.tails[row] = tokens[-1:] if row in through else self.tails[row] + tokens
        if max(map(len, self.tails)) > LONGEST_TAIL:
            ids, mask = self._padded([tail[:-1] for tail in self.tails])
            self.acceptance.calls += 1
            self.acceptance.replays += 1
            _, self.target = self.model.features(ids, self.target, mask=mask)
            self.tails = [tail[-1:] for tail in self.tails]
        if len(new) > 1:
            self.target = trimmed(self.target, self.model)

    def _roll_back(self, snapshots: list[State], last: Tensor, accepted: list[int]) -> None:
        """Takes the draft's states up again behind the accepted tokens: they were kept."""
        if self.n_draft in accepted:  # the last guess was drawn, and not read
            snapshots = [*snapshots, self._step_draft(last, snapshots[-1])[1]]
        used = sorted({n + 1 for n in accepted})
        if len(used) == 1:
            self.guess = snapshots[used[0]]
            return
        together = states.concatenate([snapshots[n] for n in used])
        B = len(accepted)
        rows = [used.index(n + 1) * B + row for row, n in enumerate(accepted)]
        self.guess = trimmed(states.select(together, rows), self.draft)

    def _padded(self, tails: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Returns tails as ids (B, T), padded on the left, and their mask, None if they are of one length."""
        T = max(map(len, tails))
        ids = self._column([[0] * (T - len(tail)) + tail for tail in tails])
        if all(len(tail) == T for tail in tails):
            return ids, None
        return ids, self._column([[i >= T - len(tail) for i in range(T)] for tail in tails])

    def _column(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.model.embed.weight.device)


def trimmed(state: State, model: LanguageModel) -> State:
    """Returns a state without columns of growing caches that no row has: padding, or what was rolled back."""
    return states.trim(state, model) if model.state_size is None else state


def with_token(seen: Tensor | None, token: Tensor) -> Tensor | None:
    """Returns seen (B, V) with the tokens (B,) in it."""
    return None if seen is None else seen.scatter(1, token[:, None], True)
