"""Arguments of decoding, checked and brought into one form: `generate`, `speculative` and `Decoder` share them."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linrnn.decode.sampling import Sampling, as_integer, at_least, check_seed, global_seed, row_seed
from linrnn.layers.base import describe
from linrnn.models.language import LanguageModel
from linrnn.models.tokens import check_ids

Stops = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Request:
    """What `generate` and `speculative` are asked for.

    prompts: the real tokens (T_i,) of each row, on the CPU. given: them as (B, T), as they came. n: new tokens at most.
    eos, stop: what ends a row. pad: what follows the end, None if nothing can. seeds: of each row, None when greedy.
    """

    prompts: list[Tensor]
    given: Tensor
    n: int
    eos: tuple[int, ...]
    stop: Stops
    pad: int | None
    seeds: list[int] | list[None]

    def with_columns(self, columns: Iterable[Sequence[int]]) -> Tensor:
        """Returns the prompts and new columns behind them: (B, T + n) int64, where the prompts were given."""
        new, B = array("q"), len(self.given)  # what comes is not known, so nothing is allocated ahead
        for column in columns:
            new.extend(column)
        if not new:
            return self.given.detach().to(torch.int64, copy=True)
        behind = torch.frombuffer(new, dtype=torch.int64).view(-1, B).T
        return torch.cat((self.given.detach().long(), behind.to(self.given.device)), 1)


def as_request(
    model: LanguageModel,
    ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    eos_id: int | Iterable[int] | None,
    pad_id: int | None,
    stop: Iterable[Sequence[int]] | None,
    seed: int | Sequence[int] | None,
    mask: Tensor | None,
) -> Request:
    """Checks the arguments of `generate`, which says what they are.

    Raises:
        TypeError, ValueError: as `generate` says.
    """
    n = at_least(0, "max_new_tokens", max_new_tokens)
    eos, stops = as_eos(eos_id, model.vocab_size), as_stop(stop, model.vocab_size)
    pad = as_pad(pad_id, eos)
    prompts = as_prompts(ids, mask, model.vocab_size)
    given = ids if isinstance(ids, Tensor) else left_padded(prompts, pad, model.embed.weight.device)
    if pad is None and stops and len(prompts) > 1:
        raise ValueError("pad_id: expected an integer, since stop ends rows apart and there is no eos_id, got None")
    return Request(prompts, given, n, eos, stops, pad, as_seeds(seed, len(prompts), sampling))


def as_model(name: str, model: LanguageModel) -> LanguageModel:
    """Returns a language model, that inside of a compiled one too, or raises TypeError."""
    own = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(own, LanguageModel):
        raise TypeError(f"{name}: expected a LanguageModel, got {type(own).__name__}")
    return own


def as_prompt(name: str, ids: Tensor | Sequence[int], vocab_size: int, hint: str = "") -> Tensor:
    """Returns a prompt as (T,) int64 on the CPU, T >= 1, all in the vocabulary; `hint` ends errors about it."""
    if not isinstance(ids, Tensor):
        numbers = [as_integer(i) for i in ids] if isinstance(ids, (list, tuple)) else [None]
        if None in numbers:
            raise TypeError(f"{name}: expected a tensor (time,) or a list of integers, got {describe(ids)}")
        check_range(name, numbers, vocab_size, hint)
        ids = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name}: expected integer token ids of shape (time,), got {describe(ids)}")
    if not len(ids):
        raise ValueError(f"{name}: expected at least one token, got none; begin with a BOS token")
    ids = ids.detach().to("cpu", torch.int64)
    check_range(name, [int(end) for end in ids.aminmax()], vocab_size, hint)
    return ids


def check_range(name: str, ids: Sequence[int | None], vocab_size: int, hint: str = "") -> None:
    """Raises ValueError for an id outside the vocabulary."""
    for i in ids:
        if i is None or not 0 <= i < vocab_size:
            raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {i}{hint}")


def as_prompts(ids: Tensor | Sequence[Tensor | Sequence[int]], mask: Tensor | None, vocab_size: int) -> list[Tensor]:
    """Returns the real tokens of each row, on the CPU."""
    hint = ""
    if isinstance(ids, Tensor):
        check_ids("ids", ids)
        rows: Sequence[Tensor | Sequence[int]] = list(ids.detach().cpu())
        if mask is None:
            hint = "; mark padding with mask"
        elif not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(f"mask: expected a bool tensor of shape {tuple(ids.shape)}, got {describe(mask)}")
        else:
            rows = [row[real] for row, real in zip(ids.detach().cpu(), mask.cpu(), strict=True)]
    else:
        if not isinstance(ids, (list, tuple)) or not all(isinstance(row, (list, tuple, Tensor)) for row in ids):
            raise TypeError(f"ids: expected a tensor (batch, time) or a list of prompts, got {describe(ids)}")
        if mask is not None:
            raise ValueError("mask: expected None with a list of prompts, which has no padding")
        if not ids:
            raise ValueError("ids: expected at least one prompt, got an empty list")
        rows = ids
    return [as_prompt(f"ids, row {i}", row, vocab_size, hint) for i, row in enumerate(rows)]


def left_padded(prompts: Sequence[Tensor], pad: int | None, device: torch.device) -> Tensor:
    """Returns prompts as (B, T), so that new tokens come right behind each."""
    T = max(len(prompt) for prompt in prompts)
    if pad is None and any(len(prompt) < T for prompt in prompts):
        raise ValueError("pad_id: expected an integer, since the prompts differ in length, got None")
    out = torch.full((len(prompts), T), 0 if pad is None else pad, dtype=torch.int64, device=device)
    for row, prompt in zip(out, prompts, strict=True):
        row[T - len(prompt) :] = prompt.to(device)
    return out


def as_eos(eos_id: int | Iterable[int] | None, vocab_size: int) -> tuple[int, ...]:
    """Returns the tokens that end a sequence, in the order given."""
    if eos_id is None:
        return ()
    eos_id = eos_id.tolist() if hasattr(eos_id, "tolist") else eos_id  # a tensor, or NumPy's
    given = tuple(eos_id) if isinstance(eos_id, Iterable) else (eos_id,)
    for token in given:
        number = as_integer(token)
        if number is None or not 0 <= number < vocab_size:
            raise ValueError(f"eos_id: expected ids from 0 to {vocab_size - 1}, got {token!r}")
    return tuple(int(token) for token in given)


def as_stop(stop: Iterable[Sequence[int]] | None, vocab_size: int) -> Stops:
    """Returns the sequences of tokens that end a sequence."""
    given = () if stop is None else tuple(stop)
    for tokens in given:
        if not isinstance(tokens, (list, tuple, Tensor)):
            raise TypeError(f"stop: expected sequences of token ids, got {describe(tokens)} among them")
        if not (tokens.numel() if isinstance(tokens, Tensor) else len(tokens)):
            raise ValueError("stop: expected at least one token, got none")
    return tuple(tuple(as_prompt("stop", tokens, vocab_size).tolist()) for tokens in given)


def as_pad(pad_id: int | None, eos: Sequence[int]) -> int | None:
    """Returns what follows the end of a row, if there is anything."""
    if pad_id is None:
        return eos[0] if eos else None
    pad = as_integer(pad_id)
    if pad is None or not -(2**63) <= pad < 2**63:
        raise ValueError(f"pad_id: expected an integer or None, got {pad_id!r}")
    return pad


def as_seeds(seed: int | Sequence[int] | None, n_rows: int, sampling: Sampling) -> list[int] | list[None]:
    """Returns the seed of each row's generator; None where nothing is drawn."""
    if seed is None:
        if sampling.greedy:
            return [None] * n_rows
        seed = global_seed()
    seed = seed.tolist() if hasattr(seed, "tolist") else seed  # a tensor, or NumPy's
    if isinstance(seed, (list, tuple)):
        if len(seed) != n_rows:
            raise ValueError(f"seed: expected one for each of {n_rows} rows, got {len(seed)}")
        return [check_seed("seed", own) for own in seed]
    return [row_seed(seed, i) for i in range(n_rows)]  # type: ignore[arg-type]
