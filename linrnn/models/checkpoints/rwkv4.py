"""RWKV-4 in the transformers format (model_type "rwkv"; Peng et al. 2023, arXiv:2305.13048).

`rescale_every` is passed over: in evaluation, transformers halves the residual stream every so many layers and divides
weights to match, against overflow in float16. But for the eps of the norms behind, which counts four times as much each
time, that changes nothing. `context_length` limits their CUDA kernel alone.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from linrnn.models.checkpoints.fields import Fields
from linrnn.models.checkpoints.names import inside, renamed

EPS = 1e-5

NAMES = {
    r"rwkv\.embeddings\.weight": "embed.weight",
    r"rwkv\.blocks\.0\.pre_ln\.(\w+)": r"embed_norm.\1",
    r"rwkv\.blocks\.(\d+)\.ln1\.(\w+)": r"backbone.blocks.\1.mixer_norm.\2",
    r"rwkv\.blocks\.(\d+)\.ln2\.(\w+)": r"backbone.blocks.\1.ffn_norm.\2",
    r"rwkv\.blocks\.(\d+)\.attention\.(.+)": r"backbone.blocks.\1.mixer.\2",
    r"rwkv\.blocks\.(\d+)\.feed_forward\.(.+)": r"backbone.blocks.\1.ffn.\2",
    r"rwkv\.ln_out\.(\w+)": r"backbone.norm.\1",
}


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Maps a config.json of model_type "rwkv" to the arguments of LanguageModel.

    Raises:
        ValueError: a field is malformed, or asks for what our layers do not have.
    """
    fields = Fields(config)
    fields.only("layer_norm_epsilon", EPS)  # theirs has it in the final norm whatever stands here
    d_model = fields.integer("hidden_size", 4096)
    return {
        "vocab_size": fields.integer("vocab_size", 50277),
        "mixer": "rwkv4",
        "mixer_kwargs": {"d_state": fields.integer("attention_hidden_size", d_model)},
        "d_model": d_model,
        "n_layers": fields.integer("num_hidden_layers", 32),
        "tie_embeddings": fields.flag("tie_word_embeddings", False),
        "ffn": "channel_mix",
        "ffn_kwargs": {"d_hidden": fields.integer("intermediate_size", 4 * d_model)},
        "norm": "layer",
        "norm_eps": EPS,
        "embed_norm": True,
    }


def tensors(saved: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Maps their tensors to our names; one that we do not know keeps its own."""
    ours = renamed(inside("rwkv.", saved), NAMES)
    return {name: tensor.reshape(-1) if ".time_mix_" in name else tensor for name, tensor in ours.items()}
