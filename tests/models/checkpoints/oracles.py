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


def check_greedy(ours: LanguageModel, theirs: Any, vocab_size: int) -> None:
    """50 tokens behind prompts of different lengths in one batch, against transformers with a prompt at a time."""
    # RecurrentGemma's convolution there begins a prompt of one token with what it read in the call before
    prompts = [torch.randint(vocab_size, (n,)) for n in (5, 2, 9)]
    generated = ours.generate(prompts, 50, pad_id=-1)
    assert len(generated[:, 9:].unique()) > 10
    for prompt, row in zip(prompts, generated, strict=True):
        expected = theirs.generate(prompt[None], max_new_tokens=50, do_sample=False, pad_token_id=0)[0]
        assert len(expected) == len(prompt) + 50
        assert torch.equal(row[row >= 0], expected)


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
