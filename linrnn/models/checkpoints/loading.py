"""From the folder of a checkpoint to a language model of our layers."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from linrnn.models.checkpoints import mamba, mamba2, original, recurrent_gemma, rwkv4
from linrnn.models.checkpoints.hub import Source
from linrnn.models.checkpoints.reading import read_json, read_tensors, weight_files
from linrnn.models.checkpoints.tokenizer import TOKENIZER_FILES, read_tokenizer
from linrnn.models.files import CONFIG, INDEX
from linrnn.models.language import LanguageModel
from linrnn.models.pretrained import check_depth
from linrnn.models.weights import fill, skeleton

T = TypeVar("T")
# model_type of a config.json: the module whose `arguments` and `tensors` translate it
FAMILIES: dict[str, ModuleType] = {
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "recurrent_gemma": recurrent_gemma,
    "rwkv": rwkv4,
}
DEEP = 1000  # layers that are built in a moment


def load_pretrained(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> LanguageModel:
    """Builds the language model of an official checkpoint in transformers' format, or of one of our own.

    The weights are safetensors, in one file or several; nothing that the checkpoint holds is executed, and pickles are
    refused. The model is in eval mode; its `tokenizer` is that of the folder, None if it has none or transformers is
    not installed.

    ```python
    model = load_pretrained("state-spaces/mamba-130m-hf")
    ids = model.generate(model.tokenizer("Hello", return_tensors="pt").input_ids, 20)
    ```

    Args:
        source: a folder, or the id of a repository on the Hugging Face hub (with huggingface_hub installed).
        dtype: of the parameters; None is float32, or float64 where a file has that.
        device: of the parameters; torch's default if None.
        revision: branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: no such folder or repository, or a file of it is missing; pickles count as missing.
        ConnectionError: the hub cannot be reached and its cache does not have the files.
        ImportError: a hub id without huggingface_hub.
        ValueError: a model_type we do not have, a config we cannot honour, a damaged file, or tensors that do not fit.
    """
    place = Source(source, revision, dtype)
    folder = place.fetch([CONFIG, INDEX, *TOKENIZER_FILES])
    found = read_json(folder / CONFIG)
    family, config = find_family(found, folder / CONFIG)
    files = weight_files(folder)
    if family is None:
        dtype = dtype or common_dtype(read_tensors(place.fetch(files), files, integers=True))
        model = LanguageModel.from_pretrained(folder, dtype=dtype, device=device)
    else:
        depth = config.get("num_hidden_layers")
        if isinstance(depth, int) and depth > DEEP:
            check_depth(folder / CONFIG, "num_hidden_layers", depth, len(read_tensors(place.fetch(files), files)))
        # what a config asks for is known to be right before gigabytes are downloaded
        arguments = translated(family.arguments, config, source=folder / CONFIG)
        model = translated(build, arguments, source=folder / CONFIG)
        saved = translated(family.tensors, read_tensors(place.fetch(files), files), config, source=folder)
        if model.tie_embeddings and not tie(saved):
            warnings.warn(f"{folder}: tie_word_embeddings is true, yet lm_head differs: it is not tied", stacklevel=2)
            model = build({**arguments, "tie_embeddings": False})
        model = fill(model, saved, str(folder), dtype or common_dtype(saved), device)
    model.tokenizer = read_tokenizer(folder, official=found.get("model_type") in FAMILIES)
    return model.eval()


def find_family(config: dict[str, Any], path: Path) -> tuple[ModuleType | None, dict[str, Any]]:
    """Returns the module that knows this config, None if it is our own, and the config in transformers' words."""
    if "class" in config and config.get("model_type", "linrnn") == "linrnn":
        return None, config
    if original.is_original(config):
        try:
            config = original.to_transformers(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{path}: expected a model_type of {', '.join(map(repr, FAMILIES))}, got {model_type!r}")
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config: quantised weights are not read")
    return FAMILIES[model_type], config


def translated(translate: Callable[..., T], *arguments: Any, source: Path) -> T:
    """Calls a function; its error is a ValueError that names the file too."""
    try:
        return translate(*arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def build(arguments: Mapping[str, Any]) -> LanguageModel:
    """Builds a model without numbers."""
    return skeleton(lambda: LanguageModel(**arguments))


def tie(saved: dict[str, Tensor]) -> bool:
    """Makes one tensor of a saved embedding and a head of the same numbers, in place; returns False if they differ."""
    head, embedding = saved.get("head.weight"), saved.get("embed.weight")
    if head is not None and embedding is not None:
        same = head.shape == embedding.shape and bool(
            ((head == embedding) | (head.isnan() & embedding.isnan())).all()  # in whatever precision each was saved
        )
        if not same:
            return False
    if head is not None:
        saved["embed.weight"] = saved.pop("head.weight")
    return True


def common_dtype(saved: Mapping[str, Tensor]) -> torch.dtype:
    """Returns what holds every saved number: float32, or float64."""
    dtype = torch.float32
    for tensor in saved.values():
        dtype = torch.promote_types(dtype, tensor.dtype) if tensor.is_floating_point() else dtype
    return dtype
