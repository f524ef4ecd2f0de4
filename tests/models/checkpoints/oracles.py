"""What every family is asked: a model of transformers with random weights, and ours made of its folder."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linrnn.models import LanguageModel
from linrnn.models.checkpoints import load_pretrained


def saved(model: Any, folder: Path, scale: float = 0.2) -> Any:
    """Changes every parameter, since fresh ones are zeros and ones in places that hide errors, and saves the model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    model.generation_config.eos_token_id = None
    model.eval().save_pretrained(folder)
    return model


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits of transformers' model, of whole sequences."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@torch.no_grad()
def greedy(model: LanguageModel, ids: Tensor, n: int) -> Tensor:
    """Appends n tokens to ids (B, T), by prefill and steps."""
    logits, state = model(ids)
    step, tokens = model.frozen_step(), [logits[:, -1].argmax(-1)]
    for _ in range(n - 1):
        logits, state = step(tokens[-1], state)
        tokens.append(logits.argmax(-1))
    return torch.cat((ids, torch.stack(tokens, 1)), 1)


@torch.no_grad()
def check_modes(model: LanguageModel, ids: Tensor, **tolerance: float) -> None:
    """Whole sequences, pieces, steps, and ragged batches padded on either side, with one answer."""
    whole, T = model(ids)[0], ids.shape[1]
    first, state = model(ids[:, : T // 3])
    second, state = model(ids[:, T // 3 : -4], state)
    steps = []
    for t in range(T - 4, T):
        logits, state = model.step(ids[:, t], state)
        steps.append(logits)
    torch.testing.assert_close(torch.cat((first, second, torch.stack(steps, 1)), 1), whole, **tolerance)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, : T // 2], mask[1, T // 4 :] = False, False
    padded, state = model(ids, mask=mask)
    after = model(ids, state)[0]
    for row, real in enumerate(mask):
        alone, own = model(ids[row, real][None])
        torch.testing.assert_close(padded[row, real], alone[0], **tolerance)
        torch.testing.assert_close(after[row], model(ids[row][None], own)[0][0], **tolerance)


def low_precision_errors(theirs: Any, folder: Path, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Root mean square errors of our and their model in `dtype`, against theirs in float32 with these weights."""
    their_low = type(theirs).from_pretrained(folder, dtype=dtype).eval()
    ours = load_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    exact = logits_of(theirs, ids)
    with torch.no_grad():
        logits = ours(ids)[0]
    assert logits.dtype == dtype
    our_error, their_error = (
        (low.float() - exact).square().mean().sqrt() for low in (logits, logits_of(their_low, ids))
    )
    return our_error, their_error
