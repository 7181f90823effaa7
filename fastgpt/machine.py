"""What this machine offers, read from the operating system alone: no torch, nothing to install."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

# The instruction sets that matter to training, by their names in /proc/cpuinfo, and what each is good for.
CPU_FEATURES = {
    "avx2": "256-bit vectors",
    "avx512f": "512-bit vectors",
    "avx512_bf16": "bf16 dot products",
    "amx_tile": "matrix tiles",
    "amx_bf16": "bf16 matrix products",
}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return (_sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else "") or platform.machine()


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that this processor has."""
    flags: set[str] = set()
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
            break
    return [name for name in CPU_FEATURES if name in flags]


def cores() -> int:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """Cores' worth of time that the container grants, or None without such a limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None


class OtherLoad:
    """How much of this machine's cores other programs use, from its creation on."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = self._now()

    def cores(self) -> float | None:
        """Cores' worth of time since then, of those that this process may use; None where the system does not tell."""
        busy, own, now = self._now()
        seconds = now - self._began
        if busy is None or self._busy is None or seconds < 0.05:  # a few of the system's clock ticks
            return None
        return max(0.0, (busy - self._busy - (own - self._own)) / seconds)

    @staticmethod
    def _now() -> tuple[float | None, float, float]:
        """Seconds that these cores have worked, that this process has, and the time."""
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        ticks = None
        for line in _read("/proc/stat").splitlines():
            name, *counts = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in usable:
                user, nice, system, _idle, _waiting, *interrupts = map(int, counts[:8])
                ticks = (ticks or 0) + user + nice + system + sum(interrupts[:2])
        busy = None if ticks is None else ticks / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:2]), time.monotonic()


SPARE_CORES = 0.5  # of other programs' use: below, the machine merely has something to do
CROWD_REMEDY = "end them, or set OMP_WAIT_POLICY=PASSIVE, or a smaller OMP_NUM_THREADS"


def crowded(threads: int, others: float | None) -> bool:
    """Whether the threads of one program have fewer cores than they need, since `others` keep some busy. OpenMP's spin
    at a barrier, so they take the time of the one that all of them wait for."""
    spins = os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE" and os.environ.get("GOMP_SPINCOUNT") != "0"
    return spins and threads > 1 and others is not None and threads + others > cores() + SPARE_CORES


def crowd(threads: int, others: float) -> str:
    """What `crowded` found, in words."""
    return (
        f"other programs keep {others:.1f} of the {cores()} cores busy, so that the {threads} threads of torch "
        f"wait for each other and steps may take many times as long"
    )


def memory() -> tuple[int, int]:
    """(total, available) bytes; a container's limit counts. Zeros where the system does not tell."""
    info = {}
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        info[name] = int(value.split()[0]) * 1024
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    if not total and sys.platform == "darwin":
        total = available = int(_sysctl("hw.memsize") or 0)
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, available = int(limit), min(available, max(0, int(limit) - int(used)))
    return total, available


def disk_free(path: str | Path = ".") -> int:
    """Free bytes where `path` is, or would be."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def nvidia_driver() -> str | None:
    """Version of the loaded NVIDIA driver, `unknown` where only its devices are seen, or None."""
    for word in _read("/proc/driver/nvidia/version").split("\n", 1)[0].split():
        if word[0].isdigit() and "." in word:
            return word
    return "unknown" if Path("/dev/nvidia0").exists() else None


def keep_freed_memory() -> bool:
    """Have the C library keep what the process frees, instead of returning it to the system; True where it does.

    A training step on a CPU frees and takes the same buffers again and again. By default glibc maps the large ones
    anew each time, and the system clears every page: a third of a small model's step. Holds for the whole process;
    only glibc (Linux) can be told, elsewhere nothing happens.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of <malloc.h>
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # some versions of glibc refuse more than half of a heap, 32 MiB
    kept = mallopt(mmap_threshold, 1 << 30) or mallopt(mmap_threshold, 32 << 20)
    return bool(mallopt(trim_threshold, 2**31 - 1)) and bool(kept)
