"""Mamba and Mamba-2 language models of ours in transformers' format."""

import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from linrnn.layers.base import positive_int
from linrnn.layers.mamba import Mamba
from linrnn.layers.mamba2 import Mamba2
from linrnn.models.checkpoints.names import renamed
from linrnn.models.config import json_value
from linrnn.models.files import write_checkpoint
from linrnn.models.language import LanguageModel
from linrnn.models.weights import unique_tensors

MODELS = {"mamba": "MambaForCausalLM", "falcon_mamba": "FalconMambaForCausalLM", "mamba2": "Mamba2ForCausalLM"}
NAMES = {
    r"embed\.weight": "backbone.embeddings.weight",
    r"head\.weight": "lm_head.weight",
    r"backbone\.norm\.weight": "backbone.norm_f.weight",
    r"backbone\.blocks\.(\d+)\.mixer_norm\.weight": r"backbone.layers.\1.norm.weight",
    r"backbone\.blocks\.(\d+)\.mixer\.conv\.(\w+)": r"backbone.layers.\1.mixer.conv1d.\2",
    r"backbone\.blocks\.(\d+)\.mixer\.(.+)": r"backbone.layers.\1.mixer.\2",
}


def export_transformers(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Mamba or Mamba-2 model to a folder from which transformers' AutoModelForCausalLM loads it.

    It computes the same there, dropout aside, which theirs has not: the weights are written in the model's precision,
    and those of an earlier model in the folder are removed. A tokenizer that the model carries (`model.tokenizer`) is
    written beside it, and knows the special tokens that are not given.

    Args:
        model: of blocks without a feed-forward network: `LanguageModel(..., mixer="mamba", ffn=None)`.
        folder: is made if missing.
        bos_token_id, eos_token_id, pad_token_id: for transformers' `generate`, which stops at eos_token_id.
        max_shard_bytes: larger weights are written in several files with an index.

    Raises:
        TypeError: not a LanguageModel.
        ValueError: transformers has no such model; says what of it.
    """
    if type(model) is not LanguageModel:  # a class derived from it may compute anything
        raise TypeError(f"model: expected a LanguageModel, got {type(model).__name__}")
    positive_int("max_shard_bytes", max_shard_bytes)
    config = describe(model)
    tokenizer = model.tokenizer
    given = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    for name, value in given.items():
        value = getattr(tokenizer, name, None) if value is None else value
        if value is not None and not (type(value) is int and 0 <= value < model.vocab_size):
            raise ValueError(f"{name}: expected an id from 0 to {model.vocab_size - 1} or None, got {value!r}")
        config[name] = value  # null too: transformers' own default would end every text at id 0
    folder = Path(folder)
    write_checkpoint(folder, json.dumps(config, indent=2), their_tensors(model), max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def describe(model: LanguageModel) -> dict[str, Any]:
    """Returns the config.json of a model, or raises ValueError naming what transformers has no field for."""
    blocks, mixers = list(model.backbone.blocks), model.backbone.mixers
    kinds = {type(mixer) for mixer in mixers}
    refuse("mixer", sorted(kind.__name__ for kind in kinds), kinds in ({Mamba}, {Mamba2}), "'mamba' or 'mamba2' alone")
    c = vars(model.config)
    for name, value in (("ffn", None), ("norm", "rms"), ("prenorm", True), ("embed_norm", False)):
        refuse(name, c[name], c[name] == value, repr(value))
    for name in ("embed_scale", "logit_soft_cap"):
        refuse(name, c[name], c[name] is None, "None")
    tied = model.head.weight is model.embed.weight
    refuse("tie_embeddings", model.tie_embeddings, tied == model.tie_embeddings, f"{tied}, as the head is,")
    eps = cast(nn.RMSNorm, blocks[0].mixer_norm).eps
    mixer = cast(Mamba | Mamba2, mixers[0])
    fields = mamba_fields(mixer) if isinstance(mixer, Mamba) else mamba2_fields(mixer, eps)
    return {
        "architectures": [MODELS[fields["model_type"]]],
        "vocab_size": model.vocab_size,
        "hidden_size": mixer.d_model,
        "num_hidden_layers": len(blocks),
        "layer_norm_epsilon": eps,
        "hidden_act": "silu",
        "tie_word_embeddings": model.tie_embeddings,
        "residual_in_fp32": model.embed.weight.dtype == torch.float32,  # ours is in the precision of the model
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        **fields,
    }


def mamba_fields(mixer: Mamba) -> dict[str, Any]:
    falcon = {"model_type": "falcon_mamba", "mixer_rms_eps": mixer.bcdt_norm_eps}
    return {
        **(falcon if mixer.bcdt_norm else {"model_type": "mamba"}),
        "state_size": mixer.d_state,
        "conv_kernel": mixer.conv1d.width,
        "expand": mixer.d_inner // mixer.d_model,
        "intermediate_size": mixer.d_inner,
        "time_step_rank": mixer.dt_rank,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_scale": mixer.dt_scale,
        "time_step_floor": mixer.dt_init_floor,
        "use_conv_bias": mixer.conv1d.bias is not None,
        "use_bias": mixer.in_proj.bias is not None,
    }


def mamba2_fields(mixer: Mamba2, eps: float | None) -> dict[str, Any]:
    refuse("norm_eps", mixer.norm.eps, mixer.norm.eps == eps, f"that of the blocks' norms, {eps},")
    limit = {} if mixer.dt_limit is None else {"time_step_limit": json_value(list(mixer.dt_limit))}
    return {
        "model_type": "mamba2",
        "state_size": mixer.d_state,
        "conv_kernel": mixer.conv.width,
        "expand": mixer.d_inner // mixer.d_model,
        "num_heads": mixer.n_heads,
        "head_dim": mixer.d_inner // mixer.n_heads,
        "n_groups": mixer.n_groups,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "use_conv_bias": mixer.conv.bias is not None,
        "use_bias": mixer.in_proj.bias is not None,
        **limit,
    }


def refuse(name: str, value: object, fits: bool, expected: str) -> None:
    """Raises ValueError unless the argument of the model fits."""
    if not fits:
        raise ValueError(f"{name}: transformers' Mamba models have {expected} only, got {value!r}")


def their_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """Returns the tensors by transformers' names, shared ones once."""
    theirs = renamed({name: tensor.detach().contiguous() for name, tensor in unique_tensors(model).items()}, NAMES)
    for name, tensor in theirs.items():
        if name.endswith(".conv1d.weight"):
            theirs[name] = tensor[:, None].contiguous()
        elif name.endswith(".mixer.norm.weight"):
            theirs[name] = tensor.flatten()
    return theirs
