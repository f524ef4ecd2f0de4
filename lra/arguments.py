"""What a person types on the command line, rewritten into what jsonargparse takes."""

import json
from typing import Any

from lra.presets import PLACES

TAKES_PRESETS = ("data", "run", "sweep", "params")
LISTS = ("--mixers", "--regimes", "--shares", "--scales", "--seeds", "--lrs")
# What a subcommand takes of a file that describes a whole run.
SECTIONS = {
    "data": ("task", "cache_dir", "data_dir"),
    "params": ("task", "model"),
    "sweep": ("task", "model", "optim", "budget", "compute", "objective", *PLACES),
}


def prepare(argv: list[str]) -> list[list[str]]:
    """Rewrites the words of a command; those of a sweep over several tasks once per task.

    `lra run listops lru --config my.yaml --dry-run --seeds 0,1` becomes one merged `--config` (so that flags override
    files wherever they stand), `--dry_run=true` and `--seeds=[0,1]`.

    Raises:
        ValueError: an unknown preset, or a file that is none.
    """
    if not argv or argv[0].startswith("-"):
        return [argv]
    command = argv[0]
    names, flags = split(command, argv[1:])
    if not names:
        return [[command, *flags]]
    from lra.presets import read, read_sweep

    options: dict[str, Any] = {}
    if command == "sweep":
        options, configs = read_sweep(names)
    else:
        configs = [read([name for name, _ in names])]
    given = [f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in options.items()]
    kept = SECTIONS.get(command)
    lines = []
    for config in configs:
        config = {k: v for k, v in config.items() if kept is None or k in kept}
        lines.append([command, f"--config={json.dumps(config)}", *given, *flags])
    return lines


def split(command: str, words: list[str]) -> tuple[list[tuple[str, bool]], list[str]]:
    """Returns the files of a command, in order, and its flags as `--name=value`.

    Of each file it says whether one that names a task adds this task to a sweep (else it is merged into every task).
    """
    names: list[tuple[str, bool]] = []
    flags: list[str] = []
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            if word.startswith("-") or command not in (*TAKES_PRESETS, "report"):
                flags.append(word)
            elif command != "report":
                names.append((word, True))
            elif any(f.startswith("--runs_dir=") for f in flags):
                raise ValueError(f"report takes one folder, searched at any depth; got a second one, {word!r}")
            else:
                flags.append(f"--runs_dir={word}")
            continue
        flag, given, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        if flag in ("--help", "--print_config"):
            flags.append(word)
            continue
        if not given:
            value = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        if flag == "--config":
            names.append((value, False))
            continue
        flags.append(f"{flag}=[{value}]" if flag in LISTS and not value.startswith("[") else f"{flag}={value}")
        if flag == "--preset" and command == "sweep":
            names.append((value, True))
    return names, flags
