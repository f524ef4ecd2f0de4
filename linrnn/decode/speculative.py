"""Speculative decoding: a small model guesses, a large one judges several guesses in one call; nothing else changes."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from linrnn.decode import state as states
from linrnn.decode._in_use import evaluating
from linrnn.decode._requests import as_model, as_request
from linrnn.decode._rows import Row
from linrnn.decode._speculation import Acceptance, Speculation
from linrnn.decode.prefill import CHUNK, prefill_alone, prefill_together
from linrnn.decode.sampling import BadLogits, Sampling, at_least, generator
from linrnn.layers.base import State, describe
from linrnn.models.language import LanguageModel

__all__ = ["Acceptance", "speculative"]

EXPECTED = "expected finite numbers (or -inf for some), got NaN, inf or only -inf"


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
    graphs: bool = True,
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
        graphs: on an NVIDIA GPU the draft's steps run as CUDA graphs, as in a `Decoder`.
        ids, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, eos_id, pad_id, stop, seed, mask,
            stream: as for `generate`; the sampling is that of both models. A row draws other numbers here than there
            from one seed, always the same ones, whatever its neighbours.

    Raises:
        TypeError: an argument of another kind, such as a model that is no LanguageModel.
        ValueError: another vocabulary or device of the draft, n_draft < 1, or what `generate` raises it for.
    """
    model, draft = as_model("model", model), as_model("draft", draft)
    if draft.vocab_size != model.vocab_size:
        raise ValueError(f"draft: expected the model's vocabulary of {model.vocab_size} ids, got {draft.vocab_size}")
    device = model.embed.weight.device
    if draft.embed.weight.device != device:
        raise ValueError(f"draft: expected a model on {device} like the other, got one on {draft.embed.weight.device}")
    if acceptance is not None and not isinstance(acceptance, Acceptance):
        raise TypeError(f"acceptance: expected an Acceptance or None, got {describe(acceptance)}")
    n_draft = at_least(1, "n_draft", n_draft)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    request = as_request(model, ids, max_new_tokens, sampling, eos_id, pad_id, stop, seed, mask)
    eos, pad = frozenset(request.eos), request.pad
    rows = [
        Row(i, prompt, request.n, sampling, generator(own or 0), eos, request.stop, None, True, False, None)
        for i, (prompt, own) in enumerate(zip(request.prompts, request.seeds, strict=True))
    ]
    counts = Acceptance() if acceptance is None else acceptance
    new = ([pad if t is None else t for t in column] for column in decode(model, draft, rows, n_draft, counts, graphs))
    if stream:
        return (torch.tensor(column, dtype=torch.int64, device=request.given.device) for column in new)
    return request.with_columns(new)  # type: ignore[arg-type]


def decode(
    model: LanguageModel,
    draft: LanguageModel,
    rows: Sequence[Row],
    n_draft: int,
    acceptance: Acceptance,
    graphs: bool,
) -> Iterator[list[int | None]]:
    """Yields the new tokens of all rows, column after column; None for a row that has ended."""
    modules = (*model.modules(), *draft.modules())
    live = list(rows) if rows and rows[0].limit else []
    speculation, width = None, 0
    while live:
        with evaluating(modules):
            if speculation is None:
                speculation = begin(model, draft, live, n_draft, acceptance, graphs)
            try:
                new = speculation.round()
            except BadLogits as bad:
                row = live[bad.rows[0]]
                raise ValueError(
                    f"logits of the draft: {EXPECTED} for row {row.sequence}, at its new token {len(row.new)} or one "
                    f"of the {n_draft - 1} behind it"
                ) from bad
        staying = [i for i, (row, tokens) in enumerate(zip(live, new, strict=True)) if not extend(row, tokens)]
        for i in staying:
            if i in speculation.broken:
                row = live[i]
                raise ValueError(f"logits: {EXPECTED} for row {row.sequence}, at its new token {len(row.new)}")
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
    n_draft: int,
    acceptance: Acceptance,
    graphs: bool,
) -> Speculation:
    """Reads the prompts with both models, all but the last tokens."""
    device, sampling = model.embed.weight.device, rows[0].sampling
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
        graphs=graphs,
    )


def prefilled(model: LanguageModel, prompts: Sequence[Tensor]) -> State:
    """Returns the state behind all tokens of prompts (T_i,) but the last; on a CPU each is read alone."""
    heads = [prompt[:-1] for prompt in prompts]
    if model.embed.weight.device.type != "cpu":
        return prefill_together(model, heads, [None] * len(heads), CHUNK)
    return states.concatenate([prefill_alone(model, ids, None, CHUNK) for ids in heads])


def extend(row: Row, tokens: Sequence[int]) -> bool:
    """Gives a row tokens up to its end; returns whether that is reached."""
    for token in tokens:
        row.new.append(token)
        if row.ended() is not None:
            return True
    return False
