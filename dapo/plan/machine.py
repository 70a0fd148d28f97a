"""What this machine is: cores, memory, disks, limits, packages. Packages are inspected without importing them."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from dapo.config.run import RunConfig
from dapo.plan.check_table import Check, fail, ok, skip, warn

GIB = 2**30

# The API floor, and what the CPU stack is tested with up to (exclusive).
PYTHON = ((3, 11), (3, 13))
FLOOR = {
    "torch": "2.10",
    "transformers": "5.10.4",
    "ray": "2.60",
    "prefect": "3.7.7",
    "mlflow": "3.17",
    "datasets": "5.2",
    "pyarrow": "20",
}
CEILING = {
    "prefect": ("3.8", "3.8 needs a fastapi that vLLM refuses"),
    "fastapi": ("0.137", "vLLM and Prefect 3.7.7 refuse it"),
    "ray": ("3", "untested"),
    "mlflow": ("4", "untested"),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How large a model is, in bytes on disk (bfloat16 or as its files are)."""

    parameters: float
    weights: float

    @property
    def checkpoint(self) -> float:
        """float32 master weights and two AdamW moments, and the Hugging Face folder beside them."""
        return 12 * self.parameters + self.weights


def size_by_name(config: RunConfig) -> Size | None:
    """Model size by its name on the hub (`...-30B-A3B-...`); None where the name does not."""
    source = config.model.source
    if source.kind == "tiny":
        return Size(1e6, 4e6)
    found = re.search(
        r"(?<![A-Za-z0-9])(\d+(?:\.\d+)?)B(?![A-Za-z])", source.repo if source.kind == "hub" else source.path
    )
    return None if found is None else Size(1e9 * float(found[1]), 2e9 * float(found[1]))


def size(count: float) -> str:
    """Bytes, human-readable: `1.5 GiB`, `2 MiB`."""
    return f"{count / GIB:.1f} GiB" if count >= 0.1 * GIB else f"{count / 2**20:.0f} MiB"


def python() -> Check:
    here = sys.version_info[:2]
    reason = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if not PYTHON[0] <= here < PYTHON[1]:
        return fail(
            "python", reason, "install Python 3.11 or 3.12 and make the environment anew (`make clean install`)"
        )
    if platform.system() != "Linux":
        return fail("python", reason, "run on Linux (processes are found through /proc)")
    return ok("python", reason)


def packages() -> Check:
    """Installed versions against the floor and the known conflicts."""
    wrong, have = [], []
    for name, floor in FLOOR.items():
        version = installed(name)
        if version is None:
            wrong.append(f"{name} is missing")
            continue
        have.append(f"{name} {version}")
        if _number(version) < _number(floor):
            wrong.append(f"{name} {version} is older than {floor}")
    for name, (ceiling, why) in CEILING.items():
        version = installed(name)
        if version is not None and _number(version) >= _number(ceiling):
            wrong.append(f"{name} {version} is not below {ceiling} ({why})")
    if wrong:
        return fail("packages", "; ".join(wrong), "`make install` puts the tested versions into .venv")
    return ok("packages", ", ".join(have))


def memory(need: float, what: str) -> Check:
    """Available memory, cgroup limit included, against an estimate in bytes."""
    limit = memory_limit()
    reason = f"{size(limit)} available, about {size(need)} needed ({what})"
    if need > limit:
        return fail("memory", reason, "close other programs, use a larger machine, or a smaller model or batch")
    return ok("memory", reason)


def memory_limit() -> float:
    """Bytes a new process may take: available memory, or what is left of the cgroup's limit."""
    meminfo = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M))
    available = 1024.0 * int(meminfo.get("MemAvailable", "0"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, float(limit) - used)


def cores() -> Check:
    """Cores this process may use, quota of its cgroup included."""
    usable = float(len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            usable = min(usable, int(quota) / int(period))
    except (OSError, ValueError):
        pass
    if usable < 2:
        return warn("cores", f"{usable:.1f} usable", "training works on one core, at less than half the speed")
    return ok("cores", f"{usable:.0f} usable")


def disk(name: str, folder: Path, need: float, what: str) -> Check:
    """Free space of the file system `folder` lies (or will lie) on.

    Args:
        need: bytes.
        what: what they are for.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK):
        return fail(name, f"{place} is not writable", "choose another folder (run_root, data.cache_dir) or its owner")
    free = shutil.disk_usage(place).free
    reason = f"{size(free)} free at {place}, about {size(need)} needed ({what})"
    if free < need:
        return fail(name, reason, "free some space, or set run_root / data.cache_dir to a larger disk")
    return ok(name, reason)


def shared_memory(need: float) -> Check:
    """/dev/shm holds Ray's object store and the buffers between trainer and engine."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return warn("/dev/shm", "does not exist", "Ray falls back to slow files; mount a tmpfs there")
    free = shutil.disk_usage(place).free
    reason = f"{size(free)} free, about {size(need)} needed"
    if free < need:
        return fail(
            "/dev/shm",
            reason,
            "start the container with a larger --shm-size, or remount: "
            f"mount -o remount,size={max(1, round(need / GIB))}G /dev/shm",
        )
    return ok("/dev/shm", reason)


def limits(accelerated: bool) -> Check:
    """Open files and locked memory."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    need = 32768 if accelerated else 1024
    if files != resource.RLIM_INFINITY and files < need:
        return warn("limits", f"{files} open files, {need} wanted", f"ulimit -n {need} before Ray starts")
    if accelerated and locked != resource.RLIM_INFINITY:
        return warn("limits", "locked memory is limited", "ulimit -l unlimited (pinned host buffers need it)")
    return ok("limits", f"{'any number of' if files == resource.RLIM_INFINITY else files} open files")


def tuning(accelerated: bool) -> Check:
    """Kernel settings that cost speed, for machines with accelerators only."""
    if not accelerated:
        return skip("kernel settings", "no accelerator is used")
    wanted = {
        "/proc/sys/kernel/numa_balancing": ("0", "sysctl kernel.numa_balancing=0"),
        "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": (
            "performance",
            "cpupower frequency-set -g performance",
        ),
    }
    remedies = []
    for path, (value, remedy) in wanted.items():
        try:
            found = Path(path).read_text().strip()
        except OSError:
            continue
        if found != value:
            remedies.append(f"{remedy} (it is {found})")
    if remedies:
        return warn("kernel settings", "slower than they could be", "; ".join(remedies))
    return ok("kernel settings", "as they should be")


def installed(package: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def importable(module: str) -> bool:
    """Whether a module is there, without importing it."""
    return importlib.util.find_spec(module) is not None


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
