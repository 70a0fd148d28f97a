"""Facts about vLLM-Ascend that matter for generation in RL, each with its versions and its reason.

Nothing here runs without an NPU; `docs/ascend.md` lists what was tested where.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from packaging.version import Version

from dapo.errors import EnvironmentCheckError

_TRANSPOSES_ON_WAKE = Version("0.27.1rc1")
_SAMPLER_RACE_FIXED = Version("0.27.1rc1")
_NZ_VARIABLE_GONE = Version("0.30.0rc1")


def installed_version() -> Version:
    return Version(metadata.version("vllm-ascend"))


def engine_arguments(version: Version, *, eager: bool) -> dict[str, Any]:
    """Arguments of `vllm.LLM` besides those of every platform."""
    arguments: dict[str, Any] = {
        # (`enable_reduce_sample` belongs here too and stays off, all versions: its log-probabilities are wrong.)
        # All versions: an update copies plain (ND) values into memory; read as FRACTAL_NZ they are other weights,
        # without an error. 0.23 refuses to wake up while NZ is on.
        "additional_config": {"weight_nz_mode": 0},
    }
    if not eager:
        # Graphs of whole decode steps are the mode tested for reinforcement learning; needs TASK_QUEUE_ENABLE != 2.
        arguments["compilation_config"] = {"cudagraph_mode": "FULL_DECODE_ONLY"}
    return arguments


def set_environment(version: Version) -> None:
    """Variables that must be there before vLLM is imported."""
    if version < _NZ_VARIABLE_GONE:
        os.environ["VLLM_ASCEND_ENABLE_NZ"] = "0"  # 0.23 reads both; later versions only additional_config


def check_environment(version: Version, *, eager: bool) -> None:
    """Refuse settings that are known to give wrong answers or to fail hours later.

    Raises:
        EnvironmentCheckError: lists every finding with its remedy.
    """
    found: list[str] = []
    if "expandable_segments:true" in os.environ.get("PYTORCH_NPU_ALLOC_CONF", "").lower():
        found.append("PYTORCH_NPU_ALLOC_CONF=expandable_segments:True cannot sleep (all versions): unset it")
    if os.environ.get("VLLM_ASCEND_ENABLE_FLASHCOMM1", "0") not in ("", "0"):
        found.append("VLLM_ASCEND_ENABLE_FLASHCOMM1 damages Qwen3-VL-MoE's deepstack (vllm-ascend#13538): unset it")
    if not eager and os.environ.get("TASK_QUEUE_ENABLE") == "2":
        found.append("TASK_QUEUE_ENABLE=2 does not work with graphs: set it to 1, or rollout.eager=true")
    if not eager and os.environ.get("ASCEND_LAUNCH_BLOCKING") == "1":
        found.append("ASCEND_LAUNCH_BLOCKING=1 does not work with graphs: unset it, or rollout.eager=true")
    if found:
        raise EnvironmentCheckError(f"vllm-ascend {version}: " + "; ".join(found))


def repair_worker(worker: Any) -> None:
    """Repairs inside an NPU worker, by version."""
    version = installed_version()
    if version < _TRANSPOSES_ON_WAKE:
        keep_expert_layout_on_wake(worker)
    if version < _SAMPLER_RACE_FIXED:
        from vllm_ascend.sample import sampler

        sampler.random_sample = draw_on_one_stream


def keep_expert_layout_on_wake(worker: Any) -> None:
    """Before 0.27.1rc1 `wake_up` replaces expert weights by transposed views of themselves (vllm-ascend#11548).

    That fits only a plain reload that follows; after our layerwise reload, or with none, the layout is already right.
    A plain reload is no way out: in 0.23 loading drops the experts' `weight_loader`, and a second one turns them again.
    """
    original = worker.wake_up

    def wake_up(tags: Sequence[str] | None = None) -> None:
        model = worker.model_runner.get_model()
        experts = [
            (module, name, module._parameters[name])
            for module in model.modules()
            for name in ("w13_weight", "w2_weight")
            if module._parameters.get(name) is not None
        ]
        original(tags=tags)
        for module, name, parameter in experts:
            setattr(module, name, parameter)

    worker.wake_up = wake_up


def draw_on_one_stream(probs: Any, generators: dict[int, Any]) -> Any:
    """Before 0.27.1rc1 the random numbers are made on a side stream and their memory may be reused before they are read
    (vllm-ascend#13394: ids outside the vocabulary with log-probability -inf). On the sampler's own stream it cannot.

    Args:
        probs: [R, V], overwritten.
        generators: per row that has a seed of its own.
    """
    import torch

    noise = torch.empty_like(probs)
    if len(generators) < len(probs):
        noise.exponential_()
    for row, generator in generators.items():
        noise[row].exponential_(generator=generator)
    return probs.div_(noise).argmax(dim=-1)
