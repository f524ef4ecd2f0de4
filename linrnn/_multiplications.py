"""The multiplications of each module, by what they are for: the rules behind `linrnn.flops`, which says what counts."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from linrnn._recurrences import Length, recurrence, unknown, weights
from linrnn.layers import Aaren, Bidirectional, Conv, Griffin, LowerBounds, RecurrentLayer
from linrnn.layers.channel_mix import ChannelMix
from linrnn.layers.ema import DampedEMA
from linrnn.layers.heads import HeadNorm
from linrnn.layers.relative_bias import RotaryBias, SimpleBias
from linrnn.layers.short_conv import QKVConv, ShortConv
from linrnn.models import LanguageModel, SequenceBackbone, SequenceClassifier
from linrnn.models.block import Block
from linrnn.models.ffn import GatedFFN


@dataclass(frozen=True)
class Multiplications:
    """Multiplications of a number of tokens, by what they are for."""

    projections: int = 0
    recurrence: int = 0

    def __add__(self, other: "Multiplications") -> "Multiplications":
        return Multiplications(self.projections + other.projections, self.recurrence + other.recurrence)

    def of(self, part: str | None) -> int:
        return self.projections + self.recurrence if part is None else getattr(self, part)


def count(module: nn.Module, T: Length) -> Multiplications:
    """Returns the multiplications of a module with all that is in it."""
    own = getattr(module, "multiplications", None)
    return _count(module, T) if own is None else Multiplications(*own(int(T)))


def together(modules: Iterable[nn.Module], T: Length) -> Multiplications:
    return sum((count(module, T) for module in modules), Multiplications())


@functools.singledispatch
def _count(module: object, T: Length) -> Multiplications:
    raise unknown(module)


@_count.register
def _(module: nn.Linear, T: Length) -> Multiplications:
    return Multiplications(projections=T * module.weight.numel())


@_count.register
def _(module: ShortConv, T: Length) -> Multiplications:
    return Multiplications(recurrence=T * module.weight.numel())


@_count.register
def _(module: DampedEMA, T: Length) -> Multiplications:
    return Multiplications(recurrence=T * 3 * module.alpha.numel())  # α β x, (1 - α δ) h, η h


def _nothing(module: nn.Module, T: Length) -> Multiplications:
    return Multiplications()


def _all_within(module: nn.Module, T: Length) -> Multiplications:
    # children() would pass over what stands in a Sequential twice
    return together((part for part in module._modules.values() if part is not None), T)


ONE_BY_ONE: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Embedding, nn.RMSNorm, nn.LayerNorm, HeadNorm, LowerBounds, RotaryBias, SimpleBias),
    *(nn.GELU, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.GLU),
)
CONTAINERS: tuple[type[nn.Module], ...] = (
    *(nn.Sequential, nn.ModuleList, QKVConv, Conv, Griffin, Bidirectional),
    *(Block, GatedFFN, ChannelMix, SequenceBackbone, LanguageModel),
)
for _type in ONE_BY_ONE:
    _count.register(_type, _nothing)
for _type in CONTAINERS:
    _count.register(_type, _all_within)


@_count.register
def _(model: SequenceClassifier, T: Length) -> Multiplications:
    embedding, backbone = count(model.embed, T), count(model.backbone, T.plus(0 if model.cls is None else 1))
    inputs = [embedding, backbone] * (2 if model.two_inputs else 1)
    return sum(inputs, count(model.head, T if model.pooling == "none" else Length(1)))


@_count.register
def _(layer: RecurrentLayer, T: Length) -> Multiplications:
    within = together(layer.children(), T)
    return within + Multiplications(T * weights(layer), recurrence(layer, T))


@_count.register
def _(layer: Aaren, T: Length) -> Multiplications:
    H, V = layer.n_heads, layer.d_head
    logits = T * H * layer.d_model  # q W_k is made once; its product with q is not one of a token's
    sums = T * H * (2 * V + 1)  # y and z in units of the running maximum, e^{l - m} v
    return together((layer.value, layer.out), T) + Multiplications(logits, sums)
