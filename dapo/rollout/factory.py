"""Builds the engine of a configuration for one worker."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo.config.run import RunConfig
from dapo.errors import ConfigError

if TYPE_CHECKING:
    from dapo.data.processor import PromptProcessor
    from dapo.rollout.engine import Engine


def make_engine(config: RunConfig, weights: Path, processor: PromptProcessor, device: Any) -> Engine:
    """The engine that `rollout.engine` asks for, holding the folder's weights as version 0.

    Args:
        weights: a Hugging Face folder.
        device: torch device of this worker, or its name.

    Raises:
        ConfigError: vLLM is asked for and not installed, or something only vLLM has and it is not chosen.
    """
    import torch

    where = torch.device(device)
    rollout = config.rollout
    kind = choose_engine(rollout.engine, where.type)
    if kind == "vllm":
        from dapo.rollout.vllm_engine import VllmEngine

        return VllmEngine.from_config(config, weights, processor, where)
    if rollout.separate_process:
        raise ConfigError(
            f"rollout.separate_process=true is a way to run vLLM; rollout.engine={rollout.engine} on {where.type} "
            "means transformers here: set rollout.engine=vllm, or rollout.separate_process=false"
        )
    from dapo.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(
        weights,
        processor,
        dtype=getattr(torch, config.engine_dtype),
        device=where,
        max_num_seqs=rollout.max_num_seqs,
        kv_cache_mib=rollout.kv_cache_mib,
        return_routed_experts=rollout.router_replay,
    )


def choose_engine(asked: str, device_type: str) -> str:
    """`transformers` or `vllm`; `auto` takes vLLM where it is installed and an accelerator is present.

    Raises:
        ConfigError: vLLM is asked for and not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if asked == "auto":
        return "vllm" if installed and device_type != "cpu" else "transformers"
    if asked == "vllm" and not installed:
        extra = {"cpu": "`make install-vllm`", "npu": "vllm-ascend as docs/ascend.md says"}.get(
            device_type, "`pip install dapo[gpu]`"
        )
        raise ConfigError(
            f"rollout.engine=vllm, but vLLM is not installed here; install it with {extra}, or use "
            "rollout.engine=transformers"
        )
    return asked
