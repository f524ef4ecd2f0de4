"""Objectives against their definitions written out position by position."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linrnn.models import SequenceClassifier
from linrnn.models.classifier import pool
from lra.config import Compute
from lra.examples import Batch, Side
from lra.objectives import Net, causal_denoising, classification, draw_mask, masked_denoising, measures
from lra.tasks import Ids, Levels
from lra.tasks.base import IGNORED

V, MASK, PAD = 11, 1, 0
IDS = Ids(V, pad_id=PAD, mask_id=MASK)
LENGTHS = torch.tensor([6, 1, 4])


def make(bidirectional: bool, mixer: str = "lru", denoise: bool = True, **options) -> tuple[Net, Batch]:
    body = SequenceClassifier(
        5, vocab_size=V, mixer=mixer, d_model=16, n_layers=1, bidirectional=bidirectional, **options
    )
    mask = torch.arange(6) < LENGTHS[:, None]
    ids = torch.where(mask, torch.randint(2, V, (3, 6)), PAD)
    batch = Batch(Side(ids, mask), None, torch.tensor([0, 4, 2]))
    return Net(body, IDS, 16, denoise=denoise).eval(), batch


def make_levels(loss: str, channels: int, mask_channel: bool, ink: bool = False) -> tuple[Net, Batch]:
    inputs = Levels(channels, 100.0, 50.0, loss)
    body = SequenceClassifier(
        2, d_input=channels + mask_channel, d_model=16, n_layers=1, bidirectional=mask_channel, mixer="lru"
    )
    levels = torch.randint(0, 256, (3, 7, channels), dtype=torch.uint8)
    levels[:, ::2] = 0
    return Net(body, inputs, 16, denoise=True, ink=ink).eval(), Batch(Side(levels, None), None, torch.zeros(3).long())


def logits_at(net: Net, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return net.denoise(net.body.features(ids, mask))


def test_classification_is_cross_entropy():
    net, batch = make(True, denoise=False)
    score = classification(net, batch)
    logits = net.body(*batch.first)
    torch.testing.assert_close(score.mean, F.cross_entropy(logits, batch.labels))
    assert score.scored == 3 and score.correct == (logits.argmax(1) == batch.labels).sum()


def test_classification_of_positions_leaves_out_those_without_a_label():
    net, batch = make(True, denoise=False, pooling="none")
    labels = torch.full((3, 6), IGNORED)
    labels[0, 2], labels[0, 5], labels[2, 1] = 3, 1, 0
    score = classification(net, batch._replace(labels=labels, asked=2))
    logits = net.body(*batch.first)[[0, 0, 2], [2, 5, 1]]
    expected = F.cross_entropy(logits, torch.tensor([3, 1, 0]), reduction="sum")
    torch.testing.assert_close(score.loss, expected)
    assert score.scored == 3 and score.correct == (logits.argmax(1) == torch.tensor([3, 1, 0])).sum()


def test_classification_of_two_inputs_compares_them():
    net, batch = make(True, denoise=False, two_inputs=True)
    second = Side(batch.first.inputs[:, :3], batch.first.mask[:, :3])
    score = classification(net, batch._replace(second=second))
    logits = net.body(*batch.first, *second)
    torch.testing.assert_close(score.mean, F.cross_entropy(logits, batch.labels))


@pytest.mark.parametrize("pooling", ["mean", "max", "last", "none"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_no_window_sees_another(pooling, bidirectional):
    net, batch = make(bidirectional, denoise=False, pooling=pooling)
    ids, mask = batch.first
    parts = [net.body.features(ids[:, t : t + 4], mask[:, t : t + 4]) for t in (0, 4)]
    h = torch.cat(parts, 1)
    expected = net.body.head(h if pooling == "none" else pool(h, mask, pooling))
    torch.testing.assert_close(net.body.head(net.pooled(batch.first, 4)), expected)
    torch.testing.assert_close(net.pooled(batch.first, 6), net.pooled(batch.first, None))
    if pooling != "none":
        torch.testing.assert_close(net.classify(batch, 4)[0], expected)


def test_windows_of_levels_are_cut_alike():
    net, batch = make_levels("l1", 3, mask_channel=True)
    x = torch.cat((net.normalised(batch.first.inputs), torch.zeros(3, 7, 1)), -1)
    h = torch.cat([net.body.features(x[:, t : t + 3]) for t in (0, 3, 6)], 1)
    torch.testing.assert_close(net.pooled(batch.first, 3), h.mean(1))


def test_masked_scores_hidden_positions_and_nothing_else():
    net, batch = make(True)
    ids, mask = batch.first
    hidden = draw_mask(batch.first, (0, 1), 0.5, torch.Generator().manual_seed(3)) & mask
    score = masked_denoising(net, batch, torch.Generator().manual_seed(3), rate=0.5)
    corrupted = ids.clone()
    corrupted[hidden] = MASK
    logits = logits_at(net, corrupted, mask)
    terms = [F.cross_entropy(logits[b, t], ids[b, t]) for b, t in hidden.nonzero().tolist()]
    assert 0 < len(terms) < mask.sum()
    torch.testing.assert_close(score.loss, torch.stack(terms).sum())
    torch.testing.assert_close(score.mean, torch.stack(terms).mean())
    assert score.scored == len(terms)


def test_two_inputs_are_masked_one_after_the_other():
    net, batch = make(True, two_inputs=True)
    second = Side(batch.first.inputs.flip(0), batch.first.mask.flip(0))
    both = masked_denoising(net, batch._replace(second=second), torch.Generator().manual_seed(5), rate=0.5)
    generator = torch.Generator().manual_seed(5)
    one = masked_denoising(net, batch, generator, rate=0.5)
    two = masked_denoising(net, batch._replace(first=second), generator, rate=0.5)
    torch.testing.assert_close(both.loss, one.loss + two.loss)
    assert both.scored == one.scored + two.scored


@pytest.mark.parametrize("loss", ["l1", "ce"])
@pytest.mark.parametrize("channels", [1, 3])
def test_masked_levels_are_hidden_behind_the_mean_and_a_mark(loss, channels):
    net, batch = make_levels(loss, channels, mask_channel=True, ink=loss == "ce")
    levels = batch.first.inputs
    hidden = draw_mask(batch.first, (0, 1), 0.5, torch.Generator().manual_seed(3))
    score = masked_denoising(net, batch, torch.Generator().manual_seed(3), rate=0.5)
    x = (levels.double() - 100) / 50
    seen = torch.cat((torch.where(hidden[..., None], 0, x), hidden[..., None].double()), -1).float()
    out = net.denoise(net.body.features(seen, None))
    if loss == "l1":
        error = (out - x)[hidden].detach()
        torch.testing.assert_close(score.loss, error.abs().sum().float())
        wanted = x[hidden]
        r2 = 1 - (error**2).sum() / ((wanted - wanted.mean()) ** 2).sum()
        assert measures(score.sums().tolist(), "r2")["r2"] == pytest.approx(float(r2), abs=1e-4)
        assert score.scored == hidden.sum() * channels and score.ink_scored == 0
        return
    logits = out.view(3, 7, channels, 256)
    terms = [
        F.cross_entropy(logits[b, t, c], levels[b, t, c].long()) for b, t in hidden.nonzero() for c in range(channels)
    ]
    torch.testing.assert_close(score.loss, torch.stack(terms).sum())
    ink = hidden[..., None] & (levels > 0)
    right = logits.argmax(-1) == levels
    assert (score.ink_scored, score.ink_correct) == (ink.sum(), (ink & right).sum())
    assert score.correct == (right & hidden[..., None]).sum()


def test_levels_read_as_ids_have_ink_too():
    net, batch = make(True)
    ids = torch.where(batch.first.real, torch.randint(0, 9, (3, 6)), PAD)
    ids[0, :3] = 0
    batch = batch._replace(first=batch.first._replace(inputs=ids))
    hidden = draw_mask(batch.first, (0, 1), 0.7, torch.Generator().manual_seed(3)) & batch.first.real
    assert masked_denoising(net, batch, torch.Generator().manual_seed(3), rate=0.7).ink_scored == 0
    net.ink = True
    score = masked_denoising(net, batch, torch.Generator().manual_seed(3), rate=0.7)
    right = logits_at(net, torch.where(hidden, MASK, ids), batch.first.mask).argmax(-1) == ids
    ink = hidden & (ids > 0)
    assert 0 < ink.sum() < hidden.sum()
    assert (score.ink_scored, score.ink_correct) == (ink.sum(), (ink & right).sum())


@pytest.mark.parametrize("options", [{}, {"two_inputs": True}, {"pooling": "none"}])
def test_heads_compute_in_float32(options):
    """In bf16 the network gives them its features, and logits come out that are no multiples of 2^-8 of themselves."""
    net, batch = make(True, **options)
    net.computed(Compute(precision="bf16"))
    seen = []
    for head in (net.body.head, net.denoise):
        head.register_forward_hook(lambda module, args, out: seen.extend([args[0].dtype, out.dtype]))
    if "two_inputs" in options:
        batch = batch._replace(second=batch.first)
    if "pooling" in options:
        batch = batch._replace(labels=torch.zeros(3, 6).long(), asked=2)
    logits, _ = net.classify(batch)
    net.recover(batch.first.inputs, batch.first.mask, None, torch.tensor([0, 2]))
    assert seen == [torch.float32] * 4 and not torch.equal(logits, logits.bfloat16().float())


def test_causal_levels_predict_the_next_position():
    net, batch = make_levels("l1", 1, mask_channel=False)
    score = causal_denoising(net, batch)
    x = (batch.first.inputs.float() - 100) / 50
    out = net.denoise(net.body.features(x, None))
    torch.testing.assert_close(score.mean, (out[:, :-1] - x[:, 1:]).abs().mean())


def test_masking_draws_positions_at_the_rate():
    mask = torch.rand(200, 500, generator=torch.Generator().manual_seed(9)) < 0.7
    side = Side(torch.zeros(200, 500).long(), mask)
    hidden = draw_mask(side, (0, 1), 0.15, torch.Generator().manual_seed(0))
    assert abs(hidden.float().mean() - 0.15) < 0.01
    assert not torch.equal(hidden, draw_mask(side, (0, 1), 0.15, torch.Generator().manual_seed(1)))
    half = Side(side.inputs[1::2], mask[1::2])
    assert torch.equal(draw_mask(half, (1, 2), 0.15, torch.Generator().manual_seed(0)), hidden[1::2])


def test_nothing_hidden_is_a_zero_loss_with_gradients():
    net, batch = make(True)
    score = masked_denoising(net, batch, torch.Generator(), rate=0.0)
    score.mean.backward()
    assert score.mean == 0 and score.scored == 0


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_causal_scores_the_next_real_token(mixer):
    net, batch = make(False, mixer)
    ids, mask = batch.first
    score = causal_denoising(net, batch)
    logits = logits_at(net, ids, mask)
    pairs = [(b, t) for b in range(3) for t in range(5) if mask[b, t + 1]]
    terms = [F.cross_entropy(logits[b, t], ids[b, t + 1]) for b, t in pairs]
    torch.testing.assert_close(score.loss, torch.stack(terms).sum())
    assert score.scored == len(pairs) == 5 + 0 + 3


@pytest.mark.parametrize("mixer", ["lru", "attention"])
def test_a_causal_model_cannot_see_its_target(mixer):
    net, batch = make(False, mixer)
    ids, mask = batch.first
    before = logits_at(net, ids, mask)[0, :3]
    changed = ids.clone()
    changed[0, 3:] = 2
    torch.testing.assert_close(logits_at(net, changed, mask)[0, :3], before)


def test_one_token_sequences_have_nothing_to_predict():
    net, _ = make(False)
    batch = Batch(Side(torch.tensor([[3]]), None), None, torch.tensor([0]))
    assert causal_denoising(net, batch).scored == 0


def test_r2_of_the_mean_is_zero_and_of_the_truth_one():
    y = np.random.default_rng(0).normal(2, 3, 1000)
    for guess, expected in ((y, 1.0), (np.full(1000, y.mean()), 0.0)):
        sums = [0.0, 1000, 0, 0, 0, float(((y - guess) ** 2).sum()), float(y.sum()), float((y**2).sum())]
        assert measures(sums, "r2")["r2"] == pytest.approx(expected, abs=1e-9)


def test_a_classifier_has_no_denoising_head():
    net, batch = make(True, denoise=False)
    with pytest.raises(RuntimeError, match="without a denoising head"):
        causal_denoising(net, batch)
