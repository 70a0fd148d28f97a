"""cpu | cuda | npu: which devices there are and how to use them. The only file that may import torch_npu."""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from dapo.errors import EnvironmentCheckError

if TYPE_CHECKING:
    from datetime import timedelta

    import torch

Kind = Literal["cpu", "cuda", "npu"]

BACKENDS: dict[Kind, str] = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl"}
"""Process-group backends. Small numbers are reduced on CPU: float64 sums, which HCCL has not."""


def resolve(wanted: str = "auto") -> Kind:
    """The kind of device to use on this machine.

    Args:
        wanted: `auto` (NPU, else CUDA, else CPU), or one kind that must be present.

    Raises:
        EnvironmentCheckError: the named device is not here; says what was looked for and what is here.
    """
    npu_missing = _npu_missing()
    _keep_torch_importable(npu_missing)
    present: dict[str, str] = {"npu": npu_missing, "cuda": _cuda_missing(), "cpu": ""}
    if wanted == "auto":
        wanted = next(kind for kind, missing in present.items() if not missing)
    if wanted not in present:
        raise EnvironmentCheckError(f"device={wanted!r} is not one of auto, cpu, cuda, npu")
    if present[wanted]:
        here = ", ".join(kind for kind, missing in present.items() if not missing)
        raise EnvironmentCheckError(
            f"device={wanted} is not usable: {present[wanted]}. This machine has: {here}. Set device=auto to take the "
            "best one present"
        )
    return "npu" if wanted == "npu" else "cuda" if wanted == "cuda" else "cpu"


def torch_device(kind: Kind) -> torch.device:
    """Make the first device this process sees its current one and return it; for an NPU this imports torch_npu. Ray
    shows each worker one."""
    import torch

    if kind == "npu":
        import torch_npu

        torch_npu.npu.set_device(0)
    elif kind == "cuda":
        torch.cuda.set_device(0)
    else:
        return torch.device("cpu")
    return torch.device(kind, 0)


def process_group(device: torch.device, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A group that stands beside the default one, whose collectives another library in this process may not see.

    Args:
        store: where its members meet (a `TCPStore`).
    """
    import torch.distributed as dist

    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout)
    options: Any
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    from torch_npu._C._distributed_c10d import ProcessGroupHCCL

    options = ProcessGroupHCCL.Options()
    options._timeout = timeout
    return ProcessGroupHCCL(store, rank, size, options)


def abort_process_group(device: torch.device, group: Any) -> None:
    """Leave a group of `process_group`, whatever became of its other members; what is under way in it fails."""
    if device.type == "npu":
        group.abort_hccl_comm("left by its member")  # torch_npu's; torch's `abort` is not bound there
    else:
        group.abort()


def release_cached_memory(device: torch.device) -> None:
    """Give memory that torch keeps for itself back to the device, for the engine that shares it."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def synchronize(device: torch.device) -> None:
    """Wait for the device; for timing."""
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def set_threads(count: int) -> None:
    """Threads of this process's CPU kernels. On a busy machine more threads than free cores are many times slower."""
    import torch

    torch.set_num_threads(max(1, count))


@cache
def _npu_missing() -> str:
    """Empty where an Ascend NPU is usable, else what is missing. Imports neither torch nor torch_npu.

    torch_npu without CANN makes even `import torch` fail, so the order matters: package, device nodes, driver library.
    """
    if importlib.util.find_spec("torch_npu") is None:
        return "the package torch_npu is not installed"
    if not glob.glob("/dev/davinci[0-9]*"):
        return "there is no device node /dev/davinci*"
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError as error:
        return f"libascendcl.so does not load ({error}); source CANN's set_env.sh before this process starts"
    return ""


@cache
def _cuda_missing() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "torch finds no CUDA device (torch.cuda.is_available() is False)"


def _keep_torch_importable(npu_missing: str) -> None:
    """An installed but unusable torch_npu would break `import torch` by its autoload, here and in child processes."""
    if npu_missing and importlib.util.find_spec("torch_npu") is not None:
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
