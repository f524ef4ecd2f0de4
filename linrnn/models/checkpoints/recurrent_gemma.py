"""RecurrentGemma in the transformers format (Botev et al. 2024, arXiv:2404.07839; Griffin: arXiv:2402.19427).

Two recurrent blocks and one of local attention, in turn. Where theirs has other parameters than ours for the same
function, ours are made of theirs: the gain of a norm is 1 + w, and a bias b_v of the values, whose weights sum to one,
is a bias W_o b_v of the output.
"""

from collections.abc import Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype
from linrnn.models.checkpoints.fields import Fields
from linrnn.models.checkpoints.names import filters, inside, joined, renamed, take

MIXERS = {"recurrent": "griffin", "attention": "attention"}
NAMES = {
    r"model\.embed_tokens\.weight": "embed.weight",
    r"model\.final_norm\.weight": "backbone.norm.weight",
    r"model\.layers\.(\d+)\.temporal_pre_norm\.weight": r"backbone.blocks.\1.mixer_norm.weight",
    r"model\.layers\.(\d+)\.channel_pre_norm\.weight": r"backbone.blocks.\1.ffn_norm.weight",
    r"model\.layers\.(\d+)\.temporal_block\.o_proj\.(\w+)": r"backbone.blocks.\1.mixer.out.\2",
    r"model\.layers\.(\d+)\.temporal_block\.((?:linear|conv|rg)_.+)": r"backbone.blocks.\1.mixer.\2",
    r"model\.layers\.(\d+)\.mlp_block\.down_proj\.(\w+)": r"backbone.blocks.\1.ffn.out.\2",
    r"lm_head\.weight": "head.weight",
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps a config.json of model_type "recurrent_gemma" to the arguments of LanguageModel.

    Raises:
        ValueError: a field is malformed, or asks for what our layers do not have.
    """
    fields = Fields(config)
    fields.only("hidden_activation", "gelu_pytorch_tanh", "gelu_new")  # two names of one formula
    fields.only("embeddings_scale_by_sqrt_dim", True)
    d_model, n_layers = fields.integer("hidden_size", 2560), fields.integer("num_hidden_layers", 26)
    n_heads, n_kv_heads, d_head = heads(fields)
    lru_width = fields.integer("lru_width", d_model)
    if lru_width % n_heads:
        raise ValueError(f"lru_width: expected a multiple of num_attention_heads = {n_heads}, got {lru_width}")
    width = fields.integer("intermediate_size", 7680)
    if width < 2:
        raise ValueError(f"intermediate_size: expected an integer >= 2, of which half is used, got {width}")
    options: dict[str, dict[str, Any]] = {
        "griffin": {"lru_width": lru_width, "n_heads": n_heads, "conv_width": fields.integer("conv1d_width", 4)},
        "attention": {
            "n_heads": n_heads,
            "d_head": d_head,
            "n_kv_heads": n_kv_heads,
            "positions": positions(fields, d_head),
            "window": window(fields),
            "qk_bias": fields.flag("attention_bias", False),
            "out_bias": True,
            "dropout": fields.number("attention_dropout", 0.0),
        },
    }
    mixers = [MIXERS[block] for block in blocks(fields, n_layers)]
    return {
        "vocab_size": fields.integer("vocab_size", 256000),
        "mixer": mixers,
        "mixer_kwargs": {mixer: options[mixer] for mixer in sorted(set(mixers))},
        "d_model": d_model,
        "n_layers": n_layers,
        "tie_embeddings": fields.flag("tie_word_embeddings", True),
        "ffn": "geglu",
        "ffn_kwargs": {"d_hidden": width // 2, "bias": True},
        "norm": "rms",
        "norm_eps": positive(fields, "rms_norm_eps", 1e-6),
        # theirs holds this number in bfloat16, whatever the dtype of the model
        "embed_scale": torch.tensor(d_model**0.5, dtype=torch.bfloat16, device="cpu").item(),
        "logit_soft_cap": positive(fields, "logits_soft_cap", 30.0),
    }


def tensors(saved: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Maps their tensors to our names; one that we do not know keeps its own.

    Those that are computed here are at least float32, whatever theirs are.

    Raises:
        ValueError: some of the tensors that make one of ours are missing, or of wrong shapes, naming them.
    """
    fields = Fields(config)
    d_model, (n_heads, n_kv_heads, d_head) = fields.integer("hidden_size", 2560), heads(fields)
    ours = renamed(inside("model.", saved), NAMES)
    for i, block in enumerate(blocks(fields, fields.integer("num_hidden_layers", 26))):
        theirs, name = f"model.layers.{i}", f"backbone.blocks.{i}"
        for part in ("weight", "bias"):
            gate, up = (f"{theirs}.mlp_block.{projection}_proj.{part}" for projection in ("gate", "up"))
            ours[f"{name}.ffn.gate_in.{part}"] = joined(take(ours, gate, up))
        if block != "attention":
            continue
        q, k, v = (f"{theirs}.temporal_block.{projection}_proj" for projection in "qkv")
        ours[f"{name}.mixer.qkv.weight"] = joined(take(ours, f"{q}.weight", f"{k}.weight", f"{v}.weight"))
        if fields.flag("attention_bias", False):
            biases = take(ours, f"{q}.bias", f"{k}.bias", f"{v}.bias")
            for bias_name, n in zip(biases, (n_heads, n_kv_heads, n_kv_heads), strict=True):
                check_shape(bias_name, biases[bias_name], n * d_head)
            q_bias, k_bias, v_bias = biases.values()
            ours[f"{name}.mixer.qk_bias"] = torch.cat((q_bias, k_bias)).view(-1, d_head)
            values = wide(v_bias).view(n_kv_heads, 1, d_head).expand(-1, n_heads // n_kv_heads, -1).flatten()
            out = take(ours, f"{name}.mixer.out.weight", f"{name}.mixer.out.bias")
            weight, bias = out.values()
            check_shape(f"{theirs}.temporal_block.o_proj.bias", bias, d_model)
            check_shape(f"{theirs}.temporal_block.o_proj.weight", weight, d_model, len(values))
            ours |= {**out, f"{name}.mixer.out.bias": wide(bias) + wide(weight) @ values}
    for name, tensor in ours.items():
        if name.endswith("norm.weight"):
            ours[name] = 1 + wide(tensor)
        elif name.endswith("conv_1d.weight"):
            ours[name] = filters(tensor)
    return ours


def blocks(fields: Fields, n_layers: int) -> list[str]:
    """Returns the kind of each layer: the pattern of the config repeats."""
    pattern = fields.get("block_types", ["recurrent", "recurrent", "attention"])
    if not isinstance(pattern, (list, tuple)) or not pattern or not all(block in tuple(MIXERS) for block in pattern):
        raise ValueError(f"block_types: expected a list of {' and '.join(map(repr, MIXERS))}, got {pattern!r}")
    return list(islice(cycle(pattern), n_layers))


def heads(fields: Fields) -> tuple[int, int, int]:
    """Returns the numbers of heads, and of those of keys and values, and the width of one."""
    n_heads = fields.integer("num_attention_heads", 10)
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        raise ValueError(
            f"num_key_value_heads: expected a divisor of num_attention_heads = {n_heads}, got {n_kv_heads}"
        )
    return n_heads, n_kv_heads, fields.integer("head_dim", fields.integer("hidden_size", 2560) // n_heads)


def positions(fields: Fields, d_head: int) -> dict[str, Any]:
    """Returns the rotary positions: `rope_parameters`, or the fields that older configs have instead."""
    given = fields.get("rope_parameters", fields.get("rope_scaling", {}))
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters: expected an object, got {given!r}")
    rope = Fields({**fields.config, **given})
    rope.only("rope_type", "default")
    rope.only("type", "default")  # its older name
    fraction = rope.number("partial_rotary_factor", 0.5)
    turned = int(fraction * d_head)  # rounded as theirs
    if turned % 2 or not 0 < turned <= d_head:
        raise ValueError(
            f"partial_rotary_factor: expected a part of head_dim = {d_head} that is an even number of channels, "
            f"got {fraction}"
        )
    return {"kind": "rope", "base": positive(rope, "rope_theta", 10000.0), "fraction": turned / d_head}


def window(fields: Fields) -> int:
    """Returns the number of tokens that a token sees: `attention_window_size`, or transformers' other name for it."""
    names = ("attention_window_size", "sliding_window")
    given = {fields.integer(name, 1) for name in names if fields.get(name, None) is not None}
    if len(given) > 1:
        raise ValueError(f"{', '.join(names)}: expected one number, got {sorted(given)}")
    return given.pop() if given else 2048


def check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"shape of {name}: expected {shape}, got {tuple(tensor.shape)}")


def positive(fields: Fields, name: str, default: float) -> float:
    """Returns a finite number above zero, or raises ValueError."""
    value = fields.number(name, default)
    if value <= 0:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return value


def wide(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32, or float64 if it is."""
    return tensor.to(accumulation_dtype(tensor.dtype))
