"""Objectives against their definitions written out position by position."""

import pytest
import torch
import torch.nn.functional as F

from linrnn.models import SequenceClassifier
from lra.batches import Batch
from lra.objectives import Net, causal_denoising, classification, draw_mask, masked_denoising

V, MASK, PAD = 11, 1, 0


def make(bidirectional: bool, mixer: str = "lru") -> tuple[Net, Batch]:
    body = SequenceClassifier(5, vocab_size=V, mixer=mixer, d_model=16, n_layers=1, bidirectional=bidirectional)
    lengths = torch.tensor([6, 1, 4])
    mask = torch.arange(6) < lengths[:, None]
    ids = torch.where(mask, torch.randint(2, V, (3, 6)), PAD)
    return Net(body, 16, V).eval(), Batch(ids, mask, torch.tensor([0, 4, 2]))


def test_classification_is_cross_entropy():
    net, batch = make(True)
    score = classification(net, batch)
    logits = net.body(batch.ids, batch.mask)
    torch.testing.assert_close(score.mean, F.cross_entropy(logits, batch.labels))
    assert score.scored == 3 and score.correct == (logits.argmax(1) == batch.labels).sum()


def test_masked_scores_hidden_positions_and_nothing_else():
    net, batch = make(True)
    hidden = draw_mask(batch.mask, 0.5, torch.Generator().manual_seed(3))
    score = masked_denoising(net, batch, torch.Generator().manual_seed(3), mask_id=MASK, rate=0.5)
    corrupted = batch.ids.clone()
    corrupted[hidden] = MASK
    logits = net.tokens(corrupted, batch.mask)
    terms = [F.cross_entropy(logits[b, t], batch.ids[b, t]) for b, t in hidden.nonzero().tolist()]
    assert 0 < len(terms) < batch.mask.sum()
    torch.testing.assert_close(score.loss, torch.stack(terms).sum())
    torch.testing.assert_close(score.mean, torch.stack(terms).mean())
    assert score.scored == len(terms)


def test_masking_draws_real_positions_at_the_rate():
    mask = torch.rand(200, 500, generator=torch.Generator().manual_seed(9)) < 0.7
    hidden = draw_mask(mask, 0.15, torch.Generator().manual_seed(0))
    assert not (hidden & ~mask).any()
    assert abs(hidden.sum() / mask.sum() - 0.15) < 0.01
    again = draw_mask(mask, 0.15, torch.Generator().manual_seed(1))
    assert not torch.equal(hidden, again)


def test_nothing_hidden_is_a_zero_loss_with_gradients():
    net, batch = make(True)
    score = masked_denoising(net, batch, torch.Generator(), mask_id=MASK, rate=0.0)
    score.mean.backward()
    assert score.mean == 0 and score.scored == 0


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_causal_scores_the_next_real_token(mixer):
    net, batch = make(False, mixer)
    score = causal_denoising(net, batch)
    logits = net.tokens(batch.ids, batch.mask)
    pairs = [(b, t) for b in range(3) for t in range(5) if batch.mask[b, t + 1]]
    terms = [F.cross_entropy(logits[b, t], batch.ids[b, t + 1]) for b, t in pairs]
    torch.testing.assert_close(score.loss, torch.stack(terms).sum())
    assert score.scored == len(pairs) == 5 + 0 + 3


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_a_causal_model_cannot_see_its_target(mixer):
    net, batch = make(False, mixer)
    before = net.tokens(batch.ids, batch.mask)[0, :3]
    changed = batch.ids.clone()
    changed[0, 3:] = 2
    torch.testing.assert_close(net.tokens(changed, batch.mask)[0, :3], before)


def test_one_token_sequences_have_nothing_to_predict():
    net, _ = make(False)
    batch = Batch(torch.tensor([[3]]), torch.tensor([[True]]), torch.tensor([0]))
    assert causal_denoising(net, batch).scored == 0


def test_a_classifier_has_no_denoising_head():
    net, batch = make(True)
    with pytest.raises(RuntimeError, match="without a denoising head"):
        Net(net.body, 16).tokens(batch.ids, batch.mask)
