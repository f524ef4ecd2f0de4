"""Checkpoints: a folder with config.json (the constructor's arguments) and model.safetensors, or several such files."""

import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from linrnn.layers.base import positive_int
from linrnn.models.config import check_flags, config_type, json_value, plain
from linrnn.models.files import CONFIG, INDEX, WEIGHTS, write_checkpoint
from linrnn.models.migrations import FORMAT, migrate
from linrnn.models.weights import fill, misfits, shorten, skeleton, unique_tensors

__all__ = ["CONFIG", "INDEX", "WEIGHTS", "Pretrained"]


class Pretrained(nn.Module):
    """A model that saves itself to a folder and is rebuilt from it; no code is stored and none is run.

    `model.config` is a frozen dataclass of the constructor's arguments, of the type `Config` that each class has:
    `type(model).from_config(dataclasses.replace(model.config, n_layers=4))` is a new model.

    A subclass sets `self.config = self.constructor_arguments(locals())` first thing in its constructor.
    """

    Config: ClassVar[Any]
    config: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.Config = config_type(cls)

    def constructor_arguments(self, values: Mapping[str, Any]) -> Any:
        """Picks the constructor's arguments from its local variables, as a `Config`.

        Returns None in the constructor of a base class, which does not know those of the subclass.

        Raises:
            ValueError: an argument that is declared as a bool is none.
        """
        names = self.Config.__dataclass_fields__
        # what `super()` needs is among the local variables of a method that calls it
        own = values.get("__class__", type(self)).__init__ is type(self).__init__
        if not own or not names.keys() <= values.keys():
            return None
        config = self.Config(**{name: plain(values[name]) for name in names})
        check_flags(config)
        return config

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Builds a model with new parameters from a `Config` of this class.

        Raises:
            TypeError: config is none.
            ValueError: arguments the constructor refuses.
        """
        if not isinstance(config, cls.Config):
            raise TypeError(f"config: expected a {cls.Config.__qualname__}, got {config!r}")
        return cls(**vars(config))

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000) -> None:
        """Writes config.json and model.safetensors to `folder` (made if missing), together or not at all.

        Weights of more than max_shard_bytes are written as several files and an index of them. What is interrupted in
        the moment when new files take the place of old ones leaves a folder that `from_pretrained` refuses.

        Raises:
            TypeError: a constructor argument cannot be written as JSON.
            ValueError: max_shard_bytes is no integer > 0; or the parameters are not those that the constructor makes
                of the arguments, as where some were replaced, untied or resized.
        """
        positive_int("max_shard_bytes", max_shard_bytes)
        text = self.describe_config()
        tensors = {name: tensor.detach().contiguous() for name, tensor in unique_tensors(self).items()}
        problems = misfits(skeleton(lambda: type(self)(**vars(self.config))), tensors, converted=True)
        if problems:
            raise ValueError(f"{type(self).__name__}: its config does not make these tensors ({shorten(problems)})")
        write_checkpoint(Path(folder), text, tensors, max_shard_bytes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a linrnn model",
        create_pr: bool = False,
        token: str | None = None,
    ) -> str:
        """Saves the model to a repository of the Hugging Face hub (made if missing) and returns the commit's address.

        A repository without a README.md gets a model card.

        Args:
            repo_id: "owner/name".
            private: whether a new repository is private; None: the owner's default.
            revision: branch (made if missing); the main branch if None.
            create_pr: propose the commit as a pull request.
            token: None: that of `hf auth login`.

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        from linrnn.models.card import upload

        return upload(
            self,
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
        )

    def describe_config(self) -> str:
        """Returns the text of config.json."""
        from linrnn import __version__

        name = type(self).__name__
        for p in inspect.signature(type(self)).parameters.values():
            if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                raise TypeError(f"{name}: expected a constructor whose arguments have names, got {p}")
        if self.config is None:
            raise TypeError(f"{name}.config: expected self.constructor_arguments(locals()), set in its constructor")
        arguments = vars(self.config)
        config = {"model_type": "linrnn", "class": name, "format": FORMAT, "version": __version__}
        try:
            return json.dumps({**config, "arguments": json_value(arguments)}, indent=2)
        except TypeError as error:
            raise TypeError(f"config: expected arguments that JSON can hold, got {arguments}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> Self:
        """Rebuilds a model that `save_pretrained` wrote, in eval mode.

        Args:
            source: the folder, or the id of a repository on the Hugging Face hub (with huggingface_hub installed).
            dtype: of the parameters; None: the one they were saved in.
            device: of the parameters; torch's default if None.
            revision: branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: no such folder or repository, or a file of it is missing; a pickle is never read.
            ConnectionError: the hub cannot be reached and its cache does not have the files.
            ImportError: a hub id without huggingface_hub.
            ValueError: a damaged file, another class, a format of a newer linrnn, arguments the constructor refuses,
                or tensors that do not fit.
        """
        from linrnn.models.checkpoints.hub import Source
        from linrnn.models.checkpoints.reading import read_json, read_tensors, weight_files

        place = Source(source, revision, dtype)
        folder = place.fetch([CONFIG, INDEX])
        config = check_config(folder / CONFIG, read_json(folder / CONFIG), cls.__name__)
        place.fetch(weight_files(folder))
        saved = read_tensors(folder, weight_files(folder), integers=True)
        if cls.__name__ == "LanguageModel" and all(name.startswith("model.") for name in saved):  # as linrnn.hf has it
            saved = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
        arguments, saved = migrate(config["format"], cls.__name__, config["arguments"], saved)
        check_depth(folder / CONFIG, "n_layers", arguments.get("n_layers"), len(saved))
        try:
            model = skeleton(lambda: cls(**arguments))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / CONFIG}: {cls.__name__} does not take these arguments ({error}); "
                f"it was written by linrnn {config.get('version', 'of unknown version')}"
            ) from error
        return fill(model, saved, str(folder), dtype, device).eval()


def check_depth(path: Path, name: str, n_layers: object, n_tensors: int) -> None:
    """Raises ValueError for more layers than tensors: to build a million would take an hour, to no end."""
    if isinstance(n_layers, int) and n_layers > n_tensors:
        raise ValueError(f"{path}: {name}: expected at most the number of tensors, {n_tensors}, got {n_layers}")


def check_config(path: Path, config: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns a config with its format, if it describes a model of the class `name` that can be read here."""
    if not isinstance(config.get("arguments"), dict) or "class" not in config:
        raise ValueError(
            f"{path}: expected class, format and arguments, as linrnn's save_pretrained writes them, got "
            f"{', '.join(config) or 'nothing'}; checkpoints of others are read by linrnn.models.load_pretrained"
        )
    config = {"format": 1, **config}
    version = config.get("version", "of unknown version")
    if type(config["format"]) is not int or config["format"] < 1:
        raise ValueError(f"{path}: format: expected an integer from 1 to {FORMAT}, got {config['format']!r}")
    if config["format"] > FORMAT:
        raise ValueError(
            f"{path}: format: expected at most {FORMAT}, got {config['format']}, written by linrnn {version}; "
            "update linrnn"
        )
    if config["class"] != name:
        raise ValueError(
            f"{path}: holds a {config['class']}; load it with {config['class']}.from_pretrained, not {name}"
        )
    return config
