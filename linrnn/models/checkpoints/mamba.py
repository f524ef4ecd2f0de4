"""Mamba (arXiv:2312.00752) and FalconMamba (arXiv:2410.05355) as transformers saves them, in our layers.

Fields that say how parameters start or which code computes have no effect on saved weights, and are passed over.
`residual_in_fp32` is what a float32 model does anyway.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from linrnn.models.checkpoints.fields import Fields
from linrnn.models.checkpoints.names import filters, inside, renamed

NAMES = {
    r"backbone\.layers\.(\d+)\.norm\.(\w+)": r"backbone.blocks.\1.mixer_norm.\2",
    r"backbone\.layers\.(\d+)\.mixer\.(.+)": r"backbone.blocks.\1.mixer.\2",
    r"backbone\.norm_f\.(\w+)": r"backbone.norm.\1",
    r"backbone\.embeddings?\.weight": "embed.weight",
    r"lm_head\.weight": "head.weight",
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps a config.json of model_type "mamba" or "falcon_mamba" to the arguments of LanguageModel.

    Raises:
        ValueError: a field is malformed, or asks for what our layer does not have.
    """
    fields = Fields(config)
    d_model = fields.integer("hidden_size", 768)
    d_inner = fields.get("intermediate_size", None)  # where it is given, `expand` says nothing
    d_inner = int(fields.number("expand", 2) * d_model) if d_inner is None else fields.integer("intermediate_size", 0)
    if d_inner < 1 or d_inner % d_model:
        raise ValueError(f"intermediate_size: expected a multiple of hidden_size = {d_model}, got {d_inner}")
    automatic = fields.get("time_step_rank", "auto") == "auto"
    bcdt_norm = fields.get("model_type", "mamba") == "falcon_mamba"
    mixer_kwargs = {
        "d_state": fields.integer("state_size", 16),
        "d_conv": fields.integer("conv_kernel", 4),
        "expand": d_inner // d_model,
        "dt_rank": None if automatic else fields.integer("time_step_rank", 0),
        **fields.start(
            dt_min=("time_step_min", 1e-3),
            dt_max=("time_step_max", 0.1),
            dt_scale=("time_step_scale", 1.0),
            dt_init_floor=("time_step_floor", 1e-4),
        ),
        "conv_bias": fields.flag("use_conv_bias", True),
        "bias": fields.flag("use_bias", False),
        "bcdt_norm": bcdt_norm,
    }
    if bcdt_norm:
        mixer_kwargs["bcdt_norm_eps"] = fields.number("mixer_rms_eps", 1e-6)
    return {"mixer": "mamba", "mixer_kwargs": mixer_kwargs, **common_arguments(fields, d_model, 50280, True)}


def common_arguments(fields: Fields, d_model: int, vocab_size: int, tied: bool, n_layers: int = 32) -> dict[str, Any]:
    """Returns what Mamba and Mamba-2 name alike, given transformers' defaults."""
    fields.only("hidden_act", "silu", "swish")
    fields.flag("residual_in_fp32", True)
    return {
        "vocab_size": fields.integer("vocab_size", vocab_size),
        "d_model": d_model,
        "n_layers": fields.integer("num_hidden_layers", n_layers),
        "tie_embeddings": fields.flag("tie_word_embeddings", tied),
        "ffn": None,
        "norm": "rms",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
    }


def tensors(saved: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Maps their tensors to our names; one that we do not know keeps its own."""
    ours = language_names(saved)
    return {name: filters(t) if name.endswith(".conv1d.weight") else t for name, t in ours.items()}


def language_names(saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the tensors of a language model, or of its backbone alone, our names."""
    return renamed(inside("backbone.", saved), NAMES)
