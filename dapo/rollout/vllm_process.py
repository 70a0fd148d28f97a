"""Starting vLLM inside a process that also trains: what it changes there is put back, what dead engines left goes."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dapo import torchvision_cpu
from dapo.errors import ConfigError
from dapo.rollout.ipc import SHARED_MEMORY, WEIGHTS_FILE

log = logging.getLogger(__name__)


def start_vllm(arguments: dict[str, Any], *, platform: str, separate_process: bool) -> Any:
    """A `vllm.LLM`, leaving this process as it was.

    Args:
        platform: cpu, cuda or npu; random numbers of the device are kept, too.

    Raises:
        ConfigError: vLLM cannot be imported, or refuses the arguments or the machine.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if separate_process else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torchvision_cpu.install()
    remove_stale_shared_memory()
    try:
        with process_state_kept(platform):
            from vllm import LLM

            return LLM(**arguments)
    except ImportError as error:
        raise ConfigError(f"rollout.engine=vllm, but vLLM cannot be imported: {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"vLLM refuses to start on {arguments['model']}: {error}") from error


def stop_vllm(llm: Any, *, owns_process_group: bool) -> None:
    """End an engine. Its parallel groups go; the default process group only where vLLM made it."""
    with nullcontext() if owns_process_group else _default_group_kept():
        llm.llm_engine.engine_core.shutdown()
    from vllm.distributed import parallel_state

    groups: Any = parallel_state
    groups.destroy_model_parallel()
    if owns_process_group and torch.distributed.is_initialized():
        groups.destroy_distributed_environment()
    gc.collect()


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """vLLM's shutdown in a process (0.23 to 0.32) destroys the default process group, whoever made it."""
    distributed: Any = torch.distributed
    destroy = distributed.destroy_process_group

    def destroy_a_named_one(group: Any = None) -> None:
        if group is not None:
            destroy(group)

    distributed.destroy_process_group = destroy_a_named_one
    try:
        yield
    finally:
        distributed.destroy_process_group = destroy


@contextmanager
def process_state_kept(platform: str) -> Iterator[None]:
    """vLLM treats the process as its own; the trainer in it needs these as they were."""
    variables = ("LD_PRELOAD", "LOCAL_WORLD_SIZE", "TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS")
    environment = {name: os.environ.get(name) for name in variables}
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    accelerator: Any = None if platform == "cpu" else getattr(torch, platform)
    of_device = None if accelerator is None else accelerator.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads = set_threads  # vLLM's CPU worker replaces it by a no-op
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        if accelerator is not None:
            accelerator.set_rng_state(of_device)
        random.setstate(states[1])
        np.random.set_state(states[2])
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def remove_stale_shared_memory(folder: Path = SHARED_MEMORY) -> list[Path]:
    """Remove what killed engines left: a new tensor-parallel engine on CPU takes the same name and would fail.

    Returns:
        what was removed. Files that a living process has mapped stay.
    """
    if not folder.is_dir():
        return []
    mine = os.getuid()
    groups = [f for f in folder.glob("*-cpushm_*") if f.stat().st_uid == mine]
    mapped = _mapped_files() if groups else ""
    stale = [f for f in groups if str(f) not in mapped]
    for file in folder.glob(f"{WEIGHTS_FILE}*"):
        writer = file.name.removeprefix(WEIGHTS_FILE).partition("-")[0]
        if file.stat().st_uid == mine and not Path("/proc", writer).exists():
            stale.append(file)
    for file in stale:
        file.unlink(missing_ok=True)
        log.warning("removed %s, left by an engine that was killed", file)
    return stale


def _mapped_files() -> str:
    text = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            text.append(maps.read_text())
        except OSError:
            continue  # ended meanwhile, or another user's
    return "".join(text)
