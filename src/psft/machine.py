"""What this machine gives one process: processor cores, and the folder of psft's cache. Imports nothing heavy.

The cores a process may use are often fewer than the machine has: a scheduler's affinity mask, a container's quota of
processor time. More threads than that take turns, and wait for each other at the end of every product.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
"""What torchrun, accelerate, DeepSpeed and MPI tell a process they start: its number on this machine, and how many."""


def cache_folder() -> Path:
    """psft's cache: $PSFT_CACHE, else $XDG_CACHE_HOME/psft, else ~/.cache/psft. Not created here."""
    if named := os.environ.get("PSFT_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "psft"


def logical_cores() -> int:
    """Processors, hyper-threads included, that this process may keep busy: for processes that work independently."""
    return _within_quota(len(_affinity()))


def physical_cores(topology: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores that this process may keep busy: for the threads of one matrix product, which fill a core each.

    Two hyper-threads of a core count once, where `topology` (Linux) tells them apart.
    """
    cores: set[object] = set()
    for processor in _affinity():
        try:
            siblings: object = (topology / f"cpu{processor}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = processor
        cores.add(siblings)
    return _within_quota(len(cores))


def local_ranks() -> int:
    """Processes of this job on this machine; 1 where nothing has launched it."""
    for name in _LOCAL_RANKS:
        if (value := os.environ.get(name, "")).isdecimal():
            return max(int(value), 1)
    return 1


def local_rank() -> int:
    """This process's number among those of its job on this machine; 0 where nothing has launched it."""
    for name in LOCAL_RANK:
        if (value := os.environ.get(name, "")).isdecimal():
            return int(value)
    return 0


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _within_quota(cores: int) -> int:
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def cpu_quota(process: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors' worth of time that a container or service may use (cgroup v2 and v1, Linux); None: no limit.

    The strictest limit on the way from the process's group up to the root counts. Inside a container the group's own
    path may not exist, as the root it sees is the container's.
    """
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            roots, read = [mount, mount / "unified"], _quota_v2
        elif "cpu" in controllers.split(","):
            roots, read = [mount / "cpu", mount / controllers], _quota_v1
        else:
            continue
        below = Path(group.lstrip("/"))
        for folder in (root / part for root in roots for part in (below, *below.parents)):
            if (quota := read(folder)) is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_v2(folder: Path) -> float | None:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(folder: Path) -> float | None:
    try:
        quota = int((folder / "cpu.cfs_quota_us").read_text())
        return None if quota <= 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError, ZeroDivisionError):
        return None
