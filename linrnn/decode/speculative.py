"""Speculative decoding: a small model guesses, a large one judges several guesses in one call; nothing else changes."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode._rows import Row, as_eos, as_stop
from linrnn.decode._speculation import Acceptance, Speculation
from linrnn.decode.generation import as_pad, as_prompts, as_seeds, left_padded
from linrnn.decode.prefill import evaluating, prefill_alone, prefill_together
from linrnn.decode.sampling import BadLogits, Sampling, generator
from linrnn.layers.base import State, describe, positive_int
from linrnn.models.language import LanguageModel

__all__ = ["Acceptance", "speculative"]

PREFILL_CHUNK = 4096  # tokens of a prompt in one call, as in a Decoder


def speculative(
    model: LanguageModel,
    draft: LanguageModel,
    ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    *,
    n_draft: int = 4,
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
    stream: bool = False,
    acceptance: Acceptance | None = None,
) -> Tensor | Iterator[Tensor]:
    """Continues prompts ids (B, T) as `generate` does, with fewer calls of the model: (B, T + n) int64.

    In each round `draft` guesses n_draft tokens one by one, and `model` reads them in one call. As many are accepted
    as it takes for the tokens to be distributed exactly as those that `generate` draws from `model` (Leviathan et al.
    2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318), and one is drawn on top. Greedily the tokens are the
    same, but for logits so close that the rounding of a longer call decides between them. The draft may be any model
    with the same vocabulary; what it is decides the speed, and nothing else.

    States are rolled back to the accepted tokens: those of the draft are kept at each guess, and the model reads
    accepted tokens again in its next calls, until all guesses of one are accepted or there are too many.

    Args:
        model: the LanguageModel whose text it is.
        draft: a smaller LanguageModel, on the same device.
        n_draft: guesses in a round.
        acceptance: counts rounds, guesses and calls.
        ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id, pad_id, stop, seed, mask,
            stream: as for `generate`; the sampling is that of both models. A row draws other numbers here than there
            from one seed, always the same ones, whatever its neighbours.

    Raises:
        TypeError: an argument of another kind, such as a model that is no LanguageModel.
        ValueError: another vocabulary or device of the draft, n_draft < 1, or what `generate` raises it for.
    """
    for name, value in (("model", model), ("draft", draft)):
        if not isinstance(value, LanguageModel):
            raise TypeError(f"{name}: expected a LanguageModel, got {type(value).__name__}")
    if draft.vocab_size != model.vocab_size:
        raise ValueError(f"draft: expected the model's vocabulary of {model.vocab_size} ids, got {draft.vocab_size}")
    device = model.embed.weight.device
    if draft.embed.weight.device != device:
        raise ValueError(f"draft: expected a model on {device} like the other, got one on {draft.embed.weight.device}")
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens!r}")
    if acceptance is not None and not isinstance(acceptance, Acceptance):
        raise TypeError(f"acceptance: expected an Acceptance or None, got {describe(acceptance)}")
    positive_int("n_draft", n_draft)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if eos_id is not None and not isinstance(eos_id, int):
        eos_id = tuple(eos_id)
    eos, stops, pad = as_eos(eos_id, model.vocab_size), as_stop(stop, model.vocab_size), as_pad(pad_id, eos_id)
    prompts = as_prompts(ids, mask, model.vocab_size)
    given = ids if isinstance(ids, Tensor) else left_padded(prompts, pad, device)
    if pad is None and stops and len(prompts) > 1:
        raise ValueError("pad_id: expected an integer, since stop ends rows apart and there is no eos_id, got None")
    rows = [
        Row(i, prompt, max_new_tokens, sampling, generator(own or 0), eos, stops, None, True, False, None)
        for i, (prompt, own) in enumerate(zip(prompts, as_seeds(seed, len(prompts), sampling), strict=True))
    ]
    columns = decode(model, draft, rows, sampling, n_draft, Acceptance() if acceptance is None else acceptance)
    new = (torch.tensor([pad if t is None else t for t in column], dtype=torch.int64) for column in columns)
    if stream:
        return (column.to(given.device) for column in new)
    return torch.cat((given.long(), *(column[:, None].to(given.device) for column in new)), 1)


def decode(
    model: LanguageModel,
    draft: LanguageModel,
    rows: Sequence[Row],
    sampling: Sampling,
    n_draft: int,
    acceptance: Acceptance,
) -> Iterator[list[int | None]]:
    """Yields the new tokens of all rows, column after column; None for a row that has ended."""
    modules = (*model.modules(), *draft.modules())
    live = list(rows) if rows and rows[0].limit else []
    speculation, width = None, 0
    while live:
        with evaluating(modules):
            if speculation is None:
                speculation = begin(model, draft, live, sampling, n_draft, acceptance)
            try:
                new = speculation.round()
            except BadLogits as bad:
                row = live[bad.rows[0]]
                raise ValueError(
                    "logits: expected finite numbers (or -inf for some), got NaN, inf or only -inf for row "
                    f"{row.sequence}, at its new token {len(row.new)} or one of the {n_draft} behind it"
                ) from bad
        staying = [i for i, (row, tokens) in enumerate(zip(live, new, strict=True)) if not extend(row, tokens)]
        if len(staying) < len(live):
            live = [live[i] for i in staying]
            if live:
                speculation.keep(staying)
        ready = min(len(row.new) for row in live) if live else max(len(row.new) for row in rows)
        for t in range(width, ready):
            yield [row.new[t] if t < len(row.new) else None for row in rows]
        width = ready


@torch.inference_mode()
def begin(
    model: LanguageModel,
    draft: LanguageModel,
    rows: Sequence[Row],
    sampling: Sampling,
    n_draft: int,
    acceptance: Acceptance,
) -> Speculation:
    """Reads the prompts with both models, all but the last tokens."""
    device = model.embed.weight.device
    prompts = [row.prompt.to(device) for row in rows]
    seen = None
    if sampling.penalises:
        seen = torch.zeros(len(rows), model.vocab_size, dtype=torch.bool, device=device)
        for known, prompt in zip(seen, prompts, strict=True):
            known[prompt] = True
    return Speculation(
        model,
        draft,
        prefilled(model, prompts),
        prefilled(draft, prompts),
        torch.stack([prompt[-1] for prompt in prompts]),
        seen,
        sampling=sampling,
        generators=[row.generator for row in rows if row.generator is not None],
        n_draft=n_draft,
        acceptance=acceptance,
    )


def prefilled(model: LanguageModel, prompts: Sequence[Tensor]) -> State:
    """Returns the state behind all tokens of prompts (T_i,) but the last; on a CPU each is read alone."""
    heads = [prompt[:-1] for prompt in prompts]
    if model.embed.weight.device.type != "cpu":
        return prefill_together(model, heads, [None] * len(heads), PREFILL_CHUNK)
    return states.concatenate([prefill_alone(model, ids, None, PREFILL_CHUNK) for ids in heads])


def extend(row: Row, tokens: Sequence[int]) -> bool:
    """Gives a row tokens up to its end; returns whether that is reached."""
    for token in tokens:
        row.new.append(token)
        if row.ended() is not None:
            return True
    return False
