"""What stands in the folder of a checkpoint: its config.json and its safetensors, in one file or several.

Nothing in it is executed: pickles are refused, and code that the config names is passed over.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from linrnn.models.files import INDEX, WEIGHTS, unreadable

SPECIAL_FLOATS = {"Infinity": float("inf"), "-Infinity": float("-inf"), "NaN": float("nan")}


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object; numbers that JSON lacks may be written {"__float__": "Infinity"}, as transformers does.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no JSON, or no object.
    """

    def special(value: dict[str, Any]) -> Any:
        tag = value.get("__float__") if len(value) == 1 else None
        return SPECIAL_FLOATS[tag] if isinstance(tag, str) and tag in SPECIAL_FLOATS else value

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: not the folder of a checkpoint, {path.name} is missing")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=special)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged or not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the files that hold the weights: one, or those of the index.

    Raises:
        ValueError: the index is malformed, or names a pickle or a file outside the folder.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [WEIGHTS]
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: expected an object weight_map that says in which file each tensor is")
    files = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    for name in files:
        if "/" in name or "\\" in name or not name.endswith(".safetensors") or name.startswith("."):
            raise ValueError(f"{path}: expected names of safetensors files in the same folder, got {name!r}")
    return files


def read_tensors(folder: Path, files: Sequence[str], *, integers: bool = False) -> dict[str, Tensor]:
    """Maps the tensors of the files into memory: they are read from the disk when they are used.

    Integers are refused unless `integers`: in a checkpoint of others they are quantised weights.

    Raises:
        FileNotFoundError: a file is missing; or there are only pickles, which are not read.
        ValueError: a file is damaged, two have the same tensor, or the index promises one that is not there.
    """
    from safetensors import SafetensorError, safe_open

    saved: dict[str, Tensor] = {}
    for file in files:
        path = folder / file
        if not path.is_file():
            raise FileNotFoundError(missing(folder, file))
        try:
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():
                    if name in saved:
                        raise ValueError(f"{path}: {name} stands in another file of this checkpoint too")
                    saved[name] = opened.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(unreadable(path, error)) from error
    if list(files) != [WEIGHTS]:
        absent = sorted(set(read_json(folder / INDEX)["weight_map"]) - set(saved))
        if absent:
            raise ValueError(f"{folder / INDEX}: promises {', '.join(absent[:8])}, which no file has")
    for name, tensor in () if integers else saved.items():
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"{folder}: {name} is {tensor.dtype}; quantised weights are not read")
    return saved


def missing(folder: Path, file: str) -> str:
    """Says that weights are missing, and what to do if they are pickles."""
    if file != WEIGHTS:
        return f"{folder}: {file} is missing, a part of the weights that {INDEX} names"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f"only {', '.join(pickles[:3])}: " if pickles else "if it has only pytorch_model.bin: "
    return (
        f"{folder}: neither {WEIGHTS} nor {INDEX} is there; {found}loading a pickle may run any code, so it is not "
        "read. If you trust its source, convert it once with transformers: "
        "AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)"
    )
