"""Whose a state is: a digest of a model's architecture and one of its weights."""

import ctypes
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from linrnn.models.pretrained import Pretrained
from linrnn.models.weights import unique_tensors

SAMPLES = 64  # numbers of each tensor by which writes are noticed that torch does not count
# what the weights were when they were last read: (what is noticed of them without reading all, digest)
_READ: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def fingerprint(model: nn.Module, *, fresh: bool = False) -> str:
    """Returns "architecture:weights", two digests that say whose a state is.

    The same model saved and loaded again, or on another device, has the same; a fine-tuned one has other weights, and
    so has one in another precision. A module around nothing but a model (`torch.compile`'s, or `linrnn.hf`'s) has that
    of the model. The first call reads all weights, at a gigabyte or more a second; later ones do so again if a weight
    was written to since.

    Args:
        model: a language model, or any other module.
        fresh: read the weights in any case. Without, writes that torch does not count (through `.data`, or of a fused
            optimizer) are noticed where they change one of at least 64 numbers that are looked at in every tensor: as
            each step of training does, but not each edit of a single number.

    Raises:
        TypeError: model is no module.
        ValueError: weights on the meta device, which has no numbers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    model = unwrapped(model)
    tensors = unique_tensors(model)
    meta = next((name for name, tensor in tensors.items() if tensor.is_meta), None)
    if meta is not None:
        raise ValueError(f"model: expected weights with numbers, got {meta} on the meta device")
    return f"{_architecture(model, tensors)}:{_weights(model, tensors, fresh)}"


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside modules that have nothing else."""
    while not isinstance(model, Pretrained):
        children = list(model.children())
        own = [*model.parameters(recurse=False), *model.buffers(recurse=False)]
        around = len(children) == 1 and not own and (hasattr(model, "_orig_mod") or isinstance(children[0], Pretrained))
        if not around:
            break
        model = children[0]
    return model


def differences(ours: str, theirs: str) -> list[str]:
    """Returns what two fingerprints differ in: "architecture", "weights"."""
    parts = zip(("architecture", "weights"), ours.split(":"), theirs.split(":"), strict=True)
    return [name for name, our, their in parts if our != their]


def _architecture(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    config = getattr(model, "config", None) if isinstance(model, Pretrained) else None
    if config is not None:
        # arguments that a later version brings change nothing as long as they have their defaults
        defaults = {name: p.default for name, p in inspect.signature(type(model)).parameters.items()}
        arguments = config if isinstance(config, Mapping) else vars(config)
        arguments = one_mixer(arguments)
        given = {name: value for name, value in arguments.items() if name not in defaults or value != defaults[name]}
    else:
        given = {name: [type(module).__name__, _settings(module)] for name, module in model.named_modules()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    text = json.dumps([type(model).__name__, given, shapes], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def one_mixer(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns arguments with one mixer where they have a list of one, which is the same model."""
    mixer, kwargs = arguments.get("mixer"), arguments.get("mixer_kwargs")
    if not isinstance(mixer, (list, tuple)) or len(set(mixer)) != 1:
        return arguments
    return {**arguments, "mixer": mixer[0], "mixer_kwargs": kwargs[mixer[0]] if kwargs else None}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns the public attributes of a module that are values, as its constructor set them."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and (isinstance(value, kinds) or is_dataclass(value))
    }


def _plain(value: Any) -> Any:
    """Returns what JSON can hold in place of a value that it cannot."""
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, {field.name: getattr(value, field.name) for field in fields(value)}]
    if isinstance(value, Mapping):
        return dict(value)
    return str(value) if isinstance(value, torch.dtype) else getattr(value, "__qualname__", type(value).__qualname__)


def _weights(model: nn.Module, tensors: Mapping[str, Tensor], fresh: bool) -> str:
    tracked = not any(tensor.is_inference() for tensor in tensors.values())
    places = tuple((name, t.data_ptr(), t._version, t.dtype, t.device) for name, t in tensors.items() if tracked)
    now = (places, _sample(tensors))
    before, digest = _READ.get(model, ((), ""))
    if fresh or not tracked or before != now:
        whole = hashlib.sha256()
        for name, tensor in tensors.items():
            whole.update(f"{name} {tensor.dtype} ".encode())
            update(whole, tensor)
        digest = whole.hexdigest()[:32]
        _READ[model] = now, digest
    return digest


def _sample(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of some numbers of each tensor, which are fetched from a device at once."""
    on: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        flat = tensor.detach().resolve_conj().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLES)].contiguous()
        on.setdefault(tensor.device, []).append(some.view(torch.uint8))
    digest = hashlib.sha256()
    for samples in on.values():
        update(digest, torch.cat(samples))
    return digest.hexdigest()


def update(digest: "hashlib._Hash", tensor: Tensor) -> None:
    """Adds the bytes of a tensor to a digest, without a copy where it lies on the CPU in one piece."""
    flat = tensor.detach().cpu().resolve_conj().contiguous()
    if flat.numel():
        digest.update((ctypes.c_char * (flat.numel() * flat.element_size())).from_address(flat.data_ptr()))
