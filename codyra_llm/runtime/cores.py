"""How this process shares the cores of its machine. OpenMP reads its settings as torch is loaded."""

import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)

# How often a waiting thread of GNU's OpenMP checks for work before it sleeps. Its default is thirty times the
# first value here: where another program holds one core, all other threads then spin until the one on that
# core gets to run.
SPINS_WHERE_IDLE, SPINS_WHERE_BUSY = 10_000, 0
STAT, QUOTAS = Path("/proc/stat"), Path("/sys/fs/cgroup")


def share(seconds: float = 0.1) -> None:
    """Set, where the user or a launcher has not, how many threads OpenMP starts and how long they spin: no
    more threads than a container's quota has cores, and no spinning where other programs are running, which
    is measured for `seconds`. Spinning changes no bit of any result."""
    quota, cores = cores_of_quota(), own_cores()
    if quota and quota < len(cores) and "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(quota)
        _say("%d threads, as many as this container's quota has cores (OMP_NUM_THREADS sets it)", quota)
    alone = os.environ.get("OMP_NUM_THREADS") == "1" or len(cores) == 1
    if alone or "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:
        return
    busy = busy_cores(cores, seconds)
    os.environ["GOMP_SPINCOUNT"] = str(SPINS_WHERE_BUSY if busy else SPINS_WHERE_IDLE)
    if busy:
        _say(
            "other programs keep %d of %d cores busy, so threads sleep while they wait for each other; with "
            "OMP_NUM_THREADS a run takes fewer cores",
            busy,
            len(cores),
        )


def _say(text: str, *counts: int) -> None:
    """Log it once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        log.info(text, *counts)


def own_cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux has it
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def busy_cores(cores: list[int], seconds: float) -> int:
    """How many of `cores` are idle for less than half of the next `seconds`; 0 where the system does not
    say."""
    before = _times(cores)
    time.sleep(seconds)
    after = _times(cores)
    busy = 0
    for core in before.keys() & after.keys():
        idle, total = (now - then for now, then in zip(after[core], before[core], strict=True))
        if 2 * idle < total:
            busy += 1
    return busy


def cores_of_quota() -> int | None:
    """The number of cores, at least one, whose time this container may use; None without a limit."""
    files = ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]  # cgroups of version 2, and of 1
    for names in files:
        words = [word for name in names for word in _words(QUOTAS / name)]
        if len(words) == 2 and all(map(str.isdecimal, words)):  # else "max", or -1
            quota, period = map(int, words)
            return max(quota // period, 1)
    return None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:  # no such limit here, or no such system
        return []


def _times(cores: list[int]) -> dict[str, tuple[int, int]]:
    """By core, since the machine started: the ticks in which it was idle, and all ticks."""
    wanted = {f"cpu{core}" for core in cores}
    found = {}
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        name, *ticks = line.split()
        if name in wanted:
            counts = list(map(int, ticks[:8]))  # user nice system idle iowait irq softirq steal
            found[name] = (counts[3] + counts[4], sum(counts))
    return found
