"""linrnn.flops: against torch's counter of matrix products, the formulas of the docs, models, errors."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import linrnn
from linrnn import layers
from linrnn.layers.ema import DampedEMA
from linrnn.layers.flash import FLASH
from linrnn.layers.gau import GAU
from linrnn.layers.hgrn import HGRN
from linrnn.layers.nystrom import Nystrom
from linrnn.layers.positions import ReRoPE
from linrnn.layers.short_conv import ShortConv
from linrnn.models import LanguageModel, SequenceBackbone, SequenceClassifier

ROOT = Path(__file__).parent.parent
D, T = 16, 5


# against torch.utils.flop_counter, which counts matrix products, convolutions and SDPA, a multiplication as two FLOPs


def counted_by_torch(call: Callable[[], Any]) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        call()  # the fused kernel of a CPU is not among what it counts
    return counter.get_total_flops() // 2


ATTENTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "both ways": {"bidirectional": True},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "alibi": {"positions": "alibi"},
    "rerope up to its window": {"positions": ReRoPE(window=64)},
    "half causal": {"half_causal": True, "bidirectional": True},
    "window over all": {"window": 63, "sink": 2},
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("n", [1, 63])
def test_attention_is_what_torch_counts(name, n):
    layer = layers.build("attention", 64, **ATTENTIONS[name])
    assert linrnn.flops(layer, n) == counted_by_torch(lambda: layer(torch.randn(1, n, 64)))


@pytest.mark.parametrize("layer", [GAU, FLASH])
@pytest.mark.parametrize("n", [2, 63, 256])
def test_gated_attention_is_what_torch_counts(layer, n):
    """Up to the length of a chunk and a block, where nothing is padded; torch does not count products of one token."""
    layer = layer(32, bidirectional=True)
    assert linrnn.flops(layer, n) == counted_by_torch(lambda: layer(torch.randn(1, n, 32)))


@pytest.mark.parametrize("name", [n for n in layers.available() if n != "aaren"])
def test_projections_are_what_torch_counts(name):
    """Within modules and without: whatever matrix products and convolutions there are with a parameter as a factor."""
    layer, n = layers.build(name, D), 7
    weights = {p.data_ptr(): p for p in layer.parameters()} | {b.data_ptr(): b for b in layer.buffers()}
    seen = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal seen
            if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
                a, b = args[-2:]
                if b.untyped_storage().data_ptr() in weights:
                    seen += a.numel() * b.shape[-1]
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        layer(torch.randn(1, n, D))
    assert linrnn.flops(layer, n, part="projections") == seen


def test_two_scans_each_way():
    """Of the ring the states are split; elsewhere both directions have them all, and what they share is made once."""
    for name, per_token in {"lru": 4 * D, "slru": 2 * D, "s4d": 8 * D * D, "s5": 4 * D, "hgrn": 3 * D}.items():
        layer = layers.build(name, D, bidirectional=True)
        assert linrnn.flops(layer, T, part="recurrence") == T * per_token, name
    assert linrnn.flops(HGRN(D, complex=True, bidirectional=True), T, part="recurrence") == T * 12 * D
    exp_features = layers.build("linear_attention", D, n_heads=4, feature_map="exp", bidirectional=True)
    assert linrnn.flops(exp_features, T, part="recurrence") == T * 4 * (2 * 4 * 4 + 4)


def test_windows():
    """As many keys as the widest query sees; up to the window it is attention over everything."""
    sees_all = layers.build("attention", 64)
    for options, most in (
        ({}, 10),
        ({"sink": 3}, 13),
        ({"bidirectional": True}, 19),
        ({"half_causal": True, "bidirectional": True}, 10),
    ):
        layer = layers.build("attention", 64, window=10, **options)
        assert linrnn.flops(layer, most) == linrnn.flops(sees_all, most)
        assert linrnn.flops(layer, 1000) == 4 * 1000 * 64**2 + 2 * 1000 * most * 64


def test_aaren_projects_its_logits_and_not_its_keys():
    layer = layers.build("aaren", D)
    assert linrnn.flops(layer, 7, part="projections") == counted_by_torch(lambda: layer(torch.randn(1, 7, D)))


def test_the_features_of_taylor_are_products():
    """One for each pair of a key's numbers and each square, and the same for a query."""
    taylor, elu = (layers.build("linear_attention", D, n_heads=2, d_key=3, feature_map=m) for m in ("taylor", "elu"))
    more = linrnn.flops(taylor, 7, part="projections") - linrnn.flops(elu, 7, part="projections")
    assert more == 7 * 2 * 2 * (taylor.n_features - 1 - 3) == 7 * 2 * 2 * 6


@pytest.mark.parametrize("n", [7, 63, 100])
def test_nystrom_is_what_torch_counts(n):
    """But for the means, which are products of matrices there: the landmarks' of q and k, with all tokens."""
    layer = Nystrom(64, n_landmarks=16, n_iterations=3, conv_width=None)
    means = 2 * 64 * min(n, 16) * n
    assert linrnn.flops(layer, n) == counted_by_torch(lambda: layer(torch.randn(1, n, 64))) - means
    assert (
        linrnn.flops(Nystrom(64, n_landmarks=16, n_iterations=3, conv_width=5), n)
        == linrnn.flops(layer, n) + n * 64 * 5
    )


def test_flash_is_linear_behind_its_chunk():
    layer = FLASH(32, chunk_size=16)
    K, V = layer.d_key, layer.d_value
    assert linrnn.flops(layer, 1000, part="recurrence") == 1000 * (16 * (K + V) + 2 * K * V)
    assert linrnn.crossover(GAU(32), layer, part="recurrence") == 16 + 2 * K * V // (K + V) + 1


def symbols(layer: layers.RecurrentLayer, T: int) -> dict[str, int]:
    """The letters of the table in docs/layers.md."""
    d_head = getattr(layer, "d_head", None)
    named = {
        "D": layer.d_model,
        "N": getattr(layer, "d_state", None),
        "H": getattr(layer, "n_heads", None),
        "K": getattr(layer, "d_key", d_head),
        "V": getattr(layer, "d_value", d_head),
        "F": getattr(layer, "n_features", None),
        "E": getattr(layer, "d_inner", None),
        "L": getattr(layer, "lru_width", getattr(layer, "chunk_size", None)),
        "M": getattr(layer, "n_landmarks", None),
        "T": T,
    }
    if isinstance(layer, layers.Mamba2):
        named |= {"K": layer.d_state, "V": layer.d_inner // layer.n_heads}
    if isinstance(layer, Nystrom) and layer.conv is not None:
        named["W"] = layer.conv.shape[1]
    for module in layer.modules():
        if isinstance(module, ShortConv):
            named |= {"W": module.width, "C": module.channels}
        if isinstance(module, DampedEMA):
            named["N"] = module.d_state
    return {letter: n for letter, n in named.items() if n is not None}


@pytest.mark.parametrize("name", layers.available())
def test_the_formulas_of_the_docs(name):
    """The column "multiplications of a token", evaluated at the table's d_model = 512."""
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs" / "layers.md").read_text(), re.M)
    formula = row.split("|")[6].split(",")[0].strip()
    product = re.sub(r"(?<=[\w)²]) (?=[\w(])", " * ", formula).replace("²", "**2")
    layer, T = layers.build(name, 512), 1000
    assert linrnn.flops(layer, T, part="recurrence") == pytest.approx(T * eval(product, symbols(layer, T)), rel=1e-12)


def test_the_example_of_the_docs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "flops.md").read_text(), re.S)
    exec(compile(block, "flops.md", "exec"), {})


# models


def test_models_are_the_sum_of_their_parts():
    backbone = SequenceBackbone(["lru", "attention"], 64, 3)
    blocks = sum(linrnn.flops(block.mixer, 100) + 3 * 100 * 64 * 128 for block in backbone.blocks)
    assert linrnn.flops(backbone, 100) == blocks
    for tied in (False, True):
        model = LanguageModel(50, mixer="attention", d_model=64, n_layers=2, tie_embeddings=tied)
        assert linrnn.flops(model, 63) == counted_by_torch(lambda m=model: m(torch.zeros(1, 63, dtype=torch.int64)))


@pytest.mark.parametrize(
    "options",
    [{}, {"pooling": "cls"}, {"pooling": "none"}, {"two_inputs": True}, {"two_inputs": True, "pooling": "cls"}],
)
def test_classifiers_are_what_torch_counts(options):
    model = SequenceClassifier(10, d_input=3, mixer="attention", d_model=64, n_layers=2, **options)
    x = torch.randn(1, 63, 3)
    other = {"x2": x} if model.two_inputs else {}
    assert linrnn.flops(model, 63) == counted_by_torch(lambda: model(x, **other))


class Own(nn.Module):
    """A module of one's own, which says what it costs."""

    def multiplications(self, T: int) -> tuple[int, int]:
        return 3, 2 * T


def test_a_module_of_ones_own_counts_within_others():
    model = nn.Sequential(Own(), nn.Linear(4, 5))
    assert linrnn.flops(model, 10) == 23 + 200
    assert linrnn.flops(model, 10, part="recurrence") == 20


@pytest.mark.parametrize("name", layers.available())
def test_the_costs_of_every_layer(name):
    """Every registered layer has them; they only grow, by whole tokens at least, and wider layers cost more."""
    layer = layers.build(name, 32)
    costs = [linrnn.flops(layer, T) for T in (1, 2, 63, 1000, 10**9)]
    assert all(0 < a < b for a, b in itertools.pairwise(costs))
    assert costs[0] * 10**9 <= costs[-1] or layer.state_size is None
    assert linrnn.flops(layers.build(name, 64), 63) > costs[2]
    parts = [linrnn.flops(layer, 63, part=part) for part in ("projections", "recurrence")]
    assert sum(parts) == costs[2] and parts[1] > 0


def test_errors():
    layer = layers.build("lru", D)
    for call, message in {
        lambda: linrnn.flops(layer, 0): "T: expected an integer >= 1, got 0",
        lambda: linrnn.flops(layer, 1.5): "T: expected an integer >= 1, got 1.5",
        lambda: linrnn.flops(layer, 1, part="scan"): "part: expected 'projections', 'recurrence' or None, got 'scan'",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for unknown in (nn.LSTM(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))):
        with pytest.raises(TypeError, match=r"no count is known of LSTM; give it a method multiplications\(T\)"):
            linrnn.flops(unknown, 5)

    class Unknown(layers.RecurrentLayer):
        pass

    with pytest.raises(TypeError, match="no count is known of Unknown"):
        linrnn.flops(Unknown(4), 5)
