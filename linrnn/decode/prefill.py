"""Reading prompts: the state behind tokens that are known, in parallel over time, without a head."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from linrnn.decode import state as states
from linrnn.decode.prefix_cache import PrefixCache
from linrnn.layers.base import State
from linrnn.models.language import LanguageModel

CHUNK = 4096  # tokens of prompts in one call


def prefill_alone(
    model: LanguageModel, ids: Tensor, state: State, chunk: int, cache: PrefixCache | None = None
) -> State:
    """Reads one prompt ids (T,), T >= 0, behind a state of one row (None: nothing before), `chunk` tokens at a time.

    With a cache it goes on from the longest prefix known, and what it then passes is kept.
    """
    ends, start = {len(ids)}, 0
    if cache is not None and len(ids):
        start, state = cache.get([*ids.tolist(), 0])  # finds proper prefixes, and the one before the last is ours
        state = states.to(state, model.embed.weight.device)  # the model may have moved since
        ends |= set(range(cache.every, len(ids), cache.every)) if cache.every else set()
    device = model.embed.weight.device
    for end in sorted(end for end in ends if end > start):
        for part in ids[start:end].to(device).split(chunk):
            _, state = model.features(part[None], state)
        if cache is not None:
            cache.put(ids[:end], state)
        start = end
    return model.init_state(1) if state is None else state


def prefill_together(model: LanguageModel, prompts: Sequence[Tensor], start: Sequence[State], chunk: int) -> State:
    """Reads prompts (T_i,) behind states of one row (None: no token yet) in one batch, padded at the right.

    At most `chunk` tokens, padding included, are in one call. Returns the state of all rows.
    """
    state = None
    if any(row is not None for row in start):
        state = states.concatenate([model.init_state(1) if row is None else row for row in start])
    longest = max(len(ids) for ids in prompts)
    if not longest:
        return model.init_state(len(prompts)) if state is None else state
    padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    lengths = torch.tensor([len(ids) for ids in prompts], device=padded.device)
    mask = torch.arange(longest, device=padded.device) < lengths[:, None]
    size = max(1, chunk // len(prompts))
    for part, real in zip(padded.split(size, 1), mask.split(size, 1), strict=True):
        _, state = model.features(part, state, mask=real)
    return state
