"""From the folder of a checkpoint to a language model of our layers."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linrnn.layers.base import accumulation_dtype
from linrnn.models.checkpoints import mamba, mamba2, original, recurrent_gemma, rwkv4
from linrnn.models.checkpoints.hub import download, is_hub_id
from linrnn.models.checkpoints.reading import read_json, read_tensors, weight_files
from linrnn.models.checkpoints.tokenizer import TOKENIZER_FILES, read_tokenizer
from linrnn.models.language import LanguageModel
from linrnn.models.pretrained import CONFIG, INDEX, fill_, unique_tensors

# model_type of a config.json: the module whose `arguments` and `tensors` translate it
FAMILIES: dict[str, ModuleType] = {
    "mamba": mamba,
    "falcon_mamba": mamba,
    "mamba2": mamba2,
    "recurrent_gemma": recurrent_gemma,
    "rwkv": rwkv4,
}
PROGRESS_BYTES = 1 << 30  # what takes seconds to read


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
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating point torch.dtype or None, got {dtype!r}")
    remote = is_hub_id(source)
    if remote:
        folder = download(str(source), revision, [CONFIG, INDEX, *TOKENIZER_FILES])
    elif revision is not None:
        raise ValueError(f"revision: a folder has none, only a repository of the hub, got {revision!r}")
    else:
        folder = Path(source)
    config = read_json(folder / CONFIG)
    family, config = find_family(config, folder / CONFIG)
    # what a config asks for is known to be right before gigabytes are downloaded
    arguments = {} if family is None else translated(family.arguments, config, source=folder / CONFIG)
    model = None if family is None else skeleton(arguments, folder)
    if remote:  # at the same commit, also if the branch has moved since
        download(str(source), folder.name, weight_files(folder))
    if family is None or model is None:
        model = LanguageModel.from_pretrained(folder)
        model = model.to(device=device, dtype=dtype or accumulation_dtype(model.embed.weight.dtype))
    else:
        saved = translated(family.tensors, read_tensors(folder, weight_files(folder)), config, source=folder)
        if model.tie_embeddings and not tie(saved):
            warnings.warn(f"{folder}: tie_word_embeddings is true, yet lm_head differs: it is not tied", stacklevel=2)
            model = skeleton({**arguments, "tie_embeddings": False}, folder)
        model = fill(model, saved, folder, dtype or common_dtype(saved), device)
    model.tokenizer = read_tokenizer(folder)
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


def translated(translate: Callable[..., dict[str, Any]], *arguments: Any, source: Path) -> dict[str, Any]:
    """Calls a function of a family; its ValueError names the file too."""
    try:
        return translate(*arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def skeleton(arguments: Mapping[str, Any], folder: Path) -> LanguageModel:
    """Builds a model without numbers."""
    try:
        with torch.device("meta"):
            return LanguageModel(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error


def tie(saved: dict[str, Tensor]) -> bool:
    """Makes one tensor of a saved embedding and a head of the same numbers, in place; returns False if they differ."""
    head, embedding = saved.get("head.weight"), saved.get("embed.weight")
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        return False
    if head is not None:
        saved["embed.weight"] = saved.pop("head.weight")
    return True


def fill(
    model: LanguageModel,
    saved: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> LanguageModel:
    """Gives a skeleton the saved tensors, one after the other: no number is in memory twice."""
    fill_(model, {name: tensor.to("meta") for name, tensor in saved.items()}, str(folder))  # checks names and shapes
    model = model.to(dtype).to_empty(device=device or torch.get_default_device())
    if model.tie_embeddings:
        model.head.weight = model.embed.weight
    total, done, shown = sum(tensor.nbytes for tensor in saved.values()), 0, 0
    with torch.no_grad():
        for name, own in unique_tensors(model).items():
            own.copy_(saved[name])
            done += saved[name].nbytes
            if done - shown >= PROGRESS_BYTES:
                shown = done
                print(f"{folder}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", file=sys.stderr)
    return model


def common_dtype(saved: Mapping[str, Tensor]) -> torch.dtype:
    """Returns what holds every saved number: float32, or float64."""
    dtype = torch.float32
    for tensor in saved.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype
