"""The config.json of the mamba_ssm package (state-spaces/mamba-130m): its fields in transformers' words.

Its tensors have transformers' names, but for the embedding's.
"""

from collections.abc import Mapping
from typing import Any

from linrnn.models.checkpoints.fields import Fields

# how filters and parameters start and which kernel runs: nothing that saved weights depend on
WITHOUT_EFFECT = {"dt_init", "conv_init", "A_init_range", "use_fast_path", "use_mem_eff_path", "chunk_size"}
SHARED = {
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "expand": "expand",
    "dt_min": "time_step_min",
    "dt_max": "time_step_max",
    "dt_init_floor": "time_step_floor",
    "bias": "use_bias",
    "conv_bias": "use_conv_bias",
}
MAMBA = {**SHARED, "dt_rank": "time_step_rank", "dt_scale": "time_step_scale"}
MAMBA2 = {**SHARED, "headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit"}


def is_original(config: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is one of mamba_ssm's."""
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def to_transformers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps mamba_ssm's config to transformers'.

    Raises:
        ValueError: attention layers, feed-forward networks, or an option of the mixer that transformers' have not.
    """
    fields = Fields(config)
    fields.only("rms_norm", True)
    fields.only("d_intermediate", 0)
    fields.only("attn_layer_idx", [])
    given = fields.get("ssm_cfg", {})
    if not isinstance(given, dict):
        raise ValueError(f"ssm_cfg: expected an object, got {given!r}")
    options = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    layer = options.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ValueError(f"ssm_cfg.layer: expected 'Mamba1' or 'Mamba2', got {layer!r}")
    multiple = fields.integer("pad_vocab_size_multiple", 8)
    common = {
        "vocab_size": -(-fields.integer("vocab_size", 50277) // multiple) * multiple,
        "hidden_size": fields.integer("d_model", 2560),
        "num_hidden_layers": fields.integer("n_layer", 64),
        "residual_in_fp32": fields.flag("residual_in_fp32", True),
        "tie_word_embeddings": fields.flag("tie_embeddings", True),
    }
    if layer == "Mamba1":
        return {"model_type": "mamba", **common, **options_of_transformers(options, MAMBA)}
    mixer = Fields(options)
    for name, value in (("rmsnorm", True), ("norm_before_gate", False), ("D_has_hdim", False), ("d_ssm", None)):
        mixer.only(name, value)
        options.pop(name, None)
    # what differs between the defaults of the two packages
    defaults = {"state_size": 128, "head_dim": 64, "n_groups": 1, "expand": 2}
    translated = {"model_type": "mamba2", **common, **defaults, **options_of_transformers(options, MAMBA2)}
    d_inner = translated["hidden_size"] * Fields(translated).integer("expand", 2)
    return {**translated, "num_heads": d_inner // Fields(translated).integer("head_dim", 64)}


def options_of_transformers(options: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Maps the options of a mixer to transformers' names, or raises ValueError naming those that it has not."""
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise ValueError(f"ssm_cfg: expected some of {', '.join(sorted({*names, *WITHOUT_EFFECT}))}, got {unknown}")
    return {names[name]: value for name, value in options.items()}
