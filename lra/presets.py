"""YAML files, by path or by the name of a preset in `configs/`, merged in order; and the sweeps they describe."""

import difflib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

# Keys of a file, as `lra run --print_config` writes it, that say where to compute and not what.
PLACES = ("runs_dir", "cache_dir", "data_dir", "accelerator", "devices", "nodes", "threads")
# What the `sweep` section of a file in configs/sweep may hold: the presets it starts from, and options of `lra sweep`.
SWEEP = tuple("presets mixers regimes shares scales seeds lrs match jobs minutes choose choose_share".split())


def configs_dir() -> Path:
    """The folder of presets: `lra/configs` in an installed package, `configs` beside it in a source tree."""
    installed = Path(str(files("lra"))) / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def presets(folder: str = "") -> dict[str, Path]:
    """Name (file name without `.yaml`) to file, of all presets or of those in one folder of `configs/`."""
    return {path.stem: path for path in sorted((configs_dir() / folder).rglob("*.yaml"))}


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
        near = difflib.get_close_matches(name, known, n=3) or ["see `lra tasks`"]
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(near)}, or the path of a .yaml file")
    return known[name]


def load(name: str) -> dict[str, Any]:
    """One file or preset, its keys and values checked.

    Raises:
        ValueError: unknown name, a file that is not a YAML mapping, an unknown key, with the allowed ones, or a bad
            value.
    """
    import yaml

    from lra.config import cell_from_dict

    path = find(name)
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping of keys; got {type(config).__name__}")
    try:
        _check_sweep(config.get("sweep"))
        cell = {key: value for key, value in config.items() if key not in (*PLACES, "sweep")}
        cell_from_dict({**cell, "task": config.get("task", {"name": "listops"})})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _check_sweep(section: Any) -> None:
    if section is None:
        return
    if not isinstance(section, dict):
        raise ValueError(f"sweep must be a mapping of keys; got {section!r}")
    for key in section:
        if key not in SWEEP:
            raise ValueError(f"unknown key 'sweep.{key}'; allowed: {', '.join(f'sweep.{k}' for k in SWEEP)}")
    named = section.get("presets", [])
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"sweep.presets must be a list of presets; got {named!r}")


def read(names: Sequence[str]) -> dict[str, Any]:
    """Reads files or presets and merges them, later ones over earlier ones, mapping by mapping.

    A task of another name replaces the earlier task whole: its options would mean nothing there.

    Raises:
        ValueError: a bad file, as `load` says, or a preset of a whole sweep.
    """
    configs = [load(name) for name in names]
    for name, config in zip(names, configs, strict=True):
        if "sweep" in config:
            raise ValueError(f"{name!r} is a sweep of several runs: lra sweep {name}")
    return merge_all(configs)


def read_sweep(names: Sequence[tuple[str, bool]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a sweep's files mean: the options of `lra sweep` that they set, and one merged configuration per task.

    Args:
        names: files or presets in order; True beside those that multiply if they name a task, False beside those that
            are merged into every task. A file with a `sweep` section stands for the presets it lists, then itself.
    """
    options, configs = _expand(names)
    tasks = [config for config, multiplies in configs if multiplies and "task" in config]
    if not tasks:
        return options, [merge_all([config for config, _ in configs])]
    # Every task stands where the first one stood, so that what comes after it overrides them all.
    place = next(i for i, (config, multiplies) in enumerate(configs) if multiplies and "task" in config)
    before = [config for config, _ in configs[:place]]
    after = [config for config, multiplies in configs[place:] if not (multiplies and "task" in config)]
    return options, [merge_all([*before, task, *after]) for task in tasks]


def _expand(names: Sequence[tuple[str, bool]]) -> tuple[dict[str, Any], list[tuple[dict[str, Any], bool]]]:
    """Options and files, with those that a file with a `sweep` section lists in front of it."""
    options: dict[str, Any] = {}
    configs: list[tuple[dict[str, Any], bool]] = []
    for name, multiplies in names:
        config = load(name)
        section = config.pop("sweep", None)
        if section is not None:
            listed = [load(preset) for preset in section.get("presets", [])]
            if any("sweep" in one for one in listed):
                raise ValueError(f"{name!r}: sweep.presets lists another sweep")
            options |= {key: value for key, value in section.items() if key != "presets"}
            configs += [(one, True) for one in listed]
        configs.append((config, multiplies and section is None))
    return options, configs


def merge_all(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Merges configurations in order; a task of another name replaces the earlier task whole."""
    merged: dict[str, Any] = {}
    for config in configs:
        if "task" in config and config["task"].get("name") != merged.get("task", {}).get("name"):
            merged.pop("task", None)
        merged = merge(merged, config)
    return merged


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, recursively where both hold mappings."""
    both = {k: merge(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}
