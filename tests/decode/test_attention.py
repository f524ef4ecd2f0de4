"""Every memory gives the logits of the KV cache; what it evaluates and holds is what the formulas say."""

from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor

from linrnn.decode import AttentionDecoder, LiveBytes, attention
from linrnn.decode._counts import count
from linrnn.layers.positions import ALiBi, Interpolation, NoPE, ReRoPE, RoPE, YaRN
from linrnn.models import LanguageModel

V, T = 13, 9
MEMORIES = [("kv", 4), ("inputs", 4), ("layerwise", 4), ("block", 4), ("block", 64), ("constant", None)]
OPTIONS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope, partial, yarn": {"positions": RoPE(fraction=0.5, scaling=YaRN(4, 4))},
    "rope, interpolated": {"positions": RoPE(scaling=Interpolation(3))},
    "rerope": {"positions": ReRoPE(3)},
    "leaky rerope": {"positions": ReRoPE(3, leak=2.0)},
    "alibi": {"positions": ALiBi()},
    "nope, keynorm": {"positions": NoPE(), "qk_norm": "key"},
    "grouped": {"n_kv_heads": 2},
    "one kv head, qk-norm, bias": {"n_kv_heads": 1, "qk_norm": "qk", "qk_bias": True},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window, sink, grouped, alibi": {"window": 3, "sink": 2, "n_kv_heads": 2, "positions": ALiBi()},
    "window, sink, cosine": {"window": 6, "sink": 1, "qk_norm": "cos"},
    "log n": {"scale": "logn"},
}


def make(n_layers: int = 2, **kwargs: Any) -> LanguageModel:
    mixer_kwargs = {"n_heads": 4} | kwargs.pop("mixer_kwargs", {})
    model = LanguageModel(
        V, mixer="attention", d_model=16, n_layers=n_layers, mixer_kwargs=mixer_kwargs, ffn_expand=1.0, **kwargs
    )
    for name, p in model.named_parameters():
        if "bias" in name or "norm" in name:
            torch.nn.init.normal_(p, 1.0, 0.3)
    return model.double().eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("memory", "block_size"), MEMORIES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_the_kv_cache(options: dict[str, Any], memory: str, block_size: int | None) -> None:
    """In one call, at every position, in pieces, and token by token; evaluations are those of the formulas."""
    model, ids = make(mixer_kwargs=options), torch.randint(V, (2, T))
    expected = model(ids)[0].detach()
    close(attention(model, ids, memory, block_size=block_size), expected[:, -1])
    close(attention(model, ids, memory, block_size=block_size, positions="all"), expected)

    decoder = AttentionDecoder(model, memory=memory, block_size=block_size)
    logits = [decoder.extend(ids[:, :5]), *(decoder.step(ids[:, t]) for t in range(5, T))]
    close(torch.stack(logits, 1), expected[:, 4:])
    counts = count(decoder.stack, memory, decoder.block_size, 5, T)
    assert (decoder.evaluations, decoder.pairs) == (counts.evaluations, counts.pairs)

    decoder = AttentionDecoder(model, memory=memory, block_size=block_size)
    pieces = [decoder.extend(piece, positions="all") for piece in ids.split([5, 1, 3], 1)]
    close(torch.cat(pieces, 1), expected)
    assert decoder.length == T


@pytest.mark.parametrize(("memory", "block_size"), MEMORIES)
@pytest.mark.parametrize("n_layers", [1, 3])
@pytest.mark.parametrize("prenorm", [True, False])
def test_depths(n_layers: int, prenorm: bool, memory: str, block_size: int | None) -> None:
    model = make(n_layers, prenorm=prenorm, norm="layer", tie_embeddings=True)
    ids, state = torch.randint(V, (1, 9)), model.init_state(1)
    for t in range(9):
        logits, state = model.step(ids[:, t], state)
    close(attention(model, ids, memory, block_size=block_size), logits.detach())


@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_evaluations_are_binomials(n_layers: int, block_size: int) -> None:
    """C(nb + k - 1, k) blocks k levels below the top, min(N, nb) live frames; all tokens read C(L + N, N + 1) ids."""
    model, ids = make(n_layers), torch.randint(V, (1, 9))
    decoder, reads = AttentionDecoder(model, memory="block", block_size=block_size), 0
    for t in range(9):
        decoder.reset_counts()
        decoder.step(ids[:, t])
        nb = -(-(t + 1) // block_size)
        assert decoder.evaluations[::-1] == tuple(comb(nb + k - 1, k) for k in range(n_layers + 1))
        assert decoder.most_frames == min(n_layers, nb)
        reads += decoder.evaluations[0]
    if block_size == 1:
        assert reads == comb(9 + n_layers, n_layers + 1)


@pytest.mark.parametrize(("memory", "block_size"), [("constant", None), ("block", 4)])
def test_live_memory_does_not_grow(memory: str, block_size: int | None) -> None:
    """All that is allocated, temporaries included, and not only the frames; token ids come on top, 8 bytes each."""
    model, peaks, frames = make(2), [], []
    lengths = (3, 7, 20) if block_size is None else (12, 20, 36)
    for length in lengths:
        ids = torch.randint(V, (1, length))
        decoder = AttentionDecoder(model, memory=memory, block_size=block_size)
        with LiveBytes() as live:
            decoder.extend(ids)
        peaks.append(live.peak - decoder.id_bytes)
        frames.append(decoder.state_bytes)
    assert peaks[0] == peaks[1] == peaks[2] and frames[0] == frames[1] == frames[2]
    # N frames of x, q, y (16 numbers each) and m, z of 4 heads
    assert frames[0] == 2 * (block_size or 1) * (3 * 16 + 2 * 4) * 8
    assert decoder.id_bytes == lengths[-1] * 8


@pytest.mark.parametrize(("memory", "numbers"), [("kv", 2 * 2 * 16), ("inputs", 2 * 16), ("layerwise", 3 * 16)])
def test_what_grows(memory: str, numbers: int) -> None:
    decoder = AttentionDecoder(make(2), memory=memory, block_size=4)
    decoder.extend(torch.randint(V, (1, 20)))
    assert decoder.state_bytes == numbers * 20 * 8 + (2 * 8 if memory == "kv" else 0)


@pytest.mark.parametrize("memory", ["inputs", "layerwise", "constant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_accumulates_in_float32(memory: str, dtype: torch.dtype) -> None:
    model, ids = make(1, mixer_kwargs={"positions": None}), torch.randint(V, (1, 300))
    expected = model.to(dtype).double()(ids)[0][:, -1]  # the same rounded weights
    logits = attention(model.to(dtype), ids, memory)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0.05)
    decoder = AttentionDecoder(model, memory=memory)
    frame = decoder.stack.open(1, model.embed(ids[:, :2]), 0)
    assert all(t.dtype == torch.float32 for t in frame.total)


def test_large_logits() -> None:
    model, ids = make(2), torch.randint(V, (1, 9))
    with torch.no_grad():
        for mixer in model.backbone.mixers:
            mixer.qkv.weight.mul_(100)  # logits of +-1e4
    expected = model(ids)[0][:, -1].detach()
    assert expected.isfinite().all()
    for memory in ("inputs", "layerwise", "constant"):
        close(attention(model, ids, memory), expected)


def test_decoding_needs_no_gradient() -> None:
    model, ids = make(1), torch.randint(V, (1, 5))
    for memory in ("kv", "inputs", "layerwise", "block", "constant"):
        assert not attention(model, ids, memory).requires_grad


def test_live_bytes() -> None:
    weight = torch.zeros(100)
    with LiveBytes() as live:
        a = weight.view(10, 10)  # not new
        assert live.now == 0
        b = a + 1
        view = b[2:]
        del a, b
        assert live.now == live.peak == 400  # the view holds it
        del view
        assert (live.now, live.peak) == (0, 400)


def test_interrupted_and_used_again() -> None:
    model, ids = make(2), torch.randint(V, (1, 6))
    decoder = AttentionDecoder(model, memory="constant")
    decoder.stack.live_frames, decoder.stack.live_frame_bytes = 1, 1000  # what an interrupt leaves behind
    decoder.extend(ids)
    assert decoder.most_frames == 2 and decoder.state_bytes == 2 * 56 * 8


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"memory": "cache"},
            ValueError,
            "memory: expected one of kv, inputs, layerwise, block, constant, got 'cache'",
        ),
        ({"block_size": 0}, ValueError, "block_size: expected an integer >= 1, got 0"),
        ({"memory": "constant", "block_size": 2}, ValueError, "block_size: .* expected None, got 2"),
        ({"positions": "first"}, ValueError, 'positions: expected "last" or "all", got \'first\''),
        (
            {"ids": torch.zeros(1, 0, dtype=torch.int64)},
            ValueError,
            r"ids: expected at least one token, got .*\(1, 0\)",
        ),
        ({"ids": torch.tensor([[V]])}, ValueError, f"ids: expected ids from 0 to {V - 1}, got {V}"),
        ({"ids": torch.zeros(1, 2)}, ValueError, r"ids: expected integer token ids, got torch\.float32"),
        ({"ids": [1]}, TypeError, "ids: expected a tensor, got list"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a LanguageModel, got Linear"),
        (
            {"model": LanguageModel(V, mixer=["attention", "lru"], d_model=16)},
            ValueError,
            "model: expected softmax attention in every layer, got LRU in layer 1; .*use model.step",
        ),
        (
            {"model": LanguageModel(V, mixer="attention", d_model=16, dropout=0.1)},
            ValueError,
            "model: expected evaluation mode, got training mode with dropout",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"model": make(1), "ids": torch.zeros(1, 3, dtype=torch.int64)} | kwargs
    with pytest.raises(error, match=message):
        attention(**given)


@pytest.mark.parametrize("memory", ["kv", "inputs", "layerwise", "constant"])
def test_a_refused_call_leaves_no_trace(memory: str) -> None:
    model, ids = make(1), torch.randint(V, (2, 6))
    decoder = AttentionDecoder(model, memory=memory)
    decoder.extend(ids[:, :3])
    with pytest.raises(ValueError, match="ids: expected 2 sequences, like the tokens before, got 1"):
        decoder.extend(ids[:1])
    with pytest.raises(ValueError, match=f"ids: expected ids from 0 to {V - 1}, got -1"):
        decoder.step(torch.tensor([1, -1]))
    close(decoder.extend(ids[:, 3:].to(torch.uint8)), model(ids)[0][:, -1].detach())


@pytest.mark.parametrize("place", ["first layer", "second layer", "later block", "head"])
@pytest.mark.parametrize(("memory", "block_size"), [(m, b) for m, b in MEMORIES if b != 64])
def test_a_failed_call_leaves_no_trace(
    memory: str, block_size: int | None, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was half done when a feed-forward network or the head failed: neither tokens nor states are kept."""
    model, ids = make(3), torch.randint(V, (2, 15))
    expected = model(ids)[0][:, -1].detach()
    module = model.head if place == "head" else model.backbone.blocks[0 if place == "first layer" else 1].ffn
    whole = module.forward
    calls = 0

    def fails(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == (2 if place == "later block" else 1):
            raise KeyboardInterrupt
        return whole(x)

    for read in (0, 6):  # nothing yet, or a page and a half
        decoder = AttentionDecoder(model, memory=memory, block_size=block_size)
        if read:
            decoder.extend(ids[:, :read])
        state_bytes, calls = decoder.state_bytes, 0
        with monkeypatch.context() as patch:
            patch.setattr(module, "forward", fails)
            with pytest.raises(KeyboardInterrupt):
                decoder.extend(torch.randint(V, (2 if read else 3, 9)))
        assert decoder.length == read and decoder.id_bytes in (0, 2 * 8 * read)
        if memory in ("kv", "inputs"):
            assert decoder.state_bytes == state_bytes
        close(decoder.extend(ids[:, read:12]), model(ids[:, :12])[0][:, -1].detach())
        close(decoder.extend(ids[:, 12:]), expected)


@pytest.mark.parametrize("memory", ["layerwise", "block", "constant"])
def test_ids_are_copied(memory: str) -> None:
    model, ids = make(1), torch.randint(V, (1, 6))
    decoder, given = AttentionDecoder(model, memory=memory), ids[:, :5].clone()
    decoder.extend(given)
    given.zero_()
    close(decoder.step(ids[:, 5]), model(ids)[0][:, -1].detach())


@pytest.mark.parametrize("where", ["model", "mixer_kwargs"])
def test_dropout_is_refused_at_every_call(where: str) -> None:
    model = make(1, **({"dropout": 0.1} if where == "model" else {"mixer_kwargs": {"dropout": 0.1}}))
    decoder, ids = AttentionDecoder(model), torch.zeros(1, 2, dtype=torch.int64)
    expected = decoder.extend(ids)
    model.train()
    for call in (lambda: decoder.extend(ids), lambda: AttentionDecoder(model)):
        with pytest.raises(ValueError, match="model: expected evaluation mode, got training mode with dropout"):
            call()
    assert decoder.length == 2
    close(AttentionDecoder(model.eval()).extend(ids), expected)


def test_bad_step() -> None:
    with pytest.raises(ValueError, match=r"ids_t: expected a tensor of shape \(batch,\)"):
        AttentionDecoder(make(1)).step(torch.zeros(1, 1, dtype=torch.int64))
