"""How many threads can run at once here: what is left of the machine by the affinity and the quota of the process."""

import functools
import os
from pathlib import Path


@functools.cache
def usable_cpus() -> int:
    """Returns the number of CPUs that this process may keep busy, at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, quota())))


def quota(groups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns the CPUs that the control groups of this process allow on average, infinity if they say nothing."""
    try:
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:  # no Linux, or nothing to see
        return float("inf")
    limits = [float("inf")]
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root  # version 1 has a tree for each controller, 2 one for all
        group = top / path.lstrip("/")
        # a container may see the path from outside, of which it has the last part at most as its root
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                limits.append(limit(folder))
    return min(limits)


def limit(folder: Path) -> float:
    """Returns the CPUs that one control group allows."""
    try:
        if (folder / "cpu.max").is_file():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return float("inf") if allowed in ("max", "-1") else int(allowed) / int(period)
    except (OSError, ValueError):  # no limit here, or in another form
        return float("inf")
