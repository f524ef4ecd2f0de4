"""States in files: one safetensors file each, whose metadata say how the tensors go together and whose they are.

Nothing in such a file is executed: NamedTuples are found by name among the known types of states.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linrnn.decode.fingerprint import differences, fingerprint, update
from linrnn.decode.state_types import known, map_leaves
from linrnn.layers.base import RecurrentLayer, State
from linrnn.models.files import unreadable, write_whole
from linrnn.models.language import LanguageModel

FORMAT = "linrnn.state"
# 1: structure, model and digest in the metadata; complex tensors as pairs of real ones
VERSION = 1


def save(state: State, file: str | os.PathLike[str], *, model: nn.Module | None = None) -> None:
    """Writes a state to one safetensors file, whole or not at all.

    Args:
        state: of any layer, backbone or language model, on any device.
        file: its path; a file that is there is replaced.
        model: whose state it is. Its `fingerprint` goes along, so that `load` can refuse the state of another one.

    Raises:
        ValueError: the state does not fit the model.
        TypeError: the state is none of the model's, or something in it is no tensor, tuple, list, dict with strings as
            keys, or None; or it is a NamedTuple of an unknown type (`register` makes one known).
    """
    from safetensors.torch import save as to_bytes

    from linrnn import __version__
    from linrnn.decode.state import batch_size

    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_describe(state, "state", tensors))
    metadata = {"format": FORMAT, "version": str(VERSION), "linrnn": __version__, "structure": structure}
    if model is not None:
        if state is not None and isinstance(model, (LanguageModel, RecurrentLayer)):
            model.check_state(state, batch_size(state))
        metadata["model"] = fingerprint(model, fresh=True)
    metadata["digest"] = _digest(tensors, metadata)
    write_whole(Path(file), to_bytes(tensors, metadata=metadata))


def load(
    file: str | os.PathLike[str], *, model: nn.Module | None = None, device: torch.device | str | None = None
) -> State:
    """Reads a state that `save` wrote.

    Args:
        file: its path.
        model: the model that is to go on with it, which has to be the one that it was saved with.
        device: where its tensors go; if None the model's device, or else the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file of a state, a damaged one, one of a newer format, or the state of another model: the message
            says whether the architecture differs or the weights alone do.
    """
    path = Path(file)
    tensors, metadata = _read(path)
    if model is not None:
        _check_model(path, metadata.get("model"), model)
        device = next(model.parameters()).device if device is None else device
    try:
        state = _build(json.loads(metadata["structure"]), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a state that this version of linrnn knows ({error})") from error
    if tensors:
        raise ValueError(f"{path}: holds tensors that are in no state, {', '.join(sorted(tensors))}")
    return state if device is None else map_leaves(lambda leaf: leaf.to(device), state)


def _describe(state: State, place: str, tensors: dict[str, Tensor]) -> Any:
    """Returns the structure of a state as JSON has it, and adds its tensors, on the CPU, under the names it uses."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        leaf = state.detach().resolve_conj().cpu()
        leaf = torch.view_as_real(leaf) if leaf.is_complex() else leaf  # safetensors knows no complex128
        name = place.removeprefix("state").lstrip(".") or "state"
        while name in tensors:  # keys of dicts may hold dots
            name += "_"
        tensors[name] = leaf.clone(memory_format=torch.contiguous_format)  # no two may share memory
        return {"complex" if state.is_complex() else "tensor": name}
    if isinstance(state, dict):
        wrong = [key for key in state if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"{place}: expected strings as keys of a dict, got {wrong[0]!r}")
        return {"dict": {key: _describe(part, f"{place}.{key}", tensors) for key, part in state.items()}}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        name = type(state).__name__
        if known().get(name) is not type(state):
            raise TypeError(
                f"{place}: expected a state of a layer of linrnn, got {name}; `state.register` takes others"
            )
        parts = {k: _describe(part, f"{place}.{k}", tensors) for k, part in zip(state._fields, state, strict=True)}
        return {"type": name, "fields": parts}
    if type(state) in (tuple, list):
        return {type(state).__name__: [_describe(part, f"{place}.{i}", tensors) for i, part in enumerate(state)]}
    raise TypeError(f"{place}: expected tensors in tuples, lists or dicts, got {type(state).__name__}")


def _build(structure: Any, tensors: dict[str, Tensor]) -> State:
    """Returns the state of a structure, and takes its tensors out of `tensors`."""
    if structure is None:
        return None
    if not isinstance(structure, dict):
        raise ValueError(f"structure: expected an object, got {structure!r}")
    match structure:
        case {"type": str(name), "fields": dict(fields), **rest} if not rest:
            if name not in known():
                raise ValueError(f"a state of type {name}, which is unknown here")
            return known()[name](**{field: _build(part, tensors) for field, part in fields.items()})
        case {"tensor": str(name), **rest} if not rest:
            return tensors.pop(name)
        case {"complex": str(name), **rest} if not rest:
            return torch.view_as_complex(tensors.pop(name))
        case {"dict": dict(parts), **rest} if not rest:
            return {key: _build(part, tensors) for key, part in parts.items()}
        case {"tuple": list(parts), **rest} if not rest:
            return tuple(_build(part, tensors) for part in parts)
        case {"list": list(parts), **rest} if not rest:
            return [_build(part, tensors) for part in parts]
    raise ValueError(f"structure: expected a tensor, tuple, list, dict or type, got {list(structure)}")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and metadata of a file of a state that is whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            # safetensors maps the file into memory: copies live on when it is replaced
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}
    except SafetensorError as error:
        raise ValueError(unreadable(path, error)) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a state that `linrnn.decode.state.save` wrote, got another safetensors file"
        )
    version = metadata.get("version", "")
    if not version.isdecimal() or not 1 <= int(version) <= VERSION:
        raise ValueError(
            f"{path}: expected format 1 to {VERSION} of states, got {version!r}, written by linrnn "
            f"{metadata.get('linrnn')}; upgrade linrnn if that is newer"
        )
    if _digest(tensors, metadata) != metadata.get("digest"):
        raise ValueError(f"{path}: damaged, its tensors are not those that were saved")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Returns a digest of everything else in the file: safetensors itself has none."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != "digest"}, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        update(digest, tensor)
    return digest.hexdigest()


def _check_model(path: Path, saved: str | None, model: nn.Module) -> None:
    """Raises ValueError unless the state was saved with this model."""
    if saved is None:
        raise ValueError(f"{path}: saved without a model, whose state it is cannot be told; load it without one")
    different = differences(fingerprint(model, fresh=True), saved)
    if "architecture" in different:
        raise ValueError(f"{path}: the state of another model than this {type(model).__name__}: architectures differ")
    if different:
        raise ValueError(
            f"{path}: the state of a model like this {type(model).__name__} with other weights or in another "
            "precision; it means nothing to these"
        )
