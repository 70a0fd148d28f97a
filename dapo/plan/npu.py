"""Ascend NPUs: devices, driver, CANN, packages, network. Nothing here imports torch_npu into this process.

An NPU's failure poisons the stream of the process it happens in, so whatever loads the driver does so in a child.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from dapo.config.run import RunConfig
from dapo.plan import variables
from dapo.plan.check_table import Check, fail, ok, skip, warn
from dapo.plan.machine import importable, installed

# The set that runs together (docs/ascend.md): versions and where they come from.
STACK = {
    "torch": "2.10.0",
    "torch-npu": "2.10.0.post4",
    "vllm": "0.23.0",
    "vllm-ascend": "0.23.0.post1",
    "transformers": "5.10.4",
    "triton-ascend": "3.2.2",
}
CANN = "9.1.0"
DRIVER = (25, 3)
_NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
_IMPORT = "import torch, torch_npu; print(torch.npu.device_count(), torch.npu.get_device_name(0))"
_HCCL_PORTS = range(60000, 60016)


def present() -> bool:
    """Whether this machine has NPU device nodes."""
    return bool(glob.glob("/dev/davinci[0-9]*"))


def checks(config: RunConfig, env: Mapping[str, str]) -> Iterable[Check]:
    """Everything about NPUs that one node can answer."""
    if config.ray.address is not None:
        yield skip("NPU", "training runs on a cluster")
        return
    if not present() and config.device != "npu":
        yield skip("NPU", "there is none here and none was asked for")
        return
    if present():
        yield _devices(config, env)
    yield _driver()
    yield _health()
    yield _cann(env)
    yield _atb(env)
    yield _stack()
    yield _loads()
    yield _ports()
    yield from variables.of_npu(env, config)
    yield _links()


def _devices(config: RunConfig, env: Mapping[str, str]) -> Check:
    found = glob.glob("/dev/davinci[0-9]*")
    missing = [node for node in _NODES if not Path(node).exists()]
    if missing:
        return fail("NPU devices", f"{', '.join(missing)} missing", "docker run --device " + " --device ".join(missing))
    visible = env.get("ASCEND_RT_VISIBLE_DEVICES")
    count = len(visible.split(",")) if visible else len(found)
    need = config.devices
    reason = f"{count} NPUs{f' (ASCEND_RT_VISIBLE_DEVICES={visible})' if visible else ''}, {need} needed"
    if count < need:
        return fail(
            "NPU devices", reason, f"model.parallel.world_size={count}, or ray.address of a cluster with {need} devices"
        )
    return ok("NPU devices", reason)


def _driver() -> Check:
    path = Path("/usr/local/Ascend/driver/version.info")
    try:
        text = path.read_text()
    except OSError:
        return fail(
            "NPU driver", f"{path} is not readable", "install the HDK driver, or mount /usr/local/Ascend/driver"
        )
    found = re.search(r"[Vv]ersion=(\d+)\.(\d+)(\S*)", text)
    if found is None:
        return warn("NPU driver", f"no version in {path}", "compare `npu-smi info -t board -i 0` with docs/ascend.md")
    version = f"{found[1]}.{found[2]}{found[3]}"
    if (int(found[1]), int(found[2])) < DRIVER:
        return warn(
            "NPU driver", f"{version} is older than 25.3.rc1", "upgrade the HDK, else weights go by shared memory"
        )
    return ok("NPU driver", version)


def _health() -> Check:
    if shutil.which("npu-smi") is None:
        return fail("NPU health", "npu-smi is not on PATH", "mount it into the container, or fix PATH")
    code, text = _run(["npu-smi", "info"], 30)
    if code:
        return fail("NPU health", f"npu-smi info ended with code {code}: {text[-200:]}", "check the driver, as root")
    states = re.findall(r"^\|\s*(\d+)\s+\S+\s*\|\s*(\w+)\s*\|", text, re.M)
    sick = [f"NPU {number} is {state}" for number, state in states if state != "OK"]
    if sick:
        return fail("NPU health", ", ".join(sick), "`npu-smi info -t health -i N` says why; take it out or reset it")
    owners = re.findall(r"^\|\s*\d+\s+\d+\s*\|\s*(\d+)\s*\|\s*(\S+)\s*\|", text, re.M)
    if owners:
        jobs = ", ".join(f"{name} (pid {pid})" for pid, name in owners[:4])
        return warn("NPU health", f"in use by {jobs}", "wait for them or end them: the engine wants the memory")
    return ok("NPU health", f"{len(states)} NPUs are OK")


def _cann(env: Mapping[str, str]) -> Check:
    remedy = "source /usr/local/Ascend/ascend-toolkit/set_env.sh before Ray and before Python starts"
    home, opp = env.get("ASCEND_HOME_PATH"), env.get("ASCEND_OPP_PATH")
    if not home or not opp:
        return fail("CANN", "ASCEND_HOME_PATH and ASCEND_OPP_PATH are not set", remedy)
    missing = [name for name in ("runtime", "compiler") if not Path(home, name).is_dir()]
    if missing:
        return fail("CANN", f"{home} has no {' and no '.join(missing)}", remedy)
    infos = [*Path(home).glob("*/ascend_toolkit_install.info"), *Path(home).glob("ascend_toolkit_install.info")]
    found = re.search(r"version=(\S+)", infos[0].read_text()) if infos else None
    if found is None:
        return warn("CANN", f"the version of {home} is not known", f"it should be {CANN}")
    if found[1] != CANN:
        return warn("CANN", f"version {found[1]}", f"torch-npu {STACK['torch-npu']} goes with {CANN}")
    return ok("CANN", found[1])


def _atb(env: Mapping[str, str]) -> Check:
    places = [*env.get("LD_LIBRARY_PATH", "").split(":"), f"{env.get('ATB_HOME_PATH', '')}/lib"]
    if any(Path(place, "libatb.so").exists() for place in places if place.strip("/")):
        return ok("ATB", "libatb.so is there")
    return fail("ATB", "libatb.so is not on LD_LIBRARY_PATH", "source /usr/local/Ascend/nnal/atb/set_env.sh")


def _stack() -> Check:
    have = {name: installed(name) for name in STACK}
    wrong = [
        f"{name} {have[name] or 'is missing'} (wanted {version})"
        for name, version in STACK.items()
        if (have[name] or "").partition("+")[0] != version
    ]
    if installed("triton") and installed("triton-ascend"):
        wrong.append("triton lies beside triton-ascend and hides it")
    if wrong:
        return fail("NPU packages", "; ".join(wrong), "docs/ascend.md has the commands, in the order that works")
    return ok("NPU packages", ", ".join(f"{name} {version}" for name, version in have.items()))


def _loads() -> Check:
    if not importable("torch_npu"):
        return fail("torch_npu", "is not installed", "pip install '.[npu]' (docs/ascend.md)")
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError as error:
        return fail("torch_npu", f"libascendcl.so does not load ({error})", "source CANN's set_env.sh first")
    code, text = _run([sys.executable, "-c", _IMPORT], 180, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    if code:
        return fail(
            "torch_npu", f"does not import: {text[-300:]}", "torch, torch-npu, driver and CANN must fit together"
        )
    count, _, name = text.strip().splitlines()[-1].partition(" ")
    if "910_93" not in name:
        return warn("torch_npu", f"{count} x {name}", "configs/geo3k.yaml is made for Atlas 800T A3 (Ascend910_93xx)")
    return ok("torch_npu", f"{count} x {name}")


def _ports() -> Check:
    taken = []
    for port in _HCCL_PORTS:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                taken.append(str(port))
    if taken:
        return fail(
            "HCCL ports",
            f"taken: {', '.join(taken)}",
            "end who has them (`ss -ltnp`) and reserve them: sysctl net.ipv4.ip_local_reserved_ports=60000-60015",
        )
    reserved = Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text()
    if "60000" not in reserved:
        return warn("HCCL ports", "free, but not reserved", "sysctl net.ipv4.ip_local_reserved_ports=60000-60015")
    return ok("HCCL ports", "free and reserved")


def _links() -> Check:
    """Device network: inside a node too, devices of different boards communicate over it."""
    tool = shutil.which("hccn_tool") or "/usr/local/Ascend/driver/tools/hccn_tool"
    if not os.access(tool, os.X_OK):
        return skip("NPU network", f"{tool} is not here (it runs on the host, as root)")
    down = []
    for index in range(len(glob.glob("/dev/davinci[0-9]*"))):
        for question, good in (("-link", "UP"), ("-net_health", "Success")):
            code, text = _run([tool, "-i", str(index), question, "-g"], 10)
            if code or good.lower() not in text.lower():
                down.append(f"device {index} {question[1:]}: {text.strip()[-60:]}")
    if down:
        return fail("NPU network", "; ".join(down[:4]), "check cables, switch and /etc/hccn.conf of those devices")
    return ok("NPU network", "all links are up")


def _run(command: list[str], limit_s: float, **env: str) -> tuple[int, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env={**os.environ, **env})
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return done.returncode, done.stdout + done.stderr
