"""The machine that a command shares with others: cores, quotas, threads that wait."""

import contextlib
import math
import os
import time
from pathlib import Path


def share_the_machine() -> None:
    """Say, before torch is loaded, how its threads wait for each other and how many there are,
    unless the user or torchrun has."""
    # threads that spin while they wait take the time of other processes, and lose their own; the
    # name is understood by GNU's OpenMP, which torch ships for Linux, and by LLVM's
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if (allowed := cores()) < affinity():  # of which OpenMP knows, but of no container's quota
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))


def work() -> tuple[float, ...]:
    """Give the time, and the seconds that all cores and that this process have worked until now;
    () on a system that does not say."""
    if not os.path.exists("/proc/stat"):
        return ()
    ticks = [int(count) for count in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # without idle and waiting for a disk
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def crowded(began: tuple, threads: int) -> str:
    """Say what other processes have kept busy since `began`, a work(), if that leaves no cores for
    so many threads; else ''."""
    if not began:
        return ""
    seconds, busy, own = (now - then for now, then in zip(work(), began, strict=True))
    there, others = os.cpu_count() or 1, (busy - own) / max(seconds, 1e-9)
    idle = there - others
    if idle > threads - 0.5:
        return ""
    fewer = f", or start again with OMP_NUM_THREADS={round(idle)}" if idle > 0.75 else ""
    return (f"other processes keep {others:.1f} of {there} cores busy, and this run's {threads} "
            f"threads share them: it gets faster when they end{fewer}")


def affinity() -> int:
    """Count the cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores(groups: str = "/proc/self/cgroup", mount: str = "/sys/fs/cgroup") -> int:
    """Count the cores that this process may use: those it may run on or, if that is less, what the
    quotas of its control groups allow (Linux, version 1 or 2)."""
    found: float = affinity()
    for line in Path(groups).read_text().splitlines() if os.path.exists(groups) else ():
        _, controllers, group = line.split(":", 2)
        if not controllers or "cpu" in controllers.split(","):
            inner = Path(mount, "cpu" if controllers else "", group.lstrip("/"))
            found = min(found, *(quota(folder) for folder in (inner, *inner.parents)))
    return max(1, int(found))


def quota(group: Path) -> float:
    """Give how many cores a control group may keep busy, infinity if it does not say."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # no bound: 'max', or no such file
            share, period = " ".join((group / name).read_text() for name in names).split()
            return int(share) / int(period) if int(share) > 0 else math.inf
    return math.inf
