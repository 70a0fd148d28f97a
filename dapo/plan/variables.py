"""Environment variables: obsolete ones of the seed recipe, values that must fit together, preloaded libraries."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

from dapo.config.run import RunConfig
from dapo.plan.check_table import Check, fail, ok, skip, warn

# name: (what became of it, what to do)
OBSOLETE = {
    "VLLM_USE_V1": ("vLLM has no other engine any more", "remove it"),
    "USE_OPTIMIZED_MODEL": ("vllm-ascend reads it no longer since 0.14", "remove it"),
    "VLLM_ASCEND_ENABLE_PREFETCH_MLP": ("vllm-ascend has removed it", "remove it"),
    "VLLM_ASCEND_ENABLE_DENSE_OPTIMIZE": ("vllm-ascend has removed it", "remove it"),
    "VLLM_ASCEND_ENABLE_MATMUL_ALLREDUCE": ("vllm-ascend has removed it", "remove it"),
    "CUDA_DEVICE_MAX_CONNECTIONS": ("it does nothing on an NPU", "remove it"),
}
# ELF e_machine by platform.machine()
_ELF = {"x86_64": 62, "aarch64": 183}


def obsolete(env: Mapping[str, str], npu: bool) -> Check:
    """Variables of the seed recipe that do nothing today."""
    found = [
        f"{name}={env[name]}: {why}"
        for name, (why, _) in OBSOLETE.items()
        if name in env and (npu or not name.startswith("CUDA_"))
    ]
    if found:
        return warn("obsolete variables", "; ".join(found), "remove them from ray.env and from the shell")
    return ok("obsolete variables", "none of them is set")


def of_npu(env: Mapping[str, str], config: RunConfig) -> Iterable[Check]:
    """HCCL's time limits, the allocator, the weight layout, graphs against queues."""
    yield _timeouts(env)
    allocator = env.get("PYTORCH_NPU_ALLOC_CONF", "")
    if "expandable_segments:True" in allocator.replace(" ", ""):
        yield fail(
            "PYTORCH_NPU_ALLOC_CONF",
            f"{allocator}: the engine's sleep mode refuses expandable segments, and says so only when it loads",
            "remove expandable_segments from it",
        )
    else:
        yield ok("PYTORCH_NPU_ALLOC_CONF", "no expandable segments")
    layout = env.get("VLLM_ASCEND_ENABLE_NZ")
    if layout != "0":
        yield fail(
            "VLLM_ASCEND_ENABLE_NZ",
            f"{layout or 'not set'}: weights in NZ layout are overwritten wrongly, without an error, by every update",
            "set ray.env.VLLM_ASCEND_ENABLE_NZ to '0'",
        )
    else:
        yield ok("VLLM_ASCEND_ENABLE_NZ", "0: weights stay in ND layout")
    queue, blocking = env.get("TASK_QUEUE_ENABLE", "1"), env.get("ASCEND_LAUNCH_BLOCKING", "0")
    if not config.rollout.eager and (queue == "2" or blocking == "1"):
        yield fail(
            "graph mode",
            f"TASK_QUEUE_ENABLE={queue}, ASCEND_LAUNCH_BLOCKING={blocking} do not go with captured graphs",
            "set TASK_QUEUE_ENABLE=1 and ASCEND_LAUNCH_BLOCKING=0, or rollout.eager=true",
        )
    else:
        yield ok("graph mode", "eager" if config.rollout.eager else "graphs, with variables that allow them")
    yield _interfaces(env)


def _timeouts(env: Mapping[str, str]) -> Check:
    connect, execute = _number(env, "HCCL_CONNECT_TIMEOUT", 120), _number(env, "HCCL_EXEC_TIMEOUT", 1836)
    event = _number(env, "HCCL_EVENT_TIMEOUT", 1868)
    reason = f"connect {connect} s, exec {execute} s, event {event} s"
    if not 120 <= connect <= 7200:
        return fail("HCCL time limits", reason, "set HCCL_CONNECT_TIMEOUT between 120 and 7200 (seconds)")
    if env.get("HCCL_OP_EXPANSION_MODE") == "AIV" and execute > 1091:
        return warn(
            "HCCL time limits",
            f"{reason}; in AIV mode exec is cut to 1091 s: a rank that is later than that ends the run",
            "set HCCL_EXEC_TIMEOUT=1091 knowingly, or HCCL_OP_EXPANSION_MODE=AI_CPU",
        )
    if event <= execute:
        return fail("HCCL time limits", reason, "HCCL_EVENT_TIMEOUT must be larger than HCCL_EXEC_TIMEOUT")
    if connect > 1500:
        return warn(
            "HCCL time limits",
            f"{reason}: a dead node is noticed after {connect // 60} minutes",
            "HCCL_CONNECT_TIMEOUT between 600 and 1500 is enough",
        )
    return ok("HCCL time limits", reason)


def _interfaces(env: Mapping[str, str]) -> Check:
    names = {key: env[key] for key in ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME") if key in env}
    if not names:
        return ok("network interface", "chosen by HCCL and gloo themselves")
    missing = [f"{key}={name}" for key, name in names.items() if not Path("/sys/class/net", name.lstrip("=")).exists()]
    if missing:
        here = ", ".join(sorted(p.name for p in Path("/sys/class/net").iterdir()))
        return fail("network interface", f"{', '.join(missing)} is not here", f"this machine has: {here}")
    if len(set(names.values())) > 1:
        return warn("network interface", f"{names} differ", "use one interface for all of them")
    return ok("network interface", ", ".join(sorted(set(names.values()))))


def preload(config: RunConfig) -> Check:
    """Libraries of LD_PRELOAD exist and are made for this processor: a wrong one is only a line of the loader's."""
    wanted = config.ray.preload.get("LD_PRELOAD", os.environ.get("LD_PRELOAD", ""))
    libraries = [part for part in wanted.replace(":", " ").split() if part]
    if not libraries:
        return ok("LD_PRELOAD", "nothing is preloaded")
    if config.ray.address:
        return skip("LD_PRELOAD", "the workers are on a cluster; validate_environment asks them")
    for library in libraries:
        path = Path(library)
        if not path.is_file():
            return fail(
                "LD_PRELOAD",
                f"{library} does not exist",
                "apt install libjemalloc2, and take the path that "
                f"`ldconfig -p | grep jemalloc` shows (usually /usr/lib/{platform.machine()}-linux-gnu)",
            )
        head = path.read_bytes()[:20]
        machine = int.from_bytes(head[18:20], "little")
        if head[:4] != b"\x7fELF" or machine != _ELF.get(platform.machine(), machine):
            return fail("LD_PRELOAD", f"{library} is not a library for {platform.machine()}", "install the right one")
    return ok("LD_PRELOAD", ", ".join(libraries))


def mapped(config: RunConfig, pids: Iterable[int]) -> Check:
    """The preloaded libraries are mapped into running processes of the local Ray, not only named in a variable."""
    wanted = [p for p in config.ray.preload.get("LD_PRELOAD", "").replace(":", " ").split() if p]
    if not wanted:
        return ok("LD_PRELOAD of workers", "nothing is preloaded")
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text()
        except OSError:
            continue  # ended meanwhile
        missing = [library for library in wanted if str(Path(library).resolve()) not in maps]
        if missing:
            return fail(
                "LD_PRELOAD of workers",
                f"process {pid} of Ray runs without {', '.join(missing)}: it was started before the variable was set",
                "stop that Ray (`dapo run` starts its own with ray.preload), or export LD_PRELOAD before `ray start`",
            )
    return ok("LD_PRELOAD of workers", f"mapped: {', '.join(wanted)}")


def lacking(preload: Mapping[str, str]) -> list[str]:
    """What this process was started without, one phrase each: it is asked itself, its parents may differ.

    Args:
        preload: variables it must have been started with (`ray.preload`); libraries of LD_PRELOAD must be mapped.
    """
    if not preload:
        return []
    start = Path("/proc/self/environ").read_bytes().decode(errors="replace").split("\0")
    had = dict(entry.split("=", 1) for entry in start if "=" in entry)
    found = [
        f"{name}={had[name]} instead of {value}" if name in had else f"without {name}={value}"
        for name, value in preload.items()
        if had.get(name) != value
    ]
    maps = Path("/proc/self/maps").read_text()
    libraries = had.get("LD_PRELOAD", "") if "LD_PRELOAD" in preload else ""
    unmapped = [lib for lib in libraries.replace(":", " ").split() if str(Path(lib).resolve()) not in maps]
    return found + [f"{library} of LD_PRELOAD is not mapped" for library in unmapped]


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    return int(text) if text.isdigit() else default
