"""YAML files, by path or by the name of a preset in `configs/`, merged in order."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

# Keys of a file, as `lra run --print_config` writes it, that say where to compute and not what.
PLACES = ("runs_dir", "cache_dir", "accelerator", "threads")


def configs_dir() -> Path:
    """The folder of presets: `lra/configs` in an installed package, `configs` beside it in a source tree."""
    installed = Path(str(files("lra"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def presets() -> dict[str, Path]:
    """Name (file name without `.yaml`) to file."""
    return {path.stem: path for path in sorted(configs_dir().rglob("*.yaml"))}


def find(name: str) -> Path:
    """The file that `name` means: a path, or a preset.

    Raises:
        ValueError: neither; the presets are listed.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name)
        if path.is_file():
            return path
        raise ValueError(f"no configuration file {name!r}")
    known = presets()
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(known)}, or the path of a .yaml file")
    return known[name]


def read(names: list[str]) -> dict[str, Any]:
    """Reads files or presets and merges them, later ones over earlier ones, mapping by mapping.

    A task of another name replaces the earlier task whole: its options would mean nothing there.

    Raises:
        ValueError: unknown name, a file that is not a YAML mapping, or an unknown key, with the allowed ones.
    """
    from lra.config import cell_from_dict

    merged: dict[str, Any] = {}
    for name in names:
        path = find(name)
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold a mapping of keys; got {type(config).__name__}")
        try:
            cell = {key: value for key, value in config.items() if key not in PLACES}
            cell_from_dict({**cell, "task": config.get("task", {"name": "listops"})})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        if "task" in config and config["task"].get("name") != merged.get("task", {}).get("name"):
            merged.pop("task", None)
        merged = merge(merged, config)
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, recursively where both hold mappings."""
    both = {k: merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}
