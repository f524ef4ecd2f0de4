"""The models under comparison: language models with as many parameters as one with softmax attention has.

A block is a mixer of about 4 D^2 parameters and a gated feed-forward network of 8 D^2. GAU, which is both in one, has
two layers for each block and no feed-forward network.
"""

from collections.abc import Callable, Mapping
from typing import Any

from linrnn.layers.heads import count_heads
from linrnn.models import LanguageModel, count_params, match_params

VOCABULARY = 256
TOLERANCE = 0.02  # of all parameters


def plain(mixer: str, **mixer_kwargs: Any) -> Callable[[int, int], dict[str, Any]]:
    """A mixer that has about 4 D^2 parameters by itself."""
    return lambda d_model, n_layers: {"mixer": mixer, "n_layers": n_layers, "mixer_kwargs": mixer_kwargs}


def gau(d_model: int, n_layers: int) -> dict[str, Any]:
    """Two layers for each of attention and feed-forward network, their inner width by the number of parameters."""

    def arguments(d_value: int) -> dict[str, Any]:
        kwargs = {"attention": "softmax_plus", "d_value": d_value}
        return {"mixer": "gau", "n_layers": 2 * n_layers, "mixer_kwargs": kwargs, "ffn": None}

    return matched(arguments, d_model, n_layers, range(3 * d_model // 2, 5 * d_model // 2, max(2, d_model // 48)))


def gated_deltanet(d_model: int, n_layers: int) -> dict[str, Any]:
    """With convolution and output gate; the heads are narrower instead, keys as wide as values."""

    def arguments(width: int) -> dict[str, Any]:
        return {
            "mixer": "gated_deltanet",
            "n_layers": n_layers,
            "mixer_kwargs": {"d_key": width, "d_value": width},
        }

    widest = d_model // count_heads(d_model, None, d_model)
    return matched(arguments, d_model, n_layers, range(widest // 2, widest + 1, 2))


def matched(arguments: Callable[[int], dict[str, Any]], d_model: int, n_layers: int, widths: range) -> dict[str, Any]:
    """The arguments at the width that gives the number of parameters of the model with attention."""
    target = count_params(build("attention", d_model, n_layers))
    return arguments(match_params(target, lambda width: model(d_model, arguments(width)), widths, tolerance=TOLERANCE))


MIXERS: Mapping[str, Callable[[int, int], dict[str, Any]]] = {
    "attention": plain("attention"),
    "gau": gau,
    "lru": plain("lru", variant="post"),
    "slru": plain("slru"),
    "token_mix": plain("token_mix"),
    "gated_deltanet": gated_deltanet,
}
LABELS = {
    "attention": "attention",
    "gau": "GAU",
    "lru": "LRU",
    "slru": "SLRU",
    "token_mix": "RWKV token mix",
    "gated_deltanet": "gated DeltaNet",
}


def build(name: str, d_model: int, n_layers: int) -> LanguageModel:
    """Returns a new model with the mixer called `name`, of n_layers blocks (GAU: of 2 n_layers layers).

    Raises:
        ValueError: an unknown name.
    """
    if name not in MIXERS:
        raise ValueError(f"mixers: expected some of {', '.join(MIXERS)}, got {name!r}")
    return model(d_model, MIXERS[name](d_model, n_layers))


def model(d_model: int, arguments: dict[str, Any]) -> LanguageModel:
    return LanguageModel(VOCABULARY, d_model=d_model, **{"ffn_expand": 8 / 3, **arguments})
