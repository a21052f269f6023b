"""How many processor cores this process may keep busy."""

import os
from pathlib import Path, PurePosixPath


def free_cores(root: Path = Path("/")) -> int:
    """This process's share of the cores, at least 1: CPU affinity and cgroup quota, divided by the node's local ranks.

    Args:
        root: where /proc and /sys are.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")  # set by torchrun
    return max(1, int(min(cores, _quota(root))) // max(1, int(ranks) if ranks.isdecimal() else 1))


def _quota(root: Path) -> float:
    """The lowest quota of this process's cgroup and those above it, in cores; infinity where there is none."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return float("inf")
    quotas = [float("inf")]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # Inside a container the path may be the host's, which is not there: the container's own is the mount itself.
        parts = PurePosixPath(path).relative_to("/").parts
        for depth in range(len(parts) + 1):
            quotas.append(_quota_of(mount.joinpath(*parts[:depth])))
    return min(quotas)


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").exists():  # version 2: "quota period" or "max period"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()  # version 1: -1 for none
            period = (group / "cpu.cfs_period_us").read_text()
    except OSError:
        return float("inf")
    return float("inf") if quota in ("max", "-1") else int(quota) / int(period)
