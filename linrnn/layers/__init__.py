"""Layers with one contract (`base.RecurrentLayer`), by name: `build("lru", d_model=64)`."""

import inspect
from typing import Any

from linrnn.layers.aaren import Aaren
from linrnn.layers.attention import Attention, AttentionState
from linrnn.layers.base import RecurrentLayer, State
from linrnn.layers.bidirectional import Bidirectional
from linrnn.layers.channel_mix import ChannelMix, ChannelMixState
from linrnn.layers.complex_rwkv import ComplexRWKV
from linrnn.layers.conv import Conv, ConvState
from linrnn.layers.delta_layer import DeltaState
from linrnn.layers.deltanet import DeltaNet
from linrnn.layers.flash import FLASH, FLASHState
from linrnn.layers.gated_deltanet import GatedDeltaNet
from linrnn.layers.gau import GAU, GAUState
from linrnn.layers.gla import GLA, GLAState
from linrnn.layers.griffin import Griffin, GriffinState
from linrnn.layers.hgrn import HGRN, HGRNState, LowerBounds
from linrnn.layers.linear_attention import LinearAttention, LinearAttentionState
from linrnn.layers.lru import LRU, LRUState
from linrnn.layers.mamba import Mamba, MambaState
from linrnn.layers.mamba2 import Mamba2, Mamba2State
from linrnn.layers.mega import Mega, MegaState
from linrnn.layers.nystrom import Nystrom
from linrnn.layers.performer import Performer
from linrnn.layers.retnet import RetNet, RetNetState
from linrnn.layers.rglru import RGLRU, RGLRUState
from linrnn.layers.rwkv4 import RWKV4, RWKV4State
from linrnn.layers.rwkv7 import RWKV7, RWKV7State
from linrnn.layers.s4d import S4D, S4DState
from linrnn.layers.s5 import S5, S5State
from linrnn.layers.slru import SLRU, SLRUState
from linrnn.layers.token_mix import TokenMix

LAYERS: dict[str, type[RecurrentLayer]] = {
    "aaren": Aaren,
    "attention": Attention,
    "complex_rwkv": ComplexRWKV,
    "conv": Conv,
    "deltanet": DeltaNet,
    "flash": FLASH,
    "gated_deltanet": GatedDeltaNet,
    "gau": GAU,
    "gla": GLA,
    "griffin": Griffin,
    "hgrn": HGRN,
    "linear_attention": LinearAttention,
    "lru": LRU,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mega": Mega,
    "nystrom": Nystrom,
    "performer": Performer,
    "retnet": RetNet,
    "rglru": RGLRU,
    "rwkv4": RWKV4,
    "rwkv7": RWKV7,
    "s4d": S4D,
    "s5": S5,
    "slru": SLRU,
    "token_mix": TokenMix,
}


def available() -> list[str]:
    """Returns the names that `build` takes."""
    return sorted(LAYERS)


def layer_class(name: str) -> type[RecurrentLayer]:
    """Returns the class of a registered layer, or raises ValueError listing the names."""
    if name not in LAYERS:
        raise ValueError(f"name: no layer is called {name!r}, expected one of {', '.join(available())}")
    return LAYERS[name]


def options(name: str) -> list[str]:
    """Returns the keyword arguments of a registered layer, without d_model."""
    return [p for p in inspect.signature(layer_class(name)).parameters if p != "d_model"]


def build(name: str, d_model: int, **kwargs: Any) -> RecurrentLayer:
    """Builds a layer by its registry name; `d_model` alone is enough if it is a multiple of 16.

    Raises:
        ValueError: an unknown name or keyword, listing what is allowed, or a value that the layer refuses.
    """
    unknown = sorted(set(kwargs) - set(options(name)))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: unknown to {name!r}, expected some of {', '.join(options(name))}")
    return layer_class(name)(d_model, **kwargs)


__all__ = [
    "FLASH",
    "GAU",
    "GLA",
    "HGRN",
    "LAYERS",
    "LRU",
    "RGLRU",
    "RWKV4",
    "RWKV7",
    "S4D",
    "S5",
    "SLRU",
    "Aaren",
    "Attention",
    "AttentionState",
    "Bidirectional",
    "ChannelMix",
    "ChannelMixState",
    "ComplexRWKV",
    "Conv",
    "ConvState",
    "DeltaNet",
    "DeltaState",
    "FLASHState",
    "GAUState",
    "GLAState",
    "GatedDeltaNet",
    "Griffin",
    "GriffinState",
    "HGRNState",
    "LRUState",
    "LinearAttention",
    "LinearAttentionState",
    "LowerBounds",
    "Mamba",
    "Mamba2",
    "Mamba2State",
    "MambaState",
    "Mega",
    "MegaState",
    "Nystrom",
    "Performer",
    "RGLRUState",
    "RWKV4State",
    "RWKV7State",
    "RecurrentLayer",
    "RetNet",
    "RetNetState",
    "S4DState",
    "S5State",
    "SLRUState",
    "State",
    "TokenMix",
    "available",
    "build",
    "layer_class",
    "options",
]
