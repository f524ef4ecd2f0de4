"""Checkpoints: a folder with config.json (the constructor's arguments) and model.safetensors, or several such files."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from linrnn.layers.base import positive_int
from linrnn.models.config import config_type, plain
from linrnn.models.migrations import FORMAT, migrate

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
WEIGHT_FILES = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


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

        Returns None where some are not there: a base class's constructor does not know those of the subclass.
        """
        names = self.Config.__dataclass_fields__
        try:
            return self.Config(**{name: plain(values[name]) for name in names if name in values})
        except TypeError:
            return None

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
        """Writes config.json and model.safetensors to `folder` (made if missing), each whole or not at all.

        Weights of more than max_shard_bytes are written as several files and an index of them.

        Raises:
            TypeError: a constructor argument cannot be written as JSON.
            ValueError: max_shard_bytes is no integer > 0.
        """
        positive_int("max_shard_bytes", max_shard_bytes)
        text = self.describe_config()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.detach().contiguous() for name, tensor in unique_tensors(self).items()}
        write_weights(folder, tensors, max_shard_bytes)
        write_whole(folder / CONFIG, text.encode())

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

        if self.config is None:
            raise TypeError(
                f"{type(self).__name__}.config: expected self.constructor_arguments(locals()), set in its constructor"
            )
        arguments = vars(self.config)
        name = type(self).__name__
        config = {"model_type": "linrnn", "class": name, "format": FORMAT, "version": __version__}
        try:
            return json.dumps({**config, "arguments": arguments}, indent=2)
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
            device: of the parameters; the CPU if None.
            revision: branch, tag or commit of the repository.

        Raises:
            FileNotFoundError: no such folder or repository, or a file of it is missing; a pickle is never read.
            ConnectionError: the hub cannot be reached and its cache does not have the files.
            ImportError: a hub id without huggingface_hub.
            ValueError: a damaged file, another class, a format of a newer linrnn, arguments the constructor refuses,
                or tensors that do not fit.
        """
        from linrnn.models.checkpoints.hub import download, is_hub_id
        from linrnn.models.checkpoints.reading import read_json, read_tensors, weight_files

        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype: expected a floating point torch.dtype or None, got {dtype!r}")
        if is_hub_id(source):
            folder = download(str(source), revision, [CONFIG, INDEX])
            download(str(source), folder.name, weight_files(folder))  # at that commit, wherever the branch is now
        elif revision is not None:
            raise ValueError(f"revision: a folder has none, only a repository of the hub, got {revision!r}")
        else:
            folder = Path(source)
        config = check_config(folder / CONFIG, read_json(folder / CONFIG), cls.__name__)
        saved = read_tensors(folder, weight_files(folder), integers=True)
        if all(name.startswith("model.") for name in saved):  # as linrnn.hf has it, which wraps the model
            saved = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
        arguments, saved = migrate(config["format"], cls.__name__, config["arguments"], saved)
        try:
            model = cls(**arguments)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / CONFIG}: {cls.__name__} does not take these arguments ({error}); "
                f"it was written by linrnn {config.get('version', 'of unknown version')}"
            ) from error
        fill_(model, saved, str(folder))
        return model.to(device=device, dtype=dtype).eval()


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
            # keeps the parameter, so shared ones stay shared, and takes the saved dtype; a copy, since what is mapped
            # from the file lies at any address, where sums round in another order, and goes when the file does
            tensor.data = saved[name].clone()


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes tensors to one safetensors file, or to several of that size and an index, in place of those there."""
    from safetensors.torch import save_file

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    n = len(shards)
    files = [WEIGHTS] if n == 1 else [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    for file, shard in zip(files, shards, strict=True):
        with replacing(folder / file) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if n > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(folder / INDEX, json.dumps(index, indent=2).encode())
        files.append(INDEX)
    for path in folder.iterdir():
        if WEIGHT_FILES.fullmatch(path.name) and path.name not in files:
            path.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name for a file, renamed to `path` at the end: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors writes files that only the owner may read
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)
