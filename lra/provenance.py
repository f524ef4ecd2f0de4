"""Where a result comes from: versions, commit, machine."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@cache
def provenance() -> dict[str, Any]:
    """Versions of what computes, the commit of the source (null when installed from a wheel), threads, machine."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("linrnn", "torch", "lightning", "datasets", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # imported from a source tree that is not installed
            versions[name] = "unknown"
    return {
        "versions": versions,
        "commit": commit(Path(__file__)),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def commit(source: Path) -> str | None:
    """The git commit that `source` is tracked in, with `+` if tracked files differ from it; None without one."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", str(source.parent), *args], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
