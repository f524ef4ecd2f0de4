"""Mamba-2 (arXiv:2405.21060) as transformers saves it, in our layers.

Δ is computed in float32 and clamped in every mode; transformers' own torch code forgets the clamp in single steps.
`chunk_size` and fields that say how parameters start have no effect on what is computed. `norm_before_gate` is passed
over as transformers does: the norm comes after the gate.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from linrnn.layers.time_step import check_dt_limit
from linrnn.models.checkpoints.fields import Fields
from linrnn.models.checkpoints.mamba import common_arguments, language_names
from linrnn.models.checkpoints.names import filters

NO_LIMIT = (0.0, float("inf"))


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps a config.json of model_type "mamba2" to the arguments of LanguageModel.

    Raises:
        ValueError: a field is malformed, or asks for what our layer does not have.
    """
    fields = Fields(config)
    d_model, expand = fields.integer("hidden_size", 4096), fields.integer("expand", 2)
    n_heads, d_head = fields.integer("num_heads", 128), fields.integer("head_dim", 64)
    if n_heads * d_head != expand * d_model:
        raise ValueError(
            f"num_heads, head_dim: expected a product of expand * hidden_size = {expand * d_model}, "
            f"got {n_heads} * {d_head} = {n_heads * d_head}"
        )
    try:
        dt_limit = check_dt_limit(fields.get("time_step_limit", NO_LIMIT))
    except ValueError as error:
        raise ValueError(f"time_step_limit: {error}") from error
    eps = fields.number("layer_norm_epsilon", 1e-5)
    mixer_kwargs = {
        "d_state": fields.integer("state_size", 128),
        "d_conv": fields.integer("conv_kernel", 4),
        "expand": expand,
        "d_head": d_head,
        "n_groups": fields.integer("n_groups", 8),
        **fields.start(dt_min=("time_step_min", 1e-3), dt_max=("time_step_max", 0.1)),
        "dt_limit": None if dt_limit == NO_LIMIT else list(dt_limit),
        "conv_bias": fields.flag("use_conv_bias", True),
        "bias": fields.flag("use_bias", False),
        "norm_eps": eps,
    }
    return {"mixer": "mamba2", "mixer_kwargs": mixer_kwargs, **common_arguments(fields, d_model, 32768, False, 64)}


def tensors(saved: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Maps their tensors to our names; one that we do not know keeps its own."""
    n_groups = arguments(config)["mixer_kwargs"]["n_groups"]
    ours = {}
    for name, tensor in language_names(saved).items():
        name = name.replace(".mixer.conv1d.", ".mixer.conv.")
        if name.endswith(".mixer.conv.weight"):
            tensor = filters(tensor)
        elif name.endswith(".mixer.norm.weight") and tensor.ndim == 1 and len(tensor) % n_groups == 0:
            tensor = tensor.view(n_groups, -1)
        ours[name] = tensor
    return ours
