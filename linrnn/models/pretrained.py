"""Checkpoints: a folder with config.json (the constructor's arguments) and model.safetensors."""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained(nn.Module):
    """A model that saves itself to a folder and is rebuilt from it; no code is stored and none is run.

    A subclass sets `self.config = self.constructor_arguments(locals())` first thing in its constructor.
    """

    config: dict[str, Any]

    def constructor_arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Picks the constructor's arguments from its local variables."""
        return {name: values[name] for name in inspect.signature(type(self)).parameters if name in values}

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes config.json and model.safetensors to `folder` (made if missing), each whole or not at all.

        Raises:
            TypeError: a constructor argument cannot be written as JSON.
        """
        from safetensors.torch import save

        from linrnn import __version__

        config = {"class": type(self).__name__, "version": __version__, "arguments": self.config}
        try:
            text = json.dumps(config, indent=2)
        except TypeError as error:
            raise TypeError(f"config: expected arguments that JSON can hold, got {self.config}: {error}") from error
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in unique_tensors(self).items()}
        write_whole(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, text.encode())

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Rebuilds the model of a folder that `save_pretrained` wrote, in the precision it was saved in.

        Raises:
            FileNotFoundError: the folder or one of its two files is missing.
            ValueError: a damaged file, another class, arguments the constructor refuses, or tensors that do not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: not a checkpoint folder of linrnn, {name} is missing")
        model = cls.from_config(folder / CONFIG)
        try:
            saved = load_file(folder / WEIGHTS)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS}: damaged or not a safetensors file ({error})") from error
        fill_(model, saved, str(folder / WEIGHTS))
        return model

    @classmethod
    def from_config(cls, path: Path) -> Self:
        """Builds a model with new parameters from a config.json."""
        try:
            config = json.loads(path.read_text())
            name, arguments = config["class"], dict(config["arguments"])
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected JSON with class, version and arguments ({error!r})") from error
        if name != cls.__name__:
            raise ValueError(f"{path}: holds a {name}; load it with {name}.from_pretrained, not {cls.__name__}")
        try:
            return cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: {cls.__name__} does not take these arguments ({error}); "
                f"it was written by linrnn {config.get('version', 'of unknown version')}"
            ) from error


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters and saved buffers by name, shared ones once, under their first name."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def fill_(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> None:
    """Gives the model the saved tensors, or raises ValueError naming those that do not fit."""
    own = unique_tensors(model)
    problems = [f"missing: {name}" for name in own if name not in saved]
    problems += [f"unexpected: {name}" for name in saved if name not in own]
    problems += [
        f"shape of {name}: expected {tuple(own[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in saved.items()
        if name in own and own[name].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source}: does not fit {type(model).__name__} ({shown})")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.data = saved[name]  # keeps the parameter, so shared ones stay shared, and takes the saved dtype


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
